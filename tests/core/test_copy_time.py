"""What is learned of how long moves take."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.rebalancing.copy_time import CopyTime

moves = st.lists(st.tuples(st.integers(1, 500), st.floats(0.001, 60)), min_size=1, max_size=12)


def learned(*moves: tuple[int, float]) -> CopyTime:
    time = CopyTime()
    for num_blocks, seconds in moves:
        time.learn(num_blocks, seconds)
    return time


def test_before_the_first_move_nothing_speaks_against_any() -> None:
    assert CopyTime().most_blocks(0.0) == math.inf


def test_what_small_moves_cost_whatever_their_size_does_not_count_for_each_block() -> None:
    """A tenth of a second each, and 2 ms a block."""
    time = learned(*[(n, 0.1 + 0.002 * n) for n in (3, 17, 5, 40, 8)])
    assert time.most_blocks(0.3) == pytest.approx(100)
    assert time.most_blocks(0.09) == 0.0


def test_where_all_moves_were_alike_time_is_proportional_to_blocks() -> None:
    assert learned((20, 0.5), (20, 0.5), (21, 0.53)).most_blocks(1.0) == pytest.approx(40, rel=0.02)
    assert learned((20, 0.5)).most_blocks(1.0) == pytest.approx(40)


def test_where_large_moves_took_no_longer_size_costs_nothing() -> None:
    assert learned((10, 0.5), (40, 0.3)).most_blocks(0.1) == math.inf


def test_the_newest_count_most() -> None:
    slow, fast = [(n, 0.1 * n) for n in (5, 10, 20)], [(n, 0.01 * n) for n in (5, 10, 20)]
    assert learned(*slow, *fast * 8).most_blocks(1.0) == pytest.approx(100, rel=0.03)


@given(moves, st.floats(0, 100), st.floats(0, 100))
def test_more_time_is_never_worse_and_the_longest_that_was_suffices_for_the_smallest(
    past: list[tuple[int, float]], one_s: float, other_s: float
) -> None:
    time = learned(*past)
    assert time.most_blocks(min(one_s, other_s)) <= time.most_blocks(max(one_s, other_s))
    assert time.most_blocks(1.001 * max(s for _, s in past)) >= 0.999 * min(n for n, _ in past)
