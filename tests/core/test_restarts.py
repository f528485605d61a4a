"""Restarts: at once, then with growing pauses, then no more."""

from __future__ import annotations

import pytest

from arriero.core.config import RecoveryConfig
from arriero.core.errors import ConfigError
from arriero.core.restarts import Restart, RestartPolicy, StayDown

CONFIG = RecoveryConfig(backoff_s=1.0, max_backoff_s=3.0, max_deaths=5, window_s=100.0)


def test_the_first_restart_is_at_once_and_each_next_one_waits_twice_as_long() -> None:
    policy = RestartPolicy(CONFIG)
    assert [policy.died(0, float(n)) for n in range(4)] == [Restart(0.0), Restart(1.0), Restart(2.0), Restart(3.0)]


def test_a_place_that_keeps_dying_stays_down_until_an_operator_forgives_it() -> None:
    policy = RestartPolicy(CONFIG)
    for n in range(4):
        policy.died(0, float(n))
    assert policy.died(0, 9.0) == StayDown("fenced: 5 deaths in 9 s; `arriero restart` revives it")
    assert isinstance(policy.died(0, 10.0), StayDown)
    assert policy.died(1, 10.0) == Restart(0.0), "another place has its own count"
    policy.forgive(0)
    policy.forgive(7)
    assert policy.died(0, 11.0) == Restart(0.0)


def test_a_place_whose_instances_somebody_kills_is_not_fenced_but_waits_longer_each_time() -> None:
    policy = RestartPolicy(CONFIG)
    delays = [policy.died(0, float(n), from_outside=True) for n in range(9)]
    assert delays == [Restart(d) for d in (0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0)]
    for n in range(4):
        assert policy.died(0, 10.0 + n) == Restart(3.0)
    assert policy.died(0, 15.0) == StayDown("fenced: 5 deaths in 5 s; `arriero restart` revives it")


def test_deaths_are_forgotten_after_a_while() -> None:
    policy = RestartPolicy(CONFIG)
    for n in range(20):
        assert policy.died(0, 60.0 * n) == Restart(0.0 if n == 0 else 1.0)


def test_without_restarts_it_stays_down_and_says_why() -> None:
    assert RestartPolicy(RecoveryConfig(restart=False)).died(0, 0.0) == StayDown("restarts are off (--no-restart)")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_deaths": 0}, "max_deaths=0 is invalid: it must be 1 or more"),
        ({"max_replays": -1}, "max_replays=-1"),
        ({"probation_tokens": 0}, "probation_tokens=0"),
        ({"hang_timeout_s": -1.0}, "hang_timeout_s=-1.0"),
        ({"window_s": 0.0}, "window_s=0.0"),
        ({"backoff_s": 5.0, "max_backoff_s": 1.0}, "at least backoff_s=5.0"),
    ],
)
def test_nonsense_is_refused(values: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RecoveryConfig(**values)  # type: ignore[arg-type]
