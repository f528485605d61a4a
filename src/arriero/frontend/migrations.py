"""Runs migrations: carries out what the protocol machine commands, and reports what came of it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from arriero.core.config import MigrationConfig
from arriero.core.errors import ConflictError, UnmovableError
from arriero.core.messages import Answer, Op
from arriero.core.migration import Migration
from arriero.core.migration_commands import Abort, Command, End, Park, Replay, Route, Send, WakeAt
from arriero.core.pace import StepPace
from arriero.core.transfer import Stage
from arriero.core.types import InstanceId, MigrationId, MigrationMode, RequestId
from arriero.frontend.links import InstanceLinks
from arriero.frontend.requests import LiveRequest

logger = logging.getLogger(__name__)


DETACH_LEAD_S = 0.008
"""What DETACH may need to be ready at the end of the source's step: its engine's input thread waits for a core and
the GIL, both of which the step keeps busy."""

HANDOVER_S = 0.002
"""First guess: from the end of the source's last step until COMMIT is at the destination."""


@dataclass(slots=True, kw_only=True)
class MigrationReport:
    """What one attempt did. Durations in seconds, on the front end's clock."""

    migration_id: MigrationId
    request_id: RequestId
    source: InstanceId | None
    destination: InstanceId
    mode: MigrationMode
    cause: str
    ok: bool = False
    reason: str = ""
    num_bytes: int = 0
    stages: list[Stage] = field(default_factory=list)
    num_tokens: int = 0  #: output tokens delivered when it ended
    total_s: float = 0.0
    detach_to_commit_s: float | None = None  #: DETACH sent .. COMMIT acknowledged
    pause_s: float | None = None  #: last token from the source .. first from the destination

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Run:
    machine: Migration
    request: LiveRequest
    report: MigrationReport
    started_s: float
    ended: asyncio.Future[MigrationReport]
    timer: asyncio.TimerHandle | None = None


