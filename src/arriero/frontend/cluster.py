"""The cluster: requests in, tokens out, and in between they may run anywhere.

Composition only: the scheduler decides (core/scheduler.py), the protocol machine moves requests
(core/migration.py through migrations.py), the links carry bytes (links.py), the launcher has the
processes (instances.py). Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from arriero.core.commands import Command, Dispatch, Drain, Launch, Move, PolicyFailed, Reject, RejectKind, Stop
from arriero.core.config import MigrationConfig, SchedulerConfig
from arriero.core.errors import ArrieroError, ConfigError, ConflictError, ProtocolError, UnavailableError
from arriero.core.pace import StepPace
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import (
    Dispatchable,
    InstanceId,
    InstanceSnapshot,
    InstanceState,
    MigrationMode,
    Phase,
    RequestId,
)
from arriero.frontend.instances import Instance, Instances, Progress
from arriero.frontend.links import InstanceLinks
from arriero.frontend.migrations import MigrationReport, MigrationRunner
from arriero.frontend.requests import LiveRequest, RequestTable
from arriero.launch.port import Launcher, LaunchSpec
from arriero.observe.events import EventLog
from arriero.observe.metrics import Metrics

logger = logging.getLogger(__name__)

LOAD_FIELDS = (
    "running",
    "waiting",
    "blocks_used",
    "blocks_total",
    "block_size",
    "preemptions",
    "incoming",
    "freeness",
)
REPLAY_RETRY_S = 0.25
REPLAY_DEADLINE_S = 60.0


class Cluster:
    """What a front end needs of its instances."""

    def __init__(
        self,
        *,
        links: InstanceLinks,
        launcher: Launcher,
        make_spec: Callable[[InstanceId], LaunchSpec],
        scheduler: SchedulerConfig,
        migration: MigrationConfig,
        deliver: Callable[[Any], None] = lambda outputs: None,
        progress: Progress = lambda line: None,
        events: EventLog | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.scheduler = GlobalScheduler(scheduler)
        self.requests = RequestTable()
        self.pace = StepPace()
        self.events = events or EventLog(clock)
        self.metrics = metrics or Metrics()
        self.deliver = deliver
        self.links = links
        self.instances = Instances(launcher, on_joined=self._joined, on_lost=self._lost, progress=progress)
        self.migrations = MigrationRunner(
            links=links,
            config=migration,
            pace=self.pace,
            clock=clock,
            on_end=self._migration_ended,
            on_replay=self._replay,
        )
        self._make_spec = make_spec
        self._tasks: set[asyncio.Task[None]] = set()
        self._pauses: dict[RequestId, MigrationReport] = {}
        self._failed_policies: set[str] = set()
        self._replaying: dict[RequestId, float] = {}  # until when

    # ------------------------------------------------------------------ life

    async def start(self, num_instances: int) -> list[Instance]:
        """Start instances in parallel and wait until all serve. Raises LaunchError if one fails."""
        self.links.start(self)
        futures = [self.instances.launch(self._make_spec) for _ in range(num_instances)]
        try:
            started = await asyncio.gather(*futures)
        except BaseException:
            for future in futures:
                future.cancel()
            self.close(0.0)
            raise
        interval_s = self.scheduler.config.interval_s
        if interval_s is not None:
            self._spawn(self._tick_forever(interval_s))
        return started

    def close(self, timeout_s: float) -> None:
        """End every instance. Blocking, safe from any thread, idempotent."""
        self.instances.close(timeout_s)
        for task in self._tasks:
            task.get_loop().call_soon_threadsafe(task.cancel)

    def close_sockets(self) -> None:
        """Close what belongs to the event loop; after :meth:`close`, on the loop's thread."""
        self.migrations.close()
        self.links.close()
        self.events.close()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ requests

    def submit(self, message: Any, facts: Dispatchable, external_id: str) -> None:
        """Take a new request; it is dispatched now or later. Raises UnavailableError if no instance is ready, and
        ConfigError if none could ever run it.
        """
        started = self.clock()
        self.requests.add(LiveRequest(facts, message, None, external_id, started))
        commands = self.scheduler.arrived(facts, started)
        refused = next((c for c in commands if isinstance(c, Reject) and c.request_id == facts.request_id), None)
        if refused is not None:
            commands.remove(refused)
            self._end_request(facts.request_id, refused.kind.value)
        self._carry_out(commands)
        self.metrics.dispatch_seconds.observe(self.clock() - started)
        if refused is not None:
            raise (ConfigError if refused.kind is RejectKind.IMPOSSIBLE else UnavailableError)(refused.reason)

    def abort(self, request_ids: Sequence[RequestId]) -> None:
        """The clients are gone; unknown ids are ignored."""
        by_instance: dict[InstanceId, list[RequestId]] = {}
        for request_id in request_ids:
            request = self._end_request(request_id, "aborted")
            if request is None or self.migrations.client_gone(request_id):
                continue
            if request.route is not None:
                by_instance.setdefault(request.route, []).append(request_id)
        for instance, ids in by_instance.items():
            if self.instances[instance].state is not InstanceState.DEAD:
                self.links.abort(instance, ids)

    def _end_request(self, request_id: RequestId, how: str) -> LiveRequest | None:
        request = self.requests.pop(request_id)
        if request is not None:
            self._carry_out(self.scheduler.ended(request_id, self.clock()))
            self._pauses.pop(request_id, None)
            self.events.emit(
                "finish", request=request_id, instance=request.route, how=how, num_output_tokens=len(request.tokens)
            )
        return request

    # ------------------------------------------------------------------ what instances say

    def on_ready(self, instance: InstanceId, payload: bytes) -> None:
        """From the links."""
        self.instances.on_ready(instance, payload)

    def on_snapshot(self, snapshot: InstanceSnapshot) -> None:
        """From the links."""
        self.instances.on_snapshot(snapshot.instance)
        self.pace.clock_read(snapshot.instance, snapshot.time_s, self.clock())
        self._carry_out(self.scheduler.snapshot(snapshot, self.clock()))

    def on_outputs(self, outputs: Any) -> None:
        """Log tokens, drop what does not come from a request's route, pass the rest on."""
        instance, now = outputs.engine_index, self.clock()
        if outputs.outputs:
            self.pace.step_ended(instance, now)
        stale = False
        finished: list[tuple[RequestId, str]] = []
        for output in outputs.outputs:
            request = self.requests.get(output.request_id)
            if request is None or request.route != instance:
                stale = True
                continue
            if output.new_token_ids:
                request.tokens.extend(output.new_token_ids)
                if request.pause_since_s is not None:
                    self._moved_on(request, now)
                request.last_token_s = now
            if output.finish_reason is not None:
                finished.append((output.request_id, str(output.finish_reason)))
        if stale:
            outputs.outputs = [o for o in outputs.outputs if self._is_current(o.request_id, instance)]
        for request_id, how in finished:
            self._end_request(request_id, how)
            self.migrations.finished(request_id)
        if self.migrations.any_moving:
            self.migrations.tokens_came([o.request_id for o in outputs.outputs if o.new_token_ids])
        self.deliver(outputs)

    def _is_current(self, request_id: RequestId, instance: InstanceId) -> bool:
        request = self.requests.get(request_id)
        return request is not None and request.route == instance

    def _moved_on(self, request: LiveRequest, now: float) -> None:
        """The first token after a move: the client-visible pause is known."""
        assert request.pause_since_s is not None
        pause, request.pause_since_s = now - request.pause_since_s, None
        request.paused_s += pause
        report = self._pauses.pop(request.request_id, None)
        if report is not None:
            report.pause_s = pause
            self.metrics.migration_pause_seconds.observe(pause)

    def _joined(self, instance: Instance) -> None:
        self.events.emit("instance_ready", instance=instance.instance_id)
        self._carry_out(self.scheduler.instance_joined(instance.instance_id, self.clock()))

    def _lost(self, instance: Instance, returncode: int) -> None:
        """An instance died: what ran there goes on elsewhere, from the token log."""
        lost = instance.instance_id
        self.events.emit("instance_lost", instance=lost, returncode=returncode)
        commands = self.scheduler.instance_lost(lost, self.clock())
        self.pace.forget(lost)
        orphans = [r for r in self.requests.routed_to(lost) if not self.migrations.is_moving(r.request_id)]
        self.migrations.instance_lost(lost)
        self.links.instance_lost(lost)
        for request in orphans:
            if request.route == lost and not self.migrations.is_moving(request.request_id):
                self._replay(request)
        self._carry_out(commands)

    # ------------------------------------------------------------------ what the scheduler wants

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Dispatch():
                    self._place(command)
                case Move():
                    self._move(command)
                case Reject():
                    self._reject(command)
                case PolicyFailed(policy=policy, error=error):
                    self.metrics.policy_failures.labels(policy).inc()
                    if policy not in self._failed_policies:
                        self._failed_policies.add(policy)
                        logger.warning("policy %s %s; the freest instance is taken instead (said once)", policy, error)
                case Launch() | Drain() | Stop():
                    self.events.emit("advice", command=type(command).__name__.lower(), detail=str(command))

    def _place(self, command: Dispatch) -> None:
        request = self.requests.get(command.request_id)
        if request is None:
            return
        self.events.emit(
            "dispatch",
            request=command.request_id,
            instance=command.instance,
            reason=command.reason,
            arrival_s=request.arrived_s,
            prompt_tokens=request.facts.num_prompt_tokens,
            max_tokens=request.facts.max_tokens,
            priority=request.facts.priority,
        )
        if command.request_id in self._replaying:
            self._spawn(self._replay_at(request, command.instance))
        else:
            request.route = command.instance
            self.links.add(command.instance, request.message)

    def _move(self, command: Move) -> None:
        request = self.requests.get(command.request_id)
        if request is not None and request.route == command.source:
            with contextlib.suppress(ArrieroError):  # something has happened to it meanwhile
                self._start_migration(request, command.destination, MigrationMode.LIVE, command.reason)

    def _reject(self, command: Reject) -> None:
        """The request was taken, so its client hears of it as of any end."""
        request = self.requests.get(command.request_id)
        if request is None:
            return
        if command.request_id in self._replaying and command.kind is RejectKind.UNAVAILABLE:
            self._spawn(self._replay_later(request))
        else:
            self._lose(request, command.reason)

    async def _tick_forever(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            self._carry_out(self.scheduler.tick(self.clock()))

    # ------------------------------------------------------------------ moving

    async def migrate(
        self, request_id: RequestId, destination: InstanceId, mode: MigrationMode = MigrationMode.LIVE
    ) -> MigrationReport:
        """Move a live request and wait for the outcome.

        Raises NotFoundError, ConflictError or UnmovableError if it can't be tried; a migration that was
        tried and given up is a report with ``ok`` false: the request runs on where it was.
        """
        return await self._start_migration(self.requests.find(request_id)[0], destination, mode, "on demand")

    async def migrate_all(
        self, name: str, destination: InstanceId, mode: MigrationMode = MigrationMode.LIVE
    ) -> list[MigrationReport]:
        """Move every sequence of the request called ``name`` that is not there yet."""
        found = self.requests.find(name)
        moving = [r for r in found if r.route != destination] or found
        return await asyncio.gather(*[self._start_migration(r, destination, mode, "on demand") for r in moving])

    def _start_migration(
        self, request: LiveRequest, destination: InstanceId, mode: MigrationMode, cause: str
    ) -> asyncio.Future[MigrationReport]:
        target = self.instances[destination]
        if target.state is not InstanceState.READY:
            raise ConflictError(f"instance {destination} is {target.state}, not ready: nothing can move there")
        if request.route == destination:
            raise ConflictError(f"request {request.request_id} runs on instance {destination} already")
        source = request.route
        if source is None:
            raise ConflictError(f"request {request.request_id} waits for an instance: there is nothing to move yet")
        if self.instances[source].state is InstanceState.DEAD:
            raise ConflictError(
                f"request {request.request_id} was on instance {source}, which died: it waits for a replay"
            )
        future = self.migrations.start(request, destination, mode=mode, cause=cause, source=source)
        self._carry_out(self.scheduler.migration_started(request.request_id, source, destination, self.clock()))
        return future

    def _migration_ended(self, request: LiveRequest, report: MigrationReport) -> None:
        if report.source is not None:
            self._carry_out(self.scheduler.migration_ended(report.request_id, self.clock(), ok=report.ok))
        else:
            self._replay_ended(request, report)
        if report.ok and self.requests.get(report.request_id) is request:
            request.num_moves += 1
            request.pause_since_s = request.last_token_s or None
            self._pauses[report.request_id] = report
        self.metrics.migration_ended(report.ok, report.reason, report.num_bytes, replay=report.source is None)
        self.events.emit("migration", **_flat(report))

    # ------------------------------------------------------------------ replay

    def _replay(self, request: LiveRequest) -> None:
        """Continue a request whose KV cache is lost: prompt and delivered tokens are prefilled again.

        One attempt at a time, however many of them fail: two would run the request twice.
        """
        request_id = request.request_id
        if self.requests.get(request_id) is request and request_id not in self._replaying:
            self._replaying[request_id] = self.clock() + REPLAY_DEADLINE_S
            self._ask_for_replay(request)

    def _ask_for_replay(self, request: LiveRequest) -> None:
        facts, done = request.facts, len(request.tokens)
        arrives = replace(
            facts,
            num_prompt_tokens=facts.num_prompt_tokens + done,
            max_tokens=max(1, facts.max_tokens - done),
            is_replay=True,
        )
        self._carry_out(self.scheduler.arrived(arrives, self.clock()))

    async def _replay_at(self, request: LiveRequest, destination: InstanceId) -> None:
        """See the request through to running again."""
        ok = False
        with contextlib.suppress(ArrieroError):
            report = await self.migrations.start(
                request, destination, mode=MigrationMode.RECOMPUTE, cause="instance lost", source=None
            )
            # Its new instance may have died in the same turn of the loop.
            ok = report.ok and self._route_state(request) is not InstanceState.DEAD
        if ok or self.requests.get(request.request_id) is not request:
            self._replaying.pop(request.request_id, None)
        else:
            self._carry_out(self.scheduler.ended(request.request_id, self.clock()))
            await self._replay_later(request)

    async def _replay_later(self, request: LiveRequest) -> None:
        await asyncio.sleep(REPLAY_RETRY_S)
        if self.requests.get(request.request_id) is not request:
            self._replaying.pop(request.request_id, None)
        elif self.clock() < self._replaying[request.request_id]:
            self._ask_for_replay(request)
        else:
            self._lose(request, f"no instance took it within {REPLAY_DEADLINE_S:.0f} s")

    def _lose(self, request: LiveRequest, reason: str) -> None:
        self._replaying.pop(request.request_id, None)
        if self._end_request(request.request_id, "lost") is not None:
            logger.error("request %s is lost: %s", request.request_id, reason)
            self.deliver(self.links.codec.error_outputs(request.route or 0, [request.request_id]))

    def _route_state(self, request: LiveRequest) -> InstanceState | None:
        return None if request.route is None else self.instances[request.route].state

    def _replay_ended(self, request: LiveRequest, report: MigrationReport) -> None:
        if not report.ok:
            logger.warning("replay of %s at instance %d: %s", report.request_id, report.destination, report.reason)

    # ------------------------------------------------------------------ what a user sees

    def describe_instances(self) -> list[dict[str, Any]]:
        """For ``GET /instances``."""
        return [self._describe(i) for i in self.instances]

    def _describe(self, instance: Instance) -> dict[str, Any]:
        snapshot = self.scheduler.snapshot_of(instance.instance_id)
        load: dict[str, Any] = dict.fromkeys(LOAD_FIELDS)
        if snapshot is not None:
            load = {
                "running": snapshot.num_running,
                "waiting": snapshot.num_waiting,
                "blocks_used": snapshot.num_blocks - snapshot.num_free_blocks,
                "blocks_total": snapshot.num_blocks,
                "block_size": snapshot.block_size,
                "preemptions": snapshot.num_preemptions,
                "incoming": sum(r.phase is Phase.INCOMING for r in snapshot.requests),
                "freeness": _finite(self.scheduler.freeness(instance.instance_id)),
            }
        return {
            "id": instance.instance_id,
            "pid": instance.pid,
            "host": instance.host,
            "state": instance.state.value,
            "stage": instance.stage,
            **load,
        }

    def describe_requests(self) -> list[dict[str, Any]]:
        """For ``GET /requests``."""
        phases = {
            (r.request_id, i.instance_id): r.phase
            for i in self.instances
            if (snapshot := self.scheduler.snapshot_of(i.instance_id)) is not None
            for r in snapshot.requests
        }
        return [
            {
                "id": r.request_id,
                "client_id": r.external_id,
                "instance": r.route,
                "state": "moving" if self.migrations.is_moving(r.request_id) else _phase(phases, r),
                "prompt_tokens": r.facts.num_prompt_tokens,
                "output_tokens": len(r.tokens),
                "priority": r.facts.priority,
                "moves": r.num_moves,
                "paused_ms": round(1e3 * r.paused_s, 3),
                "age_s": round(self.clock() - r.arrived_s, 3),
                "unmovable": r.facts.unmovable,
            }
            for r in self.requests
        ]

    def check_integrity(self) -> None:
        """Raise ProtocolError if a request is routed to an instance that is not there."""
        for request in self.requests:
            state = self._route_state(request)
            if state is InstanceState.DEAD and not self.migrations.is_moving(request.request_id):
                logger.debug("request %s waits for a replay", request.request_id)
            elif state is InstanceState.STARTING:
                raise ProtocolError(f"request {request.request_id} is routed to starting instance {request.route}")


def _finite(freeness: float) -> float | None:
    """JSON has no infinity: a draining instance has no freeness."""
    return round(freeness, 3) if math.isfinite(freeness) else None


def _phase(phases: dict[tuple[RequestId, InstanceId], Phase], request: LiveRequest) -> str:
    if request.route is None:
        return "queued"
    phase = phases.get((request.request_id, request.route))
    return phase.value if phase is not None else ("running" if request.tokens else "waiting")


def _flat(report: MigrationReport) -> dict[str, Any]:
    fields = report.as_dict()
    fields["num_stages"] = len(fields.pop("stages"))
    return {k: v for k, v in fields.items() if k != "pause_s"}
