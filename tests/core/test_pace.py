"""When will an instance's step end?"""

from __future__ import annotations

import pytest

from arriero.core.pace import StepPace


def steps(*times: float) -> StepPace:
    pace = StepPace()
    for time in times:
        pace.step_ended(0, time)
    return pace


def test_an_unknown_instance_or_a_single_step_promises_nothing() -> None:
    assert StepPace().next_end_in(0, 1.0) == 0
    assert StepPace().since_last_end(0, 1.0) == 0
    assert steps(1.0).next_end_in(0, 1.5) == 0


def test_a_steady_pace_is_continued() -> None:
    pace = steps(1.0, 1.1, 1.2)
    assert pace.next_end_in(0, 1.23) == pytest.approx(0.07)
    assert pace.since_last_end(0, 1.23) == pytest.approx(0.03)


def test_an_overdue_step_ends_now() -> None:
    assert steps(1.0, 1.1).next_end_in(0, 1.5) == 0


def test_the_average_follows_a_change_of_pace() -> None:
    pace = steps(1.0, 1.1, *(1.1 + 0.2 * i for i in range(1, 40)))
    assert pace.next_end_in(0, 1.1 + 0.2 * 39) == pytest.approx(0.2, rel=0.05)


def test_idleness_is_not_a_slow_step() -> None:
    pace = steps(1.0, 1.1, 60.0)
    assert pace.next_end_in(0, 60.0) == pytest.approx(0.1)


def test_a_message_that_would_miss_the_end_of_a_step_waits_for_the_next() -> None:
    pace = steps(1.0, 1.1)
    assert pace.next_end_in(0, 1.195, lead_s=0.01) == pytest.approx(0.105)
    assert pace.next_end_in(0, 1.195, lead_s=0.001) == pytest.approx(0.005)


def test_times_are_translated_by_the_quickest_message_of_an_instance() -> None:
    pace = StepPace()
    assert pace.on_clock_of(0, 5.0) == 5.0
    pace.clock_read(0, theirs_s=100.0, ours_s=1.010)
    pace.clock_read(0, theirs_s=101.0, ours_s=2.002)
    pace.clock_read(0, theirs_s=102.0, ours_s=3.500)
    assert pace.on_clock_of(0, 4.0) == pytest.approx(4.0 + 98.998)


def test_a_lost_instance_is_forgotten() -> None:
    pace = steps(1.0, 1.1)
    pace.forget(0)
    pace.forget(0)
    assert pace.next_end_in(0, 1.1) == 0
