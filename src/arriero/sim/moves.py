"""Runs migrations in virtual time: carries out what the protocol machine commands, message by message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from arriero.core.config import MigrationConfig
from arriero.core.messages import Answer
from arriero.core.migration import Migration, State
from arriero.core.migration_commands import Abort, Command, End, Park, Replay, Route, Send, WakeAt
from arriero.core.pace import StepPace
from arriero.core.transfer import Stage
from arriero.core.types import InstanceId, MigrationId, MigrationMode, RequestId
from arriero.sim.fast_sequence import FastSequence
from arriero.sim.kernel import Kernel
from arriero.sim.prefix_cache import Share
from arriero.sim.records import Record, TokenLog
from arriero.sim.virtual_instance import VirtualInstance

HANDOVER_S = 0.002  # as in production: from the end of the source's last step until COMMIT is at the destination


@dataclass(slots=True, kw_only=True)
class MoveReport:
    """What one attempt did; the fields are those of production's report, and when it began."""

    migration_id: MigrationId
    request_id: RequestId
    source: InstanceId | None  #: None: a replay
    destination: InstanceId
    mode: MigrationMode
    cause: str
    ok: bool = False
    reason: str = ""
    num_bytes: int = 0
    stages: list[Stage] = field(default_factory=list)
    num_tokens: int = 0
    total_s: float = 0.0
    detach_to_commit_s: float | None = None
    started_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Run:
    machine: Migration
    record: Record
    log: TokenLog
    origin: FastSequence
    arriving: FastSequence
    report: MoveReport
    started_s: float
    timer: int = 0


