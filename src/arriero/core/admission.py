"""Admission: whether one more request may wait. Queues are bounded, so that a refusal comes at once instead of late."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from arriero.core.config import AdmissionConfig

_WEIGHT = 0.2  # of the last end in the moving average


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """How full one instance is."""

    num_running: int
    num_waiting: int
    num_pending: int  #: sent to it, and not in its snapshot yet
    max_num_seqs: int  #: places in its batch


def num_queued(instances: Iterable[Occupancy]) -> int:
    """Requests that wait, or will once their instances have seen them: those that are pending and find no place."""
    waiting = pending = places = 0
    for i in instances:
        waiting += i.num_waiting
        pending += i.num_pending
        places += max(0, i.max_num_seqs - i.num_running - i.num_waiting)
    return waiting + max(0, pending - places)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """Why a request may not wait, and when to try again."""

    reason: str
    retry_after_s: float


class Admission:
    """Refuses new requests while too many wait, and says when to come back. Never asked about replays."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self._between_ends_s = 0.0  # moving average
        self._last_end_s: float | None = None

    def ended(self, now: float) -> None:
        """A request has ended: the queue moves on by one."""
        if self._last_end_s is not None:
            took = min(now - self._last_end_s, self._config.max_retry_after_s)
            self._between_ends_s += _WEIGHT * (took - self._between_ends_s)
        self._last_end_s = now

    def refuse(
        self, instances: Iterable[Occupancy], *, num_ready: int, num_live: int, num_unplaced: int
    ) -> Overload | None:
        """Not None if ``max_queued_requests`` wait already for each of ``num_ready`` instances; with none, as for one.

        ``num_live`` requests have not ended: while they are fewer than may wait, ``instances`` is not even looked at.
        ``num_unplaced`` of them were given to no instance yet.
        """
        limit = self._config.max_queued_requests * max(1, num_ready)
        if num_live < limit:
            return None
        queued = num_queued(instances) + num_unplaced
        if queued < limit:
            return None
        return Overload(
            reason=f"{queued} requests wait already, {limit} may ({self._config.max_queued_requests} for each of "
            f"{num_ready} instances, see --max-queued-requests): try again later",
            retry_after_s=self._retry_after_s(queued - limit + 1),
        )

    def _retry_after_s(self, num_ends: int) -> float:
        """Until so many requests will have ended, and a tenth of the queue, at the rate of the last ends."""
        config = self._config
        estimate = (num_ends + config.max_queued_requests / 10) * self._between_ends_s
        return min(max(estimate, config.min_retry_after_s), config.max_retry_after_s)
