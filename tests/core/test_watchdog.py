"""The watchdog: who is silent is asked, who does not answer is hung, and nobody else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arriero.core.watchdog import Hung, Ping, Watchdog


def ticks(dog: Watchdog, until: float, start: float = 0.0) -> list[Ping | Hung]:
    found = []
    for n in range(round((until - start) / dog.tick_s)):
        found += dog.tick(start + n * dog.tick_s)
    return found


def test_a_silent_instance_is_asked_once_and_then_found_hung_once() -> None:
    dog = Watchdog(8.0)
    dog.watch(3)
    assert ticks(dog, 5.0) == [Ping(3)]
    assert ticks(dog, 30.0, 5.0) == [Hung(3, 8.0)]


def test_an_instance_that_answers_lives() -> None:
    dog = Watchdog(8.0)
    dog.watch(3)
    for n in range(10):
        assert ticks(dog, 6.0 * (n + 1), 6.0 * n) == [Ping(3)]
        dog.heard(3)


def test_who_is_not_watched_is_not_asked() -> None:
    dog = Watchdog(8.0)
    dog.heard(1)
    dog.watch(2)
    dog.forget(2)
    dog.forget(2)
    assert ticks(dog, 100.0) == []


def test_a_machine_that_stood_still_has_not_made_anybody_hang() -> None:
    dog = Watchdog(8.0)
    dog.watch(0)
    dog.tick(0.0)
    assert dog.tick(1000.0) == []


def test_zero_means_never() -> None:
    dog = Watchdog(0.0)
    dog.watch(0)
    assert dog.tick_s > 0
    assert ticks(dog, 1000.0) == []


def test_a_short_timeout_is_watched_more_closely() -> None:
    assert Watchdog(0.8).tick_s == 0.1
    assert Watchdog(60.0).tick_s == 1.0


@given(st.lists(st.booleans(), max_size=100))
def test_hung_means_silent_for_the_whole_timeout(speaks: list[bool]) -> None:
    """Whatever the rhythm of its words, at a steady tick."""
    dog = Watchdog(8.0)
    dog.watch(0)
    dog.tick(0.0)
    silent = 0
    for n, speaking in enumerate(speaks):
        if speaking:
            dog.heard(0)
            silent = 0
        silent += 1
        hung = any(isinstance(v, Hung) for v in dog.tick(float(n + 1)))
        assert hung == (silent == 8)
        if hung:
            return