class VirtualMigrations:
    """All migrations; at most one open at a time for a request."""

    def __init__(
        self,
        *,
        kernel: Kernel,
        instances: Sequence[VirtualInstance],
        config: MigrationConfig,
        latency_s: float,
        pace: StepPace,
        on_end: Callable[[Record, MoveReport], None],
        on_replay: Callable[[Record, int], None],
    ) -> None:
        self._kernel = kernel
        self._instances = instances
        self._config = config
        self._latency_s = latency_s
        self._pace = pace
        self._on_end = on_end
        self._on_replay = on_replay
        self._open: dict[RequestId, _Run] = {}
        self._runs: dict[MigrationId, _Run] = {}
        self._number = 0

    def move(self, record: Record, destination: InstanceId, mode: MigrationMode, cause: str) -> bool:
        """Start a migration; False if it cannot even begin."""
        source = record.instance
        origin = self._instances[source].engine.live.get(record.request_id)
        if record.request_id in self._open or origin is None or source == destination:
            return False
        self.start(record, origin, source, destination, mode, cause)
        return True

    def start(
        self,
        record: Record,
        origin: FastSequence,
        source: InstanceId | None,
        destination: InstanceId,
        mode: MigrationMode,
        cause: str,
    ) -> None:
        """Start a migration, or a replay: then ``source`` is None, and ``origin`` says what has been delivered."""
        now = self._kernel.now
        self._number += 1
        log = TokenLog(origin, self._num_steps_done)
        machine = Migration(
            migration_id=f"m{self._number}",
            request_id=record.request_id,
            source=source,
            destination=destination,
            tokens=log,
            config=self._config,
            mode=mode,
            commit_due=None if source is None else partial(self._commit_due, source),
        )
        arriving = FastSequence(
            record.request_id, origin.num_prompt, origin.num_wanted, origin.priority, origin.arrival_s
        )
        arriving.share = Share(origin.share.segments) if origin.share is not None else None
        report = MoveReport(
            migration_id=machine.migration_id,
            request_id=record.request_id,
            source=source,
            destination=destination,
            mode=mode,
            cause=cause,
            started_s=now,
        )
        run = _Run(machine, record, log, origin, arriving, report, now)
        self._open[record.request_id] = self._runs[machine.migration_id] = run
        self._execute(run, machine.start(now))

    def is_moving(self, request_id: RequestId) -> bool:
        """Whether a migration or a replay of this request has no outcome yet."""
        return request_id in self._open

    def instance_lost(self, instance: InstanceId) -> None:
        """An instance died."""
        self._pace.forget(instance)
        for run in list(self._runs.values()):
            self._execute(run, run.machine.on_instance_lost(instance, self._kernel.now))

    def _commit_due(self, source: InstanceId, now: float) -> float:
        """When a COMMIT will be at the destination if DETACH is sent now: the step in flight is known."""
        end_s = self._instances[source].step_end_s(now)
        if end_s is None:
            end_s = now + self._pace.next_end_in(source, now, self._latency_s)
        return end_s + HANDOVER_S

    def _await_token(self, run: _Run) -> None:
        """Tell the machine when the source's step in flight will have delivered a token."""
        assert run.machine.source is not None
        end_s = self._instances[run.machine.source].step_end_s(self._kernel.now)
        if end_s is not None:
            self._kernel.at(end_s + self._latency_s, partial(self._token_came, run))

    def _token_came(self, run: _Run) -> None:
        self._execute(run, run.machine.on_token(self._kernel.now))

    def _num_steps_done(self, sequence: FastSequence) -> int:
        """Steps whose tokens were delivered, though the engine has not applied them."""
        run = self._open.get(sequence.request_id)
        if run is None:
            return 0
        at = run.machine.source if sequence is run.origin else run.machine.destination
        if at is None:
            return 0  # of a replay: nobody computes it
        instance = self._instances[at]
        running = sequence.num_computed == sequence.num_tokens - 1 and sequence in instance.engine.running
        return instance.num_steps_done() if running else 0

    def finished(self, request_id: RequestId) -> None:
        """The request's last token was delivered."""
        run = self._open.get(request_id)
        if run is not None:
            self._execute(run, run.machine.on_finished(self._kernel.now))

    def open_migrations(self) -> list[str]:
        """Every migration that is not closed, for leak checks."""
        return [f"{m} {r.record.request_id} {r.machine.state}" for m, r in self._runs.items()]

    # ------------------------------------------------------------------ commands

    def _execute(self, run: _Run, commands: list[Command]) -> None:
        now, replay = self._kernel.now, False
        for command in commands:
            match command:
                case Park(instance):
                    self._kernel.at(now + self._latency_s, partial(self._instances[instance].park, run.arriving))
                case Send(instance, message):
                    deliver = partial(self._instances[instance].operate, message, partial(self._replied, run))
                    self._kernel.at(now + self._latency_s, deliver)
                case Abort(instance):
                    abort = partial(self._instances[instance].abort, run.record.request_id)
                    self._kernel.at(now + self._latency_s, abort)
                case Route(instance):
                    run.record.instance = instance
                    moved = instance == run.machine.destination
                    run.log.follow(run.arriving if moved else run.origin)
                    run.record.left_s = run.origin.left_s if moved else -1.0
                case WakeAt(time_s):
                    run.timer += 1
                    self._kernel.at(max(now, time_s), partial(self._time, run, run.timer))
                case End(ok, reason):
                    self._end(run, ok, reason)
                case Replay():
                    replay = True
        if run.machine.state is State.ALIGNING:
            self._await_token(run)
        if run.machine.is_closed:
            self._runs.pop(run.machine.migration_id, None)
        if replay:
            self._on_replay(run.record, len(run.log))

    def _replied(self, run: _Run, answer: Answer) -> None:
        """The answer leaves the instance."""
        self._kernel.at(self._kernel.now + self._latency_s, partial(self._answered, run, answer))

    def _answered(self, run: _Run, answer: Answer) -> None:
        self._execute(run, run.machine.on_answer(answer, self._kernel.now))

    def _time(self, run: _Run, timer: int) -> None:
        if timer == run.timer:
            self._execute(run, run.machine.on_time(self._kernel.now))

    def _end(self, run: _Run, ok: bool, reason: str) -> None:
        machine, report, now = run.machine, run.report, self._kernel.now
        report.ok, report.reason = ok, reason
        report.num_bytes, report.stages, report.num_tokens = (
            machine.transfer.num_bytes,
            machine.transfer.stages,
            len(run.log),
        )
        report.total_s = now - run.started_s
        if machine.detach_s is not None and machine.commit_s is not None:
            report.detach_to_commit_s = now - machine.detach_s
        del self._open[run.record.request_id]
        self._on_end(run.record, report)
