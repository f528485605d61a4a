"""Faults at the points of the protocol: the plan, and a short storm with a fixed seed."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.chaos.points import Fault, every_strike, plan
from arriero.chaos.storm import Storm, stormy_fleet
from arriero.core.messages import Op

KILLS = frozenset(f for f in Fault if f.verb == "kill")
GENTLE = frozenset({Fault.DELAY, Fault.DROP, Fault.DUPLICATE, Fault.CUT, Fault.CORRUPT, Fault.HANG_UP})


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(0, 1200), st.integers(0, 100))
def test_a_plan_has_every_fault_at_every_point_before_any_comes_again(count: int, seed: int) -> None:
    strikes = list(plan(count, random.Random(seed)))
    assert len(strikes) == count
    times = Counter(strikes)
    if count >= len(every_strike()):
        assert set(times) == set(every_strike())
    assert max(times.values(), default=0) - min((times[s] for s in every_strike()), default=0) <= 1


def test_every_operation_can_be_struck_on_its_way_and_on_its_way_back() -> None:
    assert {(s.op, s.side) for s in every_strike()} == {(op, side) for op in Op for side in ("sent", "answered")}


async def test_nothing_is_lost_doubled_or_leaked_in_a_short_storm() -> None:
    rng = random.Random(20)
    gentle = list(plan(24, rng, frozenset(Fault) - GENTLE))
    deadly = list(plan(6, rng, frozenset(Fault) - KILLS))
    async with stormy_fleet() as fleet:
        outcome = await Storm(fleet, rng).run([*gentle, *deadly])
    assert outcome.violations == []
    assert [str(r.strike) for r in outcome.records if not r.reached] == []
    assert len(outcome.records) == 30
    assert outcome.num_deaths >= 6
