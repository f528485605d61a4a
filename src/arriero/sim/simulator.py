"""The simulator: production's GlobalScheduler, ledger, migrations and llumlets in virtual time over FastEngines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from arriero.core.commands import Command, Dispatch, Drain, Launch, Move, PolicyFailed, Reject, Stop
from arriero.core.errors import ProtocolError
from arriero.core.pace import StepPace
from arriero.core.types import InstanceId, RequestId
from arriero.observe.decisions import make_scheduler
from arriero.observe.events import EventLog, known
from arriero.sim.fast_engine import FastEngine
from arriero.sim.fast_reports import check_integrity, prefix_hit
from arriero.sim.fast_sequence import FastSequence
from arriero.sim.foretelling import foretell
from arriero.sim.kernel import Kernel
from arriero.sim.losses import Losses
from arriero.sim.membership import Membership
from arriero.sim.moves import MoveReport, VirtualMigrations
from arriero.sim.network import Network
from arriero.sim.records import Record
from arriero.sim.requests import Requests
from arriero.sim.samples import Sample, take_sample
from arriero.sim.settings import BLIND, CLAIRVOYANT, SimulatorConfig, engine_config, scheduler_config
from arriero.sim.virtual_instance import InstanceHooks, VirtualInstance
from arriero.workload.workload import Arrival, Workload

__all__ = [
    "CLAIRVOYANT",
    "SimulationResult",
    "Simulator",
    "SimulatorConfig",
    "engine_config",
    "scheduler_config",
]


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What happened."""

    config: SimulatorConfig
    records: list[Record]
    moves: list[MoveReport]
    samples: list[Sample]
    end_s: float  #: when the last request ended
    num_steps: int
    instance_s: float  #: sum over the instances, from launch to stop
    num_lost_instances: int = 0
    prefix_hit: float | None = None  #: share of the tokens to prefill that a prefix cache had; None without one


