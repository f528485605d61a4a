"""Everything at once, for a while: submits, moves, aborts, deaths, launches, and operations that get lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

from arriero.core.config import MigrationConfig
from arriero.core.errors import ConflictError, NotFoundError, UnavailableError
from arriero.core.messages import Op
from arriero.core.types import MigrationMode

from .harness import Fleet, Operation, Pass, fleet_of

pytestmark = pytest.mark.asyncio

NUM_OPERATIONS = 300
NUM_INSTANCES = 3
HASTY = MigrationConfig(retry_s=0.1, stage_timeout_s=0.5, lease_s=1.0, timeout_s=5.0)
NEVER_TRIED = (NotFoundError, ConflictError)  # it has ended, is moving, is there, or the destination has died


class Chaos:
    """A seeded sequence of operations on a fleet."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.random = random.Random(seed)
        self.outcomes: dict[str, int] = {}
        self.tasks: list[asyncio.Task[Any]] = []
        fleet.faults.on_send = fleet.faults.on_answer = self.lose_or_repeat

    def lose_or_repeat(self, operation: Operation, go: Pass) -> None:
        """Two of a hundred get lost, two come twice."""
        times = self.random.choices((0, 1, 2), (2, 96, 2))[0]
        for _ in range(times):
            go()

    async def run(self) -> None:
        """All operations, then the ends of all."""
        for _ in range(NUM_OPERATIONS):
            kind = self.random.choices(("submit", "move", "abort", "kill"), (38, 50, 9, 3))[0]
            self.count(kind)
            getattr(self, kind)()
            await asyncio.sleep(self.random.choice((0, 0, 0.002, 0.01)))
        await asyncio.gather(*self.tasks)

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def live(self) -> list[Any]:
        return [s for s in self.fleet.streams.values() if s.finish is None and not s.aborted]

    # ------------------------------------------------------------------ operations

    def submit(self) -> None:
        draw = self.random
        with contextlib.suppress(UnavailableError):
            self.fleet.submit(draw.randint(1, 200), draw.randint(5, 120), seed=draw.choice((None, draw.randint(0, 9))))

    def move(self) -> None:
        if self.live() and self.fleet.ready:
            stream, to = self.random.choice(self.live()), self.random.choice(self.fleet.ready)
            mode = self.random.choice(list(MigrationMode))
            self.tasks.append(asyncio.create_task(self.try_move(stream, to, mode)))

    async def try_move(self, stream: Any, to: int, mode: MigrationMode) -> None:
        try:
            report = await self.fleet.move(stream, to, mode)
        except NEVER_TRIED:
            self.count("move not tried")
        else:
            self.count("move ok" if report.ok else "move given up")

    def abort(self) -> None:
        if self.live():
            self.fleet.abort(self.random.choice(self.live()))

    def kill(self) -> None:
        """One instance dies, or all but one; as many are launched."""
        ready = self.fleet.ready
        victims = ready[1:] if self.random.random() < 0.2 else ready[-1:]
        self.fleet.kill(*victims)
        self.tasks.append(asyncio.create_task(self.fleet.launch(len(victims))))


@pytest.mark.parametrize("seed", [1, 2])
async def test_three_hundred_operations_leave_every_stream_whole_and_nothing_behind(seed: int) -> None:
    engine = {"num_blocks": 192, "max_num_seqs": 24, "time_scale": 0.05, "max_num_batched_tokens": 256}
    async with fleet_of(NUM_INSTANCES, policy="freeness", engine=engine, migration=HASTY) as fleet:
        chaos = Chaos(fleet, seed)
        await chaos.run()
        await fleet.ended()
        await fleet.until(lambda: len(fleet.ready) >= NUM_INSTANCES)
        fleet.expect_deaths()
        counts = chaos.outcomes
        assert counts["move ok"] > 20, counts
        assert counts["kill"] > 3, counts
        assert {s.finish for s in fleet.streams.values()} <= {"length", None}
        assert {op for op, _ in fleet.faults.seen} == set(Op)
        await fleet.assert_clean()
