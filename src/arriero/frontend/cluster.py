"""The cluster: requests in, tokens out, and in between they may run anywhere.

Composition only: the scheduler decides (core/scheduler.py), the protocol machine moves requests
(core/migration.py through migrations.py), the links carry bytes (links.py), the launcher has the
processes (instances.py). Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from arriero.core.commands import Command
from arriero.core.config import HistoryConfig, MigrationConfig, RecoveryConfig, SchedulerConfig
from arriero.core.errors import ConfigError, ConflictError, ProtocolError
from arriero.core.pace import StepPace
from arriero.core.types import InstanceId, InstanceSnapshot, MigrationMode, RequestId
from arriero.frontend.describe import describe_instances, describe_requests
from arriero.frontend.drains import DrainReport, Drains
from arriero.frontend.explain import explain
from arriero.frontend.instances import Instance, Instances, MakeSpec, Progress
from arriero.frontend.intake import Intake
from arriero.frontend.joining import Membership
from arriero.frontend.lifecycle import Lifecycle
from arriero.frontend.links import InstanceLinks
from arriero.frontend.migrations import MigrationReport, MigrationRunner
from arriero.frontend.moves import Moves
from arriero.frontend.orders import Orders
from arriero.frontend.replays import Replays
from arriero.frontend.requests import LiveRequest, RequestTable
from arriero.frontend.rolling import Rollout
from arriero.frontend.shutdown import Shutdown
from arriero.launch.port import Launcher
from arriero.observe.decisions import make_scheduler
from arriero.observe.events import EventLog
from arriero.observe.histories import Histories
from arriero.observe.metrics import Metrics

logger = logging.getLogger(__name__)


def _no_new_flags(flags: Sequence[str]) -> MakeSpec:
    raise ConfigError(f"flags {' '.join(flags)}: instances of this cluster take none")


class Cluster:
    """What a front end needs of its instances."""

    def __init__(
        self,
        *,
        links: InstanceLinks,
        launcher: Launcher,
        make_spec: MakeSpec,
        scheduler: SchedulerConfig,
        migration: MigrationConfig,
        recovery: RecoveryConfig,
        history: HistoryConfig = HistoryConfig(),  # noqa: B008 - frozen
        deliver: Callable[[Any], None] = lambda outputs: None,
        progress: Progress = lambda line: None,
        max_surge: Callable[[], int] = lambda: 1,
        respec: Callable[[Sequence[str]], MakeSpec] = _no_new_flags,
        events: EventLog | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.respec = respec  #: how instances are launched with flags added; raises ConfigError
        self.events = events or EventLog(clock)
        self.histories = Histories(history)
        self.events.listen(self.histories.add)
        self.scheduler = make_scheduler(scheduler, self.events)
        self._orders = Orders(self)
        self.requests = RequestTable()
        self.pace = StepPace()
        self.metrics = metrics or Metrics()
        self.deliver = deliver
        self.fail: Callable[[LiveRequest, str], bool] = lambda request, reason: False
        """May tell a client by itself that its request is lost; False: outputs that end it with an error shall."""
        self.links = links
        self.membership = Membership()
        self.instances = Instances(
            launcher,
            make_spec,
            refusal=self.membership.refusal,
            on_joined=self._joined,
            on_lost=self._lost,
            on_left=self._left,
            on_drain_asked=self._drain_asked,
            progress=progress,
        )
        self.lifecycle = Lifecycle(
            recovery, instances=self.instances, links=links, clock=clock, spawn=self.spawn, progress=progress
        )
        self.moves = Moves(
            requests=self.requests,
            instances=self.instances,
            scheduler=self.scheduler,
            carry_out=self._orders.carry_out,
            events=self.events,
            metrics=self.metrics,
            clock=clock,
        )
        self.migrations = self.moves.migrations = MigrationRunner(
            links=links,
            config=migration,
            pace=self.pace,
            clock=clock,
            on_end=self.moves.ended,
            on_replay=self._replay,
        )
        self.replays = Replays(
            recovery,
            instances=self.instances,
            links=links,
            migrations=self.migrations,
            arrive=lambda facts: self._orders.carry_out(self.scheduler.arrived(facts, self.clock())),
            withdraw=lambda request_id: self._orders.carry_out(self.scheduler.ended(request_id, self.clock())),
            lose=self.lose,
            spawn=self.spawn,
        )
        self.drains = Drains(
            scheduler.drain,
            instances=self.instances,
            links=links,
            scheduler=self.scheduler,
            carry_out=self._orders.carry_out,
            num_requests=lambda instance: len(self.requests.routed_to(instance)),
            on_started=lambda report: self.events.emit("drain_started", **report.as_dict()),
            on_ended=self._drain_ended,
            clock=clock,
            spawn=self.spawn,
        )
        self.rollout = Rollout(
            instances=self.instances,
            drains=self.drains,
            restarts=self.lifecycle.restarts,
            max_surge=max_surge,
            clock=clock,
        )
        self.shutdown = Shutdown(self.requests, self.lose, progress)
        self.intake = Intake(
            requests=self.requests,
            scheduler=self.scheduler,
            orders=self._orders,
            shutdown=self.shutdown,
            events=self.events,
            metrics=self.metrics,
            clock=clock,
            end=self.end,
            abort=self.abort,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ life

    async def start(self, num_instances: int) -> list[Instance]:
        """Start instances in parallel and wait until all serve. Raises LaunchError if one fails."""
        self.links.start(self)
        futures: list[asyncio.Future[Instance]] = []
        try:
            for _ in range(num_instances):
                futures.append(self.instances.launch())
            started = await asyncio.gather(*futures)
        except BaseException:
            for future in futures:
                future.cancel()
            self.close(0.0)
            raise
        interval_s = self.scheduler.config.interval_s
        if interval_s is not None:
            self.spawn(self._tick_forever(interval_s))
        self.spawn(self.lifecycle.watch_forever())
        return started

    def close(self, timeout_s: float) -> None:
        """End every instance. Blocking, safe from any thread, idempotent."""
        self.instances.close(timeout_s)
        for task in list(self._tasks):  # the loop's thread drops those that end
            task.get_loop().call_soon_threadsafe(task.cancel)

    def close_sockets(self) -> None:
        """Close what belongs to the event loop; after :meth:`close`, on the loop's thread."""
        self.migrations.close()
        self.drains.close()
        self.links.close()
        self.events.close()

    def now(self) -> float:
        """The front end's clock."""
        return self.clock()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it until it ends, or the cluster is closed."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ requests

    def abort(self, request_ids: Sequence[RequestId]) -> None:
        """The clients are gone; unknown ids are ignored."""
        for request_id in request_ids:
            request = self.end(request_id, "aborted")
            if request is not None:
                self._abort_where_it_runs(request)

    def _abort_where_it_runs(self, request: LiveRequest) -> None:
        if self.migrations.client_gone(request.request_id) or request.route is None:
            return
        if not self.instances.is_dead(request.route):
            self.links.abort(request.route, [request.request_id])

    def end(self, request_id: RequestId, how: str) -> LiveRequest | None:
        """The care for a request ends; ``how``: for the event log."""
        request = self.requests.pop(request_id)
        if request is not None:
            self._orders.carry_out(self.scheduler.ended(request_id, self.clock()))
            self.replays.ended(request_id)
            self.moves.forget(request_id)
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
        self.lifecycle.watchdog.heard(snapshot.instance)
        self.instances.on_snapshot(snapshot.instance)
        self.pace.clock_read(snapshot.instance, snapshot.time_s, self.clock())
        for victim in self.scheduler.preempted_in(snapshot):
            self.events.emit(
                "preempt",
                request=victim.request_id,
                instance=snapshot.instance,
                avoidable=victim.avoidable,
                smallest_blocks=victim.smallest_blocks,
                roomiest=victim.roomiest,
                free_blocks=victim.free_blocks,
            )
        self._orders.carry_out(self.scheduler.snapshot(snapshot, self.clock()))

    def on_outputs(self, outputs: Any) -> None:
        """Log tokens, drop what does not come from a request's route, pass the rest on."""
        instance, now = outputs.engine_index, self.clock()
        if outputs.outputs:
            self.pace.step_ended(instance, now)
            self.lifecycle.watchdog.heard(instance)
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
                    self.moves.went_on(request, now)
                elif not request.last_token_s:
                    ttft_s = now - request.arrived_s
                    self.events.emit("first_token", request=request.request_id, instance=instance, ttft_s=ttft_s)
                    self.metrics.first_token(ttft_s, request.facts.ttft_target_s)
                request.last_token_s = now
                self.replays.produced(request.request_id, len(output.new_token_ids))
            if output.finish_reason is not None:
                finished.append((output.request_id, str(output.finish_reason)))
        if stale:
            outputs.outputs = [o for o in outputs.outputs if self._is_current(o.request_id, instance)]
        for request_id, how in finished:
            self.end(request_id, how)
            self.migrations.finished(request_id)
        if self.migrations.any_moving:
            self.migrations.tokens_came([o.request_id for o in outputs.outputs if o.new_token_ids])
        self.deliver(outputs)

    def _is_current(self, request_id: RequestId, instance: InstanceId) -> bool:
        request = self.requests.get(request_id)
        return request is not None and request.route == instance

    def _joined(self, instance: Instance) -> None:
        joined = instance.instance_id
        self.events.emit("instance_ready", instance=joined, replaces=instance.replaces)
        self.lifecycle.watchdog.watch(joined)
        self._orders.carry_out(self.scheduler.instance_joined(joined, self.clock()))

    def _left(self, instance: Instance) -> None:
        """An instance has ended in order."""
        self.events.emit("instance_left", instance=instance.instance_id)
        self._orders.carry_out(self._forget_instance(instance.instance_id))
        self.drains.gone(instance)

    def _lost(self, instance: Instance, returncode: int) -> None:
        """An instance died: what ran there goes on elsewhere, from the token log."""
        lost = instance.instance_id
        self.events.emit("instance_lost", instance=lost, returncode=returncode)
        routed = self.requests.routed_to(lost)
        last_seen = self.scheduler.snapshot_of(lost)
        given_up = self.replays.instance_lost(routed, last_seen, from_outside=instance.died_from_outside)
        orphans = [r for r in routed if not self.migrations.is_moving(r.request_id)]
        commands = self._forget_instance(lost)
        for request in given_up:
            self.lose(request, "it has killed every instance that it ran on, the last time with no other to blame")
        for request in orphans:
            if request.route == lost and not self.migrations.is_moving(request.request_id):
                self._replay(request)
        self._orders.carry_out(commands)
        if not self.drains.gone(instance):
            self.lifecycle.lost(instance)

    def _forget_instance(self, instance: InstanceId) -> list[Command]:
        commands = self.scheduler.instance_lost(instance, self.clock())
        self.pace.forget(instance)
        self.lifecycle.watchdog.forget(instance)
        self.migrations.instance_lost(instance)
        self.links.instance_lost(instance)
        return commands

    def _drain_asked(self, instance: InstanceId) -> None:
        """An operator has sent SIGTERM to an instance."""
        try:
            self.drains.start(instance, cause="SIGTERM")
        except ConflictError as error:
            logger.error("instance %d was told to end, and is not drained: %s", instance, error)

    def _drain_ended(self, report: DrainReport) -> None:
        self.metrics.drain_seconds.observe(report.total_s)
        self.events.emit("drain_ended", **report.as_dict())

    async def _tick_forever(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            self._orders.carry_out(self.scheduler.tick(self.clock()))

    # ------------------------------------------------------------------ moving

    async def migrate(
        self, request_id: RequestId, destination: InstanceId, mode: MigrationMode = MigrationMode.LIVE
    ) -> MigrationReport:
        """Move a live request and wait for the outcome.

        Raises NotFoundError, ConflictError or UnmovableError if it can't be tried; a migration that was
        tried and given up is a report with ``ok`` false: the request runs on where it was.
        """
        return await self.moves.start(self.requests.find(request_id)[0], destination, mode, "on demand")

    async def migrate_all(
        self, name: str, destination: InstanceId, mode: MigrationMode = MigrationMode.LIVE
    ) -> list[MigrationReport]:
        """Move every sequence of the request called ``name`` that is not there yet."""
        found = self.requests.find(name)
        moving = [r for r in found if r.route != destination] or found
        return await asyncio.gather(*[self.moves.start(r, destination, mode, "on demand") for r in moving])

    def _replay(self, request: LiveRequest) -> None:
        if self.requests.get(request.request_id) is request:
            self.replays.replay(request)

    def lose(self, request: LiveRequest, reason: str) -> None:
        """Nothing more can be done for a request: its client gets an error."""
        request_id = request.request_id
        if self.end(request_id, "lost") is None:
            return
        logger.error("request %s is lost: %s", request_id, reason)
        self._abort_where_it_runs(request)
        if not self.fail(request, reason):
            self.deliver(self.links.codec.error_outputs(request.route or 0, [request_id]))

    # ------------------------------------------------------------------ what a user sees

    def describe_instances(self) -> list[dict[str, Any]]:
        """For ``GET /instances``."""
        return describe_instances(self.instances, self.scheduler)

    def describe_requests(self) -> list[dict[str, Any]]:
        """For ``GET /requests``."""
        return describe_requests(self.requests, self.instances, self.scheduler, self.migrations, self.clock())

    def explain(self, name: str) -> list[dict[str, Any]]:
        """For ``GET /requests/{id}/explain``. Raises NotFoundError or ConflictError."""
        return explain(name, self.histories, self.requests, self.scheduler)

    def check_integrity(self) -> None:
        """Raise ProtocolError if a request is routed to an instance that is not there."""
        for request in self.requests:
            route, request_id = request.route, request.request_id
            if route is None or self.migrations.is_moving(request_id) or request_id in self.replays:
                continue
            if self.instances.is_dead(route) or not self.instances[route].serves:
                raise ProtocolError(f"request {request_id} is routed to instance {route}, which does not serve")
