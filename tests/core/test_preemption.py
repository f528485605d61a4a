"""Who gives way when memory has run out, and who goes on first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.config import PreemptionConfig
from arriero.core.errors import ConfigError
from arriero.core.preemption import Preemption, Standing

RULE = Preemption(PreemptionConfig(restart_blocks_per_running=1.5))

standings = st.builds(Standing, st.integers(-2, 2), st.integers(1, 50), st.integers(0, 1), st.integers(0, 1))


def stands(priority: int, num_tokens: int, num_output: int = 1, num_preemptions: int = 0) -> Standing:
    return Standing(priority, num_tokens, num_output, num_preemptions)


def itself(standing: Standing) -> Standing:
    return standing


def test_the_smallest_gives_way() -> None:
    running = [stands(0, 30), stands(0, 10), stands(0, 20)]
    assert RULE.victim(running, itself) is running[1]


def test_of_two_alike_the_last_admitted_gives_way() -> None:
    of = {"first": stands(0, 10), "second": stands(0, 10), "third": stands(0, 11)}
    assert RULE.victim(list(of), of.__getitem__) == "second"


def test_a_less_urgent_one_gives_way_however_large() -> None:
    running = [stands(0, 10), stands(1, 500), stands(-1, 1)]
    assert RULE.victim(running, itself) is running[1]


def test_one_that_has_begun_need_not_wait_for_a_large_one() -> None:
    line = [stands(0, 500), stands(0, 10, num_output=0), stands(0, 20)]
    assert list(RULE.line(line, itself)) == [line[0], line[2]]


def test_nobody_goes_before_a_more_urgent_one() -> None:
    line = [stands(-1, 500), stands(0, 10)]
    assert list(RULE.line(line, itself)) == [line[0]]


def test_one_that_was_preempted_before_its_first_token_has_begun_too() -> None:
    line = [stands(0, 500), stands(0, 10, num_output=0, num_preemptions=1)]
    assert list(RULE.line(line, itself)) == line


def test_running_requests_keep_room_where_one_goes_on() -> None:
    assert RULE.reserve_blocks(stands(0, 10), 3) == 4
    assert RULE.reserve_blocks(stands(0, 10), 0) == 0, "alone it may take all"
    assert RULE.reserve_blocks(stands(0, 10, num_output=0), 3) == 0, "a new one was given its place by the scheduler"


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
