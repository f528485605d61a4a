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


def test_a_lost_instance_is_forgotten() -> None:
    pace = steps(1.0, 1.1)
    pace.forget(0)
    pace.forget(0)
    assert pace.next_end_in(0, 1.1) == 0
