"""Holding the door for an announced COMMIT."""

from __future__ import annotations

import pytest

from arriero.core.config import MigrationConfig
from arriero.core.door import Door

STEP = 0.040


@pytest.fixture
def door() -> Door:
    return Door(share=0.5)


def test_without_an_announcement_no_step_waits(door: Door) -> None:
    assert not door.is_announced
    assert door.hold_for(1.0, STEP) == 0


def test_a_step_waits_for_a_commit_that_is_due_within_the_window(door: Door) -> None:
    door.expect("m", due_s=1.010)
    assert door.is_announced
    assert door.hold_for(1.0, STEP) == pytest.approx(0.020)
    assert door.hold_for(1.005, STEP) == pytest.approx(0.015)


def test_a_step_does_not_wait_for_a_commit_that_is_due_later(door: Door) -> None:
    """The step ends before; the door is held at its end."""
    door.expect("m", due_s=1.030)
    assert door.hold_for(1.0, STEP) == 0
    assert door.hold_for(1.015, STEP) == 0
    assert door.hold_for(1.016, STEP) > 0


def test_what_is_waited_for_may_come_a_little_late(door: Door) -> None:
    """A quarter of the longest wait: else the last that is waited for would be missed by a hair."""
    door.expect("m", due_s=1.015)
    assert door.hold_for(1.0, STEP) > 0
    assert door.hold_for(1.019, STEP) > 0


def test_the_wait_ends_when_the_commit_has_come(door: Door) -> None:
    door.expect("m", due_s=1.0)
    assert door.hold_for(1.0, STEP) > 0
    door.forget("m")
    door.forget("m")
    assert door.hold_for(1.001, STEP) == 0


def test_one_wait_lasts_at_most_a_share_of_a_step_and_is_not_repeated(door: Door) -> None:
    door.expect("m", due_s=1.0)
    assert door.hold_for(1.0, STEP) > 0
    assert door.hold_for(1.021, STEP) == 0
    assert door.hold_for(1.021, STEP) == 0


def test_an_announcement_that_is_not_due_yet_outlives_the_wait_for_another(door: Door) -> None:
    door.expect("soon", due_s=1.0)
    door.expect("later", due_s=1.2)
    assert door.hold_for(1.0, STEP) > 0
    assert door.hold_for(1.021, STEP) == 0
    assert door.hold_for(1.19, STEP) == pytest.approx(0.020)


def test_one_of_two_that_came_does_not_start_the_wait_anew(door: Door) -> None:
    door.expect("a", due_s=1.0)
    door.expect("b", due_s=1.0)
    assert door.hold_for(1.0, STEP) > 0
    door.forget("a")
    assert door.hold_for(1.015, STEP) == pytest.approx(0.005)


def test_a_share_of_zero_never_waits() -> None:
    door = Door(share=MigrationConfig(hold_share=0).hold_share)
    door.expect("m", due_s=1.0)
    assert door.hold_for(1.0, STEP) == 0