class MigrationRunner:
    """All migrations of this front end; at most one open at a time for a request."""

    def __init__(
        self,
        *,
        links: InstanceLinks,
        config: MigrationConfig,
        pace: StepPace,
        clock: Callable[[], float],
        on_end: Callable[[LiveRequest, MigrationReport], None],
        on_replay: Callable[[LiveRequest], None],
    ) -> None:
        self._links = links
        self._config = config
        self._pace = pace
        self._handover_s = HANDOVER_S
        self._clock = clock
        self._on_end = on_end
        self._on_replay = on_replay
        self._open: dict[RequestId, _Run] = {}  # outcome not known yet
        self._runs: dict[MigrationId, _Run] = {}  # also those that still clean up

    # ------------------------------------------------------------------ control

    def start(
        self,
        request: LiveRequest,
        destination: InstanceId,
        *,
        mode: MigrationMode,
        cause: str,
        source: InstanceId | None,
    ) -> asyncio.Future[MigrationReport]:
        """Start a migration (or a replay: ``source`` None). The future never raises.

        Raises UnmovableError or ConflictError if it can't even begin.
        """
        request_id = request.request_id
        if request_id in self._open:
            raise ConflictError(f"request {request_id} is moving already")
        if source is not None and request.facts.unmovable is not None:
            raise UnmovableError(f"request {request_id} cannot move: {request.facts.unmovable}")
        migration_id = uuid.uuid4().hex[:12]
        machine = Migration(
            migration_id=migration_id,
            request_id=request_id,
            source=source,
            destination=destination,
            tokens=request.tokens,
            config=self._config,
            mode=mode,
            commit_due=None if source is None else partial(self._commit_due, source, destination),
        )
        report = MigrationReport(
            migration_id=migration_id,
            request_id=request_id,
            source=source,
            destination=destination,
            mode=machine.mode,
            cause=cause,
        )
        now = self._clock()
        run = _Run(machine, request, report, now, asyncio.get_running_loop().create_future())
        self._open[request_id] = self._runs[migration_id] = run
        self._execute(run, machine.start(now))
        return run.ended

    def _commit_due(self, source: InstanceId, destination: InstanceId, now: float) -> float:
        """When a COMMIT will be at the destination if DETACH is sent now, on the destination's clock."""
        due_s = now + self._pace.next_end_in(source, now, DETACH_LEAD_S) + self._handover_s
        return self._pace.on_clock_of(destination, due_s)

    @property
    def any_moving(self) -> bool:
        """Whether :meth:`tokens_came` would do anything."""
        return bool(self._open)

    def is_moving(self, request_id: RequestId) -> bool:
        """Whether a migration of this request has no outcome yet."""
        return request_id in self._open

    def client_gone(self, request_id: RequestId) -> bool:
        """The client aborted. False: no migration is open, the caller aborts the request itself."""
        run = self._open.get(request_id)
        if run is None:
            return False
        self._execute(run, run.machine.on_client_gone(self._clock()))
        return True

    def tokens_came(self, request_ids: Iterable[RequestId]) -> None:
        """These requests were delivered tokens, and more are to come."""
        for request_id in request_ids:
            run = self._open.get(request_id)
            if run is not None:
                self._execute(run, run.machine.on_token(self._clock()))

    def finished(self, request_id: RequestId) -> None:
        """The request's last token was delivered."""
        run = self._open.get(request_id)
        if run is not None:
            self._execute(run, run.machine.on_finished(self._clock()))

    def instance_lost(self, instance: InstanceId) -> set[RequestId]:
        """An instance died. Returns the requests whose fate the protocol takes care of."""
        cared = set()
        for run in list(self._runs.values()):
            if run.request.request_id in self._open and instance in (run.machine.source, run.machine.destination):
                cared.add(run.request.request_id)
            self._execute(run, run.machine.on_instance_lost(instance, self._clock()))
        return cared

    def open_migrations(self) -> list[str]:
        """Every migration that is not closed, for leak checks."""
        return [f"{m} {r.request.request_id} {r.machine.state}" for m, r in self._runs.items()]

    def close(self) -> None:
        """Stop all timers."""
        for run in self._runs.values():
            if run.timer is not None:
                run.timer.cancel()

    # ------------------------------------------------------------------ commands

    def _execute(self, run: _Run, commands: list[Command]) -> None:
        replay = False
        for command in commands:
            match command:
                case Park(instance):
                    self._links.add(instance, run.request.message, parked=True)
                case Send(instance, message):
                    self._links.call(instance, message, lambda answer: self._answered(run, answer))
                case Abort(instance):
                    self._links.abort(instance, [run.request.request_id])
                case Route(instance):
                    run.request.route = instance
                case WakeAt(time_s):
                    self._wake_at(run, time_s)
                case Replay():
                    replay = True
                case End(ok, reason):
                    self._end(run, ok, reason)
        if run.machine.is_closed:
            self._forget(run)
        if replay:
            self._on_replay(run.request)

    def _answered(self, run: _Run, answer: Answer) -> None:
        if answer.op is Op.DETACH and answer.ok and run.machine.source is not None:
            took = self._pace.since_last_end(run.machine.source, self._clock())
            self._handover_s += 0.2 * (min(took, 10 * HANDOVER_S) - self._handover_s)
        self._execute(run, run.machine.on_answer(answer, self._clock()))

    def _wake_at(self, run: _Run, time_s: float) -> None:
        if run.timer is not None:
            run.timer.cancel()
        delay = max(0.0, time_s - self._clock())
        run.timer = asyncio.get_running_loop().call_later(delay, self._time, run)

    def _time(self, run: _Run) -> None:
        self._execute(run, run.machine.on_time(self._clock()))

    def _end(self, run: _Run, ok: bool, reason: str) -> None:
        machine, report, now = run.machine, run.report, self._clock()
        self._open.pop(run.request.request_id, None)
        report.ok, report.reason = ok, reason
        report.num_bytes, report.stages, report.num_tokens = (
            machine.transfer.num_bytes,
            machine.transfer.stages,
            len(run.request.tokens),
        )
        report.total_s = now - run.started_s
        if machine.detach_s is not None and machine.commit_s is not None:
            report.detach_to_commit_s = now - machine.detach_s
        self._on_end(run.request, report)
        if not run.ended.done():
            run.ended.set_result(report)

    def _forget(self, run: _Run) -> None:
        self._runs.pop(run.machine.migration_id, None)
        if run.timer is not None:
            run.timer.cancel()
            run.timer = None
