"""Who gives way when memory has run out, and who goes on first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.config import PreemptionConfig
from arriero.core.errors import ConfigError
from arriero.core.preemption import Preemption, Standing

RULE = Preemption(PreemptionConfig(restart_blocks_per_running=1.5))

standings = st.builds(Standing, st.integers(-2, 2), st.integers(1, 50), st.booleans())


def itself(standing: Standing) -> Standing:
    return standing


def test_the_smallest_gives_way() -> None:
    running = [Standing(0, 30, True), Standing(0, 10, True), Standing(0, 20, True)]
    assert RULE.victim(running, itself) is running[1]


def test_of_two_alike_the_last_admitted_gives_way() -> None:
    of = {"first": Standing(0, 10, True), "second": Standing(0, 10, True), "third": Standing(0, 11, True)}
    assert RULE.victim(list(of), of.__getitem__) == "second"


def test_a_less_urgent_one_gives_way_however_large() -> None:
    running = [Standing(0, 10, True), Standing(1, 500, True), Standing(-1, 1, True)]
    assert RULE.victim(running, itself) is running[1]


def test_one_that_has_begun_need_not_wait_for_a_large_one() -> None:
    line = [Standing(0, 500, True), Standing(0, 10, False), Standing(0, 20, True)]
    assert list(RULE.line(line, itself)) == [line[0], line[2]]


def test_nobody_goes_before_a_more_urgent_one() -> None:
    line = [Standing(-1, 500, True), Standing(0, 10, True)]
    assert list(RULE.line(line, itself)) == [line[0]]


def test_running_requests_keep_room_where_one_goes_on() -> None:
    assert RULE.reserve_blocks(Standing(0, 10, True), 3) == 4
    assert RULE.reserve_blocks(Standing(0, 10, True), 0) == 0, "alone it may take all"
    assert RULE.reserve_blocks(Standing(0, 10, False), 3) == 0, "a new one was given its place by the scheduler"


@pytest.mark.parametrize("kept", [-0.5, float("inf"), float("nan")])
def test_rubbish_is_refused(kept: float) -> None:
    with pytest.raises(ConfigError, match="restart_blocks_per_running"):
        PreemptionConfig(restart_blocks_per_running=kept)


@given(st.lists(standings, min_size=1, max_size=8))
def test_no_victim_is_more_urgent_or_larger_than_another_could_be(running: list[Standing]) -> None:
    victim = RULE.victim(running, itself)
    assert not any(s.priority > victim.priority for s in running)
    assert not any(s.priority == victim.priority and s.num_tokens < victim.num_tokens for s in running)


@given(st.lists(standings, max_size=8))
def test_the_line_keeps_its_order_and_its_head(waiting: list[Standing]) -> None:
    numbers = {i: s for i, s in enumerate(waiting)}
    line = list(RULE.line(list(numbers), numbers.__getitem__))
    assert line == sorted(line)
    assert line[:1] == list(numbers)[:1]
    assert all(numbers[i].has_begun and numbers[i].priority <= waiting[0].priority for i in line[1:])
