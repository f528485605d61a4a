"""Which requests may have killed their instance, and how to find out without harm to their neighbours.

A request that was running when its instance died is a suspect: it has one more death to answer for. The last replay of
a suspect is its *trial*, and no other is on trial meanwhile: if its instance dies as well, it is known whose fault that
is. Only then is a request given up. A neighbour is cleared as soon as it has produced some tokens, and the next one is
tried. What somebody outside has killed proves nothing, unless it happens over and over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from arriero.core.config import RecoveryConfig
from arriero.core.types import InstanceSnapshot, Phase, RequestId


@dataclass(slots=True)
class _Record:
    num_deaths: int = 0  # that it may have caused
    num_outside_kills: int = 0
    is_on_trial: bool = False
    num_tokens: int = 0  # since its trial began


class Suspects:
    """The deaths that each live request was part of."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._records: dict[RequestId, _Record] = {}

    def died(self, running: Collection[RequestId], *, from_outside: bool = False) -> set[RequestId]:
        """An instance died with these requests running; returns those that are given up.

        If one of them was on trial, it did it, and nobody else is blamed. Otherwise it may have been any: all are
        blamed, but nobody is given up for it (unless no replay is allowed at all). ``from_outside``: somebody killed
        the process. Nobody is blamed then, but for those that have seen ``max_outside_kills`` of that: who kills may
        do so because of what they do (a guard of a machine's memory, say).
        """
        if from_outside and self._config.max_replays:
            running = [r for r in running if self._outlived_too_many(r)]
        culprits = {r for r in running if r in self._records and self._records[r].is_on_trial}
        if culprits or not self._config.max_replays:
            return culprits or set(running)
        for request_id in running:
            self._records.setdefault(request_id, _Record()).num_deaths += 1
        return set()

    def _outlived_too_many(self, request_id: RequestId) -> bool:
        record = self._records.setdefault(request_id, _Record())
        record.num_outside_kills += 1
        return record.num_outside_kills > self._config.max_outside_kills

    def begin_replay(self, request_id: RequestId) -> bool:
        """Whether the request may be replayed now. A suspect's trial begins with that, and one at a time is tried."""
        record = self._records.get(request_id)
        if record is None or record.num_deaths < self._config.max_replays or record.is_on_trial:
            return True
        if self.on_trial:
            return False
        record.is_on_trial, record.num_tokens = True, 0
        return True

    def produced(self, request_id: RequestId, num_tokens: int) -> bool:
        """The request delivered tokens; whether its trial is over with that: they were enough, it is cleared."""
        record = self._records.get(request_id)
        if record is None or not record.is_on_trial:
            return False
        record.num_tokens += num_tokens
        if record.num_tokens < self._config.probation_tokens:
            return False
        del self._records[request_id]
        return True

    def ended(self, request_id: RequestId) -> bool:
        """The request ended; whether a trial is over with that. Idempotent."""
        record = self._records.pop(request_id, None)
        return record is not None and record.is_on_trial

    @property
    def on_trial(self) -> list[RequestId]:
        """Who is tried now."""
        return [r for r, record in self._records.items() if record.is_on_trial]


def may_have_run(requests: Iterable[RequestId], last_seen: InstanceSnapshot | None) -> list[RequestId]:
    """Those of an instance's requests that may have been in its last batch: not those that waited, as it was seen last,
    behind more than it has free places for.
    """
    if last_seen is None:
        return list(requests)
    waiting = [r.request_id for r in last_seen.requests if r.phase is Phase.WAITING]
    running = sum(r.phase is Phase.RUNNING for r in last_seen.requests)
    idle = set(waiting[max(1, last_seen.max_num_seqs - running) :])
    return [r for r in requests if r not in idle]
