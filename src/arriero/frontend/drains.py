"""Drains: an instance that is to go is emptied by the scheduler's moves, and then ends.

Copies get a greater share of the time meanwhile, there and where the requests go (docs/decisions/0005). What has not
left in time is lost to the instance as in a crash: it is replayed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arriero.core.commands import Command
from arriero.core.config import DrainConfig
from arriero.core.errors import ArrieroError, ConflictError
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import InstanceId, InstanceState
from arriero.frontend.instances import Instance, Instances
from arriero.frontend.links import InstanceLinks

logger = logging.getLogger(__name__)

SET_COPY_SHARE = "arriero_copy_share"


@dataclass(slots=True, kw_only=True)
class DrainReport:
    """How an instance was emptied. Durations in seconds."""

    instance: InstanceId
    cause: str
    num_requests: int  #: there at the beginning
    ok: bool = False  #: everything had left or ended when the instance ended
    emptied_s: float | None = None  #: until nothing was left
    total_s: float = 0.0  #: until its process was gone

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Drain:
    report: DrainReport
    started_s: float
    ended: asyncio.Future[DrainReport]
    timer: asyncio.TimerHandle


class Drains:
    """All drains under way."""

    def __init__(
        self,
        config: DrainConfig,
        *,
        instances: Instances,
        links: InstanceLinks,
        scheduler: GlobalScheduler,
        carry_out: Callable[[Sequence[Command]], None],
        num_requests: Callable[[InstanceId], int],
        on_started: Callable[[DrainReport], None],
        on_ended: Callable[[DrainReport], None],
        clock: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._config = config
        self._instances = instances
        self._links = links
        self._scheduler = scheduler
        self._carry_out = carry_out
        self._num_requests = num_requests
        self._on_started = on_started
        self._on_ended = on_ended
        self._clock = clock
        self._spawn = spawn
        self._open: dict[InstanceId, _Drain] = {}

    def start(self, instance: InstanceId, *, cause: str, force: bool = False) -> asyncio.Future[DrainReport]:
        """Empty the instance and end it; the future never raises. Again: the same drain.

        Raises NotFoundError, and ConflictError if it does not serve, or is the last one that does (unless ``force``).
        """
        record = self._instances[instance]
        if instance in self._open:
            return self._open[instance].ended
        if record.state is not InstanceState.READY:
            raise ConflictError(f"instance {instance} is {record.state}: only one that is ready can be drained")
        if not force and (reason := self._scheduler.why_not_drain(instance)) is not None:
            raise ConflictError(f"{reason}; start another one first, or force it: new requests will find no instance")
        loop, now = asyncio.get_running_loop(), self._clock()
        drain = self._open[instance] = _Drain(
            report=DrainReport(instance=instance, cause=cause, num_requests=self._num_requests(instance)),
            started_s=now,
            ended=loop.create_future(),
            timer=loop.call_later(self._config.timeout_s, self._expired, instance),
        )
        self._instances.drain(instance)
        self._on_started(drain.report)
        self._spawn(self._set_copy_share([instance, *self._instances.ready_ids()], self._config.copy_share))
        self._carry_out(self._scheduler.instance_draining(instance, now))
        return drain.ended

    def emptied(self, instance: InstanceId) -> None:
        """Nothing is left there (from the scheduler, once or more)."""
        drain = self._open.get(instance)
        if drain is None or drain.report.emptied_s is not None:
            return
        drain.report.emptied_s = self._clock() - drain.started_s
        drain.timer.cancel()
        drain.timer = asyncio.get_running_loop().call_later(
            self._config.end_s, self._instances.kill, instance, "it is empty and does not end by itself"
        )
        self._instances.end(instance)

    def _expired(self, instance: InstanceId) -> None:
        left = self._num_requests(instance)
        self._instances.kill(
            instance, f"drain timed out after {self._config.timeout_s:.0f} s with {left} request(s) left"
        )

    def gone(self, instance: Instance) -> bool:
        """Its process has ended, somehow; whether a drain is over with that."""
        drain = self._open.pop(instance.instance_id, None)
        if drain is None:
            return False
        drain.timer.cancel()
        report = drain.report
        report.ok, report.total_s = report.emptied_s is not None, self._clock() - drain.started_s
        if not self._open:
            self._spawn(self._set_copy_share(self._instances.ready_ids(), None))
        self._on_ended(report)
        if not drain.ended.done():
            drain.ended.set_result(report)
        return True

    async def _set_copy_share(self, instances: Iterable[InstanceId], share: float | None) -> None:
        for instance in instances:
            with contextlib.suppress(ArrieroError):  # it has gone meanwhile
                await self._links.utility(instance, SET_COPY_SHARE, share)

    def close(self) -> None:
        """Stop all timers."""
        for drain in self._open.values():
            drain.timer.cancel()
