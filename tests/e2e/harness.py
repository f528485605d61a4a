"""A cluster of simulated instances in processes of their own, behind the real front end: no vLLM, no model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from arriero.core.config import (
    DrainConfig,
    MigrationConfig,
    QueueingConfig,
    RebalancingConfig,
    RecoveryConfig,
    ScalingConfig,
)
from arriero.core.dispatch import ClusterView, MaxFreeness
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, MigrationMode
from arriero.observe.events import EventLog
from arriero.sim.faults import Operation, Pass
from arriero.sim.fleet import DRAIN, HELD, MIGRATION, RECOVERY, WAIT_S, Stream, is_running, prompt, socket_folder
from arriero.sim.fleet import Fleet as SimFleet

__all__ = [
    "HELD",
    "LIVE",
    "PLACED",
    "RECOMPUTE",
    "STOP",
    "WAIT_S",
    "Fleet",
    "Operation",
    "Pass",
    "Stream",
    "fleet_of",
    "is_running",
    "prompt",
]

LIVE, STOP, RECOMPUTE = MigrationMode.LIVE, MigrationMode.STOP_AND_COPY, MigrationMode.RECOMPUTE


class Placed:
    """A user's own policy: a request called ``name@2`` goes to instance 2 if that is ready; others by freeness."""

    def __init__(self) -> None:
        self._otherwise = MaxFreeness()

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """See :class:`~arriero.core.dispatch.DispatchPolicy`."""
        _, _, place = request.request_id.partition("@")
        if place and int(place) in view.candidates:
            return int(place)
        return self._otherwise.choose(request, view)


PLACED = f"{__name__}.{Placed.__name__}"


class Fleet(SimFleet):
    """A fleet whose laws are asserted."""

    def close(self) -> None:
        """End everything; check that it left nothing."""
        assert self.end() == []

    async def shown(self, instance: InstanceId, condition: Callable[[InstanceSnapshot], Any]) -> InstanceSnapshot:
        """Wait for a snapshot of ``instance`` that fulfils ``condition``."""

        def latest() -> InstanceSnapshot | None:
            return self.cluster.scheduler.snapshot_of(instance)

        await self.until(lambda: (snapshot := latest()) is not None and condition(snapshot))
        found = latest()
        assert found is not None
        return found

    async def ledger_agrees(self) -> None:
        """Once nothing moves, the dispatcher counts every request where it runs."""
        cluster = self.cluster
        await self.until(
            lambda: all(
                r.route in self.ready and not cluster.migrations.is_moving(r.request_id) for r in cluster.requests
            )
        )
        routes = [r.route for r in cluster.requests]
        counted = {i: cluster.scheduler.ledger.num_outstanding(i) for i in self.ready}
        assert counted == {i: routes.count(i) for i in self.ready}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind."""
        return [e for e in self.cluster.events.recent(100_000) if e["event"] == kind]

    async def assert_clean(self) -> None:
        """Every stream was exact, and nothing is held anywhere; then forget the streams."""
        await self.ended()
        assert [fault for s in self.streams.values() if s.finish != "error" and (fault := s.fault())] == []
        assert self.wrong == []
        assert self._errors.messages == []
        assert await self.still_held() == []
        self.forget()

    def expect_errors(self, *parts: str) -> None:
        """These were logged, in this order, and rightly so."""
        messages, self._errors.messages = self._errors.messages, []
        assert len(messages) == len(parts), messages
        for message, part in zip(messages, parts, strict=True):
            assert part in message

    def expect_deaths(self) -> None:
        """Every error was the death of an instance."""
        assert self.errors() == []


@contextlib.asynccontextmanager
async def fleet_of(
    num_instances: int,
    *,
    policy: str = PLACED,
    engine: dict[str, Any] | None = None,
    engine_of: dict[InstanceId, dict[str, Any]] | None = None,
    migration: MigrationConfig = MIGRATION,
    rebalancing: RebalancingConfig | None = None,
    queueing: QueueingConfig | None = None,
    scaling: ScalingConfig | None = None,
    recovery: RecoveryConfig = RECOVERY,
    drain: DrainConfig = DRAIN,
    events: EventLog | None = None,
) -> AsyncIterator[Fleet]:
    """Running instances; everything is ended at exit."""
    with socket_folder() as folder:
        fleet = Fleet(
            folder,
            policy=policy,
            engine=engine or {},
            migration=migration,
            rebalancing=rebalancing,
            queueing=queueing,
            scaling=scaling,
            recovery=recovery,
            drain=drain,
            events=events,
        )
        fleet.engine_of = engine_of or {}
        try:
            async with asyncio.timeout(WAIT_S):
                await fleet.cluster.start(num_instances)
            yield fleet
        finally:
            fleet.close()