class Simulator:
    """One run of one workload. ``on_progress`` hears the number of requests that ended, now and then."""

    def __init__(
        self,
        config: SimulatorConfig,
        workload: Workload,
        *,
        make_events: Callable[[Callable[[], float]], EventLog] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.config = config
        self.kernel = Kernel()
        self._events = make_events(lambda: self.kernel.now) if make_events is not None else None
        self.scheduler = make_scheduler(config.effective_scheduler, self._events)
        self.records: dict[RequestId, Record] = {}
        self.moves: list[MoveReport] = []
        self.samples: list[Sample] = []
        self._arrivals: Sequence[Arrival] = workload.arrivals
        self._requests = Requests(config)
        self._on_progress = on_progress
        self._num_arrived, self._num_ended, self._end_s = 0, 0, 0.0
        rebalancing = config.scheduler.rebalancing
        pace = StepPace() if rebalancing is not None or config.kills else None
        self._looks = (
            rebalancing is not None
            or config.scheduler.queueing is not None
            or config.scheduler.dispatch_policy not in BLIND
        )
        network = Network(config.network, self.kernel, lambda instance: self.instances[instance].cut())
        hooks = InstanceHooks(
            on_step=self._on_step,
            on_preempted=self._on_preempted,
            on_pushed=self._on_pushed,
            is_watched=lambda: self.scheduler.num_queued > 0,
        )

        def make(instance: InstanceId) -> VirtualInstance:
            return VirtualInstance(
                FastEngine(config.effective_engine, instance=instance, prefill_first=config.prefill_first),
                self.kernel,
                network,
                hooks,
                migration=config.migration,
                copy=config.copy,
                pace=pace,
                snapshot_interval_s=config.scheduler.snapshot_interval_s if self._looks else None,
                max_steps=config.max_steps,
            )

        self.instances = Membership(make)
        self.migrations = VirtualMigrations(
            kernel=self.kernel,
            instances=self.instances,
            config=config.migration,
            latency_s=config.network.latency_s,
            pace=pace or StepPace(),
            on_end=self._on_migration_end,
            on_replay=lambda record, num_tokens: self._losses.replay(record, num_tokens),
        )
        self._losses = Losses(
            kernel=self.kernel,
            instances=self.instances,
            migrations=self.migrations,
            scheduler=self.scheduler,
            requests=self._requests,
            carry_out=self._carry_out,
            launch=self._launch,
        )

    def run(self) -> SimulationResult:
        """Until every request has ended. Raises ArrieroError if a policy fails."""
        for _ in range(self.config.num_instances):
            self._join(self.instances.launch(0.0))
        if self._arrivals:
            if (queueing := self.config.scheduler.queueing) is not None and queueing.trusts_max_tokens:
                foretell(self.kernel, self._arrivals, queueing.horizon_s, self._foretell)
            self.kernel.at(self._arrivals[0].arrival_s, self._arrive)
            if self.scheduler.config.interval_s is not None:
                self.kernel.at(self.scheduler.config.interval_s, self._tick)
            for kill in self.config.kills:
                self.kernel.at(kill.time_s, partial(self._kill, kill.instance))
            if self.config.sample_s:
                self.kernel.at(0.0, self._sample)
        self.kernel.run()
        return SimulationResult(
            self.config,
            list(self.records.values()),
            self.moves,
            self.samples,
            self._end_s,
            sum(i.engine.num_steps for i in self.instances),
            sum(life.seconds(self._end_s) for life in self.instances.lives),
            self._losses.num_lost,
            prefix_hit([i.engine for i in self.instances]),
        )

    # ------------------------------------------------------------------ requests

    def _arrive(self) -> None:
        arrival = self._arrivals[self._num_arrived]
        record = Record(f"r{self._num_arrived}", arrival)
        self._num_arrived += 1
        self.records[record.request_id] = record
        if self._num_arrived < len(self._arrivals):
            self.kernel.at(self._arrivals[self._num_arrived].arrival_s, self._arrive)
        if (reason := self._requests.why_not(arrival)) is not None:
            self._reject(record, reason)
            return
        self._collect_snapshots(self.kernel.now)
        was_watched = self.scheduler.num_queued > 0
        facts = self._requests.facts(record.request_id, arrival)
        self._carry_out(self.scheduler.arrived(facts, self.kernel.now))
        if self.scheduler.num_queued and not was_watched:
            for instance in self.instances.present():
                instance.watch()

    def _foretell(self, number: int) -> None:
        """Who knows the future hears of an arrival within the horizon."""
        arrival = self._arrivals[number]
        if self._requests.why_not(arrival) is None:
            facts = self._requests.facts(f"r{number}", arrival)
            self._carry_out(self.scheduler.foretold(facts, arrival.arrival_s, self.kernel.now))

    def _reject(self, record: Record, reason: str) -> None:
        record.rejected = reason
        self._emit("reject", request=record.request_id, reason=reason)
        self._ended(record)

    # ------------------------------------------------------------------ what the scheduler wants

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Dispatch(request_id=request_id, instance=instance):
                    self._place(self.records[request_id], instance)
                case Move():
                    self._move(command)
                case Reject(request_id=request_id, reason=reason):
                    self._reject(self.records[request_id], reason)
                case Launch(num_instances=num_instances):
                    for _ in range(num_instances):
                        self._launch()
                case Drain(instance=instance, reason=reason):
                    self._emit("instance_draining", instance=instance, reason=reason)
                case Stop(instance=instance):
                    self._stop(instance)
                case PolicyFailed():
                    raise ProtocolError(f"{command} cannot be: here a policy that fails stops the run")

    def _launch(self) -> None:
        instance = self.instances.launch(self.kernel.now)
        self._emit("instance_starting", instance=instance.instance)
        self.kernel.at(self.kernel.now + self.config.launch_s, partial(self._join, instance))

    def _join(self, instance: VirtualInstance) -> None:
        if (self._is_over and self._arrivals) or instance.is_dead:
            return
        self._emit("instance_ready", instance=instance.instance)
        self.instances.joined(instance.instance)
        self._carry_out(self.scheduler.instance_joined(instance.instance, self.kernel.now))
        instance.report()

    def _stop(self, instance: InstanceId) -> None:
        self._emit("instance_stopped", instance=instance)
        self.instances.stop(instance, self.kernel.now)
        self._carry_out(self.scheduler.instance_lost(instance, self.kernel.now))

    def _kill(self, instance: InstanceId) -> None:
        if self._is_over or not self._losses.can_die(instance):
            return
        self._collect_snapshots(self.kernel.now)
        self._emit("instance_lost", instance=instance)
        self._losses.kill(instance, self.records.values())

    def _place(self, record: Record, instance: InstanceId) -> None:
        arrival = record.arrival
        self._emit(
            "dispatch",
            request=record.request_id,
            instance=instance,
            arrival_s=arrival.arrival_s,
            prompt_tokens=arrival.prompt_tokens,
            max_tokens=self._requests.max_tokens(arrival),
            priority=arrival.priority,
            **known(ttft_target_s=arrival.ttft_target_s),
        )
        if record in self._losses:
            self._losses.place(record, instance)
            return
        record.dispatch_s, record.instance = self.kernel.now, instance
        self.instances[instance].add(self._requests.sequence(record.request_id, arrival))

    def _move(self, move: Move) -> None:
        record, now = self.records[move.request_id], self.kernel.now
        if record.finish_s >= 0 or record.instance != move.source:
            return
        if self.migrations.move(record, move.destination, move.mode, move.reason):
            self._carry_out(self.scheduler.migration_started(move.request_id, move.source, move.destination, now))

    # ------------------------------------------------------------------ what instances say

    def _on_step(self, instance: InstanceId, heard: list[FastSequence], ended: list[FastSequence]) -> None:
        now = self.kernel.now
        for sequence in heard:
            self.records[sequence.request_id].heard(now)
        for sequence in ended:
            record = self.records[sequence.request_id]
            record.finish_s, record.num_output = now, sequence.num_output
            self._carry_out(self.scheduler.ended(record.request_id, now))
            self._emit(
                "finish",
                request=record.request_id,
                instance=instance,
                how="length",
                num_output_tokens=sequence.num_output,
            )
            self._ended(record)
            self.migrations.finished(record.request_id)

    def _ended(self, record: Record) -> None:
        self._losses.ended(record)
        self._num_ended += 1
        self._end_s = self.kernel.now
        if self._on_progress is not None and self._num_ended % 256 == 0:
            self._on_progress(self._num_ended)

    def _on_preempted(self, victims: list[FastSequence]) -> None:
        for victim in victims:
            record = self.records[victim.request_id]
            record.num_preemptions += 1
            if record.preempted_s < 0:
                record.preempted_s = self.kernel.now
            self._emit("preempt", request=record.request_id, instance=record.instance)

    @property
    def _is_over(self) -> bool:
        return self._num_ended == len(self._arrivals)

    # ------------------------------------------------------------------ load

    def _collect_snapshots(self, before_s: float, but: VirtualInstance | None = None) -> None:
        """Deliver what was pushed before then. Only here, since only decisions look at snapshots."""
        for instance in self.instances.present() if self._looks else ():
            if instance is not but:
                self._collect_snapshot(instance, before_s)

    def _collect_snapshot(self, instance: VirtualInstance, before_s: float) -> None:
        instance.settle_snapshots(before_s)
        if instance.due is not None and instance.due.time_s <= before_s:
            due, instance.due = instance.due, None
            self._carry_out(self.scheduler.snapshot(due, self.kernel.now))

    def _on_pushed(self, instance: InstanceId) -> None:
        """Somebody waits for what the snapshot may show: it is heard of as soon as it can be, after the others'."""
        if self.scheduler.num_queued:
            self.kernel.at(self.kernel.now + self.config.network.latency_s, partial(self._hear, instance))

    def _hear(self, instance: InstanceId) -> None:
        last, now = self.instances[instance], self.kernel.now
        self._collect_snapshots(now - self.config.network.latency_s, but=last)
        self._collect_snapshot(last, now)

    def _tick(self) -> None:
        if self._is_over:
            return
        interval_s = self.scheduler.config.interval_s
        assert interval_s is not None
        self.kernel.at(self.kernel.now + interval_s, self._tick)
        self._collect_snapshots(self.kernel.now)
        self._carry_out(self.scheduler.tick(self.kernel.now))

    def _on_migration_end(self, record: Record, report: MoveReport) -> None:
        self._collect_snapshots(self.kernel.now)
        if report.source is None:
            self._losses.attempted(record, report)
        else:
            self._carry_out(self.scheduler.migration_ended(record.request_id, self.kernel.now, ok=report.ok))
            record.num_moves += report.ok
        self.moves.append(report)
        if self._events is not None:
            names = [name for name in MoveReport.__slots__ if name not in ("stages", "started_s")]
            self._emit("migration", **{n: getattr(report, n) for n in names}, num_stages=len(report.stages))

    def _sample(self) -> None:
        if self._is_over:
            return
        self.kernel.at(self.kernel.now + self.config.sample_s, self._sample)
        self.samples.append(take_sample(list(self.instances.present()), self.scheduler.num_queued, self.kernel.now))

    def _emit(self, event: str, **fields: Any) -> None:
        if self._events is not None:
            self._events.emit(event, **fields)

    def check_integrity(self) -> None:
        """Raise ProtocolError if the books of an instance contradict themselves; when nothing is left to happen."""
        for instance in self.instances:
            check_integrity(instance.engine)
            instance.llumlet.check_integrity()
