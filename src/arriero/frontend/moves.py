"""Moves of live requests: whether one may begin, what the scheduler is told of it, and what its client noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from arriero.core.commands import Command
from arriero.core.errors import ConflictError
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import InstanceId, InstanceState, MigrationMode, RequestId
from arriero.frontend.describe import event_of
from arriero.frontend.instances import Instances
from arriero.frontend.migrations import MigrationReport, MigrationRunner
from arriero.frontend.requests import LiveRequest, RequestTable
from arriero.observe.events import EventLog
from arriero.observe.metrics import Metrics


class Moves:
    """All moves and replays of a cluster, from their beginning to the first token after them."""

    def __init__(
        self,
        *,
        requests: RequestTable,
        instances: Instances,
        scheduler: GlobalScheduler,
        carry_out: Callable[[Sequence[Command]], None],
        events: EventLog,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.migrations: MigrationRunner  #: set by the cluster, whose runner reports to :meth:`ended`
        self._requests = requests
        self._instances = instances
        self._scheduler = scheduler
        self._carry_out = carry_out
        self._events = events
        self._metrics = metrics
        self._clock = clock
        self._pauses: dict[RequestId, MigrationReport] = {}

    def start(
        self, request: LiveRequest, destination: InstanceId, mode: MigrationMode, cause: str
    ) -> asyncio.Future[MigrationReport]:
        """Begin a migration. Raises NotFoundError, ConflictError or UnmovableError if it can't be tried."""
        target = self._instances[destination]
        if target.state is not InstanceState.READY:
            raise ConflictError(f"instance {destination} is {target.state}, not ready: nothing can move there")
        if request.route == destination:
            raise ConflictError(f"request {request.request_id} runs on instance {destination} already")
        source = request.route
        if source is None:
            raise ConflictError(f"request {request.request_id} waits for an instance: there is nothing to move yet")
        if self._instances.is_dead(source):
            raise ConflictError(
                f"request {request.request_id} was on instance {source}, which died: it waits for a replay"
            )
        future = self.migrations.start(request, destination, mode=mode, cause=cause, source=source)
        self._carry_out(self._scheduler.migration_started(request.request_id, source, destination, self._clock()))
        return future

    def ended(self, request: LiveRequest, report: MigrationReport) -> None:
        """A migration, or a replay, has an outcome."""
        if report.source is not None:
            self._carry_out(self._scheduler.migration_ended(report.request_id, self._clock(), ok=report.ok))
        if report.ok and self._requests.get(report.request_id) is request:
            request.num_moves += 1
            request.pause_since_s = request.last_token_s or None
            self._pauses[report.request_id] = report
        self._metrics.migration_ended(report.ok, report.reason, report.num_bytes, replay=report.source is None)
        self._events.emit("migration", **event_of(report))

    def went_on(self, request: LiveRequest, now: float) -> None:
        """The first token after a move: the client-visible pause is known."""
        assert request.pause_since_s is not None
        pause, request.pause_since_s = now - request.pause_since_s, None
        request.paused_s += pause
        report = self._pauses.pop(request.request_id, None)
        if report is not None:
            report.pause_s = pause
            self._events.emit("resume", request=request.request_id, instance=request.route, pause_s=pause)
            self._metrics.migration_pause_seconds.observe(pause)

    def forget(self, request_id: RequestId) -> None:
        """The request has ended."""
        self._pauses.pop(request_id, None)
