"""`--rebalance`: streams leave the fuller instance by themselves, nobody notices, and then there is peace."""

from __future__ import annotations

from collections import Counter

import pytest

from arriero.core.commands import Command
from arriero.core.config import RebalancingConfig
from arriero.core.types import InstanceId

from .harness import Fleet

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLEET = {
    "num_instances": 3,
    "engine": {"num_blocks": 256, "time_scale": 0.3, "max_num_seqs": 12},
    # No cooldown: it would hide a request that is wanted back.
    "rebalancing": RebalancingConfig(interval_s=0.01, low_freeness=60, high_freeness=60, cooldown_s=0),
}
ENDLESS = 1500


class Rounds:
    """Counts the rounds of the rebalancer from now on; may hold it back."""

    def __init__(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        self._fleet = fleet
        self.count = 0
        self.held_back = False
        tick = fleet.cluster.scheduler.tick

        def counted(now: float) -> list[Command]:
            self.count += 1
            return [] if self.held_back else tick(now)

        monkeypatch.setattr(fleet.cluster.scheduler, "tick", counted)

    async def pass_by(self, count: int) -> None:
        """Wait for so many more."""
        until = self.count + count
        await self._fleet.until(lambda: self.count >= until)


@pytest.fixture
def rounds(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(fleet, monkeypatch)


def on_each(fleet: Fleet) -> Counter[InstanceId]:
    return Counter(r.route for r in fleet.cluster.requests)


def num_moves(fleet: Fleet) -> int:
    return len([e for e in fleet.events("migration") if e["ok"]])


def returned(fleet: Fleet) -> list[str]:
    """Requests that were moved back to an instance that they had left."""
    left: dict[str, set[InstanceId]] = {}
    back = []
    for event in fleet.events("migration"):
        if event["ok"]:
            if event["destination"] in left.setdefault(event["request_id"], set()):
                back.append(event["request_id"])
            left[event["request_id"]].add(event["source"])
    return back


async def rest(fleet: Fleet, rounds: Rounds) -> None:
    """Wait until 20 rounds have brought no move."""
    before = -1
    while before != num_moves(fleet):
        before = num_moves(fleet)
        await rounds.pass_by(20)


async def test_a_steady_balanced_load_stays_where_it_is(fleet: Fleet, rounds: Rounds) -> None:
    """With queries that come and go, while freeness sinks past both thresholds: nobody of it is even tried to be moved.

    Each is far larger than what instances drift apart on a busy machine.
    """
    steady = [fleet.submit(400 + 9 * (i // 3), ENDLESS, at=i % 3, seed=i) for i in range(6)]
    await fleet.at_least(1, *steady)
    for _ in range(4):
        short = [fleet.submit(30, 10, at=i) for i in range(3)]
        await rounds.pass_by(20)
        await fleet.ended(*short)
    assert {s.id for s in steady}.isdisjoint(e["request_id"] for e in fleet.events("migration"))
    fleet.abort(*steady)


async def test_who_waits_moves_first_and_without_a_copy(fleet: Fleet, rounds: Rounds) -> None:
    before = len(fleet.events("migration"))
    rounds.held_back = True
    running = [fleet.submit(100, ENDLESS, at=0) for _ in range(12)]
    waiting = [fleet.submit(100, 20, at=0, seed=i) for i in range(3)]
    await fleet.shown(0, lambda s: (s.num_running, s.num_waiting) == (12, 3))
    rounds.held_back = False
    await fleet.ended(*waiting)
    moves = fleet.events("migration")[before:][:3]
    assert {m["request_id"] for m in moves} == {s.id for s in waiting}
    assert [(m["ok"], m["source"], m["num_bytes"]) for m in moves] == [(True, 0, 0)] * 3
    fleet.abort(*running)


async def test_a_draining_instance_empties_and_gets_nothing_new(fleet: Fleet, rounds: Rounds) -> None:
    first, *others = fleet.ready
    streams = [fleet.submit(40, ENDLESS, at=i) for i in fleet.ready for _ in range(3)]
    await fleet.at_least(1, *streams)
    fleet.cluster.scheduler.instance_draining(first, fleet.cluster.clock())
    try:
        await fleet.until(lambda: first not in on_each(fleet))
        assert {fleet.submit(20, 20).where for _ in range(6)} <= set(others)
        await rest(fleet, rounds)
        assert on_each(fleet)[first] == 0
        assert fleet.cluster.describe_instances()[first]["freeness"] is None
    finally:
        fleet.cluster.scheduler.instance_joined(first, fleet.cluster.clock())
    fleet.abort(*streams)


async def test_a_crash_while_the_load_evens_out(fleet: Fleet, rounds: Rounds) -> None:
    """The fullest dies as its first streams leave: all go on at the others."""
    first, *others = fleet.ready
    before = num_moves(fleet)
    streams = [fleet.submit(100, 120, at=first, seed=i) for i in range(9)]
    await fleet.until(lambda: num_moves(fleet) > before)
    fleet.kill(first)
    await fleet.dead(first)
    fleet.expect_deaths()
    await fleet.ledger_agrees()
    assert set(on_each(fleet)) <= set(others)
    await fleet.ended(*streams)
