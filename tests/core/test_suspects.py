"""Suspects: who kills its instances is found and given up; who was only there is not."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from arriero.core.config import RecoveryConfig
from arriero.core.suspects import Suspects, may_have_run
from arriero.core.types import InstanceSnapshot, Phase, RequestSnapshot

CONFIG = RecoveryConfig(max_replays=2, probation_tokens=3)


def test_the_first_deaths_blame_all_and_give_up_none() -> None:
    suspects = Suspects(CONFIG)
    for _ in range(2):
        assert suspects.died(["a", "b"]) == set()
    assert suspects.on_trial == []


def test_after_the_second_joint_death_suspects_are_tried_one_at_a_time() -> None:
    suspects = Suspects(CONFIG)
    suspects.died(["a", "b"])
    suspects.died(["a", "b", "c"])
    assert [suspects.begin_replay(r) for r in "cdabca"] == [True, True, True, False, True, True]
    assert suspects.on_trial == ["a"], "c was in one death only, d in none"


def test_who_dies_on_trial_is_given_up_and_its_neighbours_are_not_even_blamed() -> None:
    suspects = Suspects(CONFIG)
    for _ in range(2):
        suspects.died(["a", "b"])
    assert suspects.begin_replay("a")
    assert suspects.died(["a", "b", "c"]) == {"a"}
    assert suspects.ended("a")
    assert suspects.begin_replay("b")
    assert suspects.died(["b"]) == {"b"}
    assert [suspects.died(["c"]) for _ in range(2)] == [set()] * 2, "the death on a's trial does not count"


def test_a_suspect_that_produces_is_cleared() -> None:
    suspects = Suspects(CONFIG)
    for _ in range(2):
        suspects.died(["a", "b"])
    assert not suspects.produced("a", 100), "it is not on trial"
    assert suspects.begin_replay("a")
    assert not suspects.produced("a", 2)
    assert not suspects.begin_replay("b")
    assert suspects.produced("a", 1)
    assert not suspects.produced("a", 1)
    assert not suspects.produced("stranger", 1)
    assert suspects.begin_replay("b")
    assert suspects.died(["a"]) == set()


def test_a_trial_that_did_not_begin_to_run_proves_nothing() -> None:
    """The instance died before it had taken the request."""
    suspects = Suspects(CONFIG)
    for _ in range(2):
        suspects.died(["a"])
    assert suspects.begin_replay("a")
    assert suspects.died(["b"]) == set()
    assert suspects.begin_replay("a")
    assert suspects.died(["a"]) == {"a"}


def test_who_kills_from_outside_gets_nobody_blamed_also_in_a_trial() -> None:
    suspects = Suspects(CONFIG)
    for _ in range(5):
        assert suspects.died(["a", "b"], from_outside=True) == set()
    for _ in range(2):
        suspects.died(["a", "b"])
    assert suspects.begin_replay("a")
    assert suspects.died(["a", "b"], from_outside=True) == set()
    assert suspects.begin_replay("a"), "its trial goes on"
    assert not suspects.begin_replay("b")
    assert suspects.died(["a", "b"]) == {"a"}


def test_who_is_killed_from_outside_over_and_over_is_blamed_in_the_end() -> None:
    """A guard of the machine's memory may kill because of what the request does."""
    suspects = Suspects(RecoveryConfig(max_replays=2, max_outside_kills=3))
    deaths = 0
    while not suspects.died(["a"], from_outside=True):
        deaths += 1
        assert suspects.begin_replay("a")
    assert deaths == 3 + 2


def test_a_suspect_that_ends_makes_room() -> None:
    suspects = Suspects(CONFIG)
    for _ in range(2):
        suspects.died(["a", "b"])
    assert suspects.begin_replay("a")
    assert [suspects.ended("a"), suspects.ended("a")] == [True, False]
    assert suspects.begin_replay("b")


def test_without_replays_the_first_death_is_the_last() -> None:
    assert Suspects(RecoveryConfig(max_replays=0)).died(["a", "b"]) == {"a", "b"}
    assert Suspects(RecoveryConfig(max_replays=0)).died(["a", "b"], from_outside=True) == {"a", "b"}


def test_with_one_replay_that_one_is_the_trial() -> None:
    suspects = Suspects(RecoveryConfig(max_replays=1))
    suspects.died(["a", "b"])
    assert suspects.begin_replay("b")
    assert suspects.died(["b"]) == {"b"}


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 3), st.randoms(use_true_random=False))
def test_a_poison_is_found_and_no_bystander_is_given_up(num: int, poison: int, max_replays: int, rng: Random) -> None:
    """Every instance that runs it dies; everybody shares one instance whenever allowed, in any order."""
    requests = [f"r{n}" for n in range(num)]
    culprit = requests[poison % num]
    suspects = Suspects(RecoveryConfig(max_replays=max_replays, probation_tokens=1))
    running = set(requests)
    deaths = 0
    given_up: set[str] = set()
    while culprit not in given_up:
        deaths += 1
        assert deaths <= max_replays + 1, "it kills no more than it may"
        for request in suspects.died(sorted(running)):
            suspects.ended(request)
            given_up.add(request)
        waiting = sorted(set(requests) - given_up)
        rng.shuffle(waiting)
        running = set()
        while waiting and culprit not in running:
            started = [r for r in waiting if suspects.begin_replay(r)]
            assert started, "somebody may always be tried"
            running |= set(started)
            waiting = [r for r in waiting if r not in running]
            if culprit not in running:
                for request in started:
                    suspects.produced(request, 1)
    assert given_up == {culprit}


def test_who_waited_far_back_in_the_queue_has_not_run() -> None:
    phases = [Phase.RUNNING, Phase.WAITING, Phase.WAITING, Phase.WAITING]
    requests = tuple(RequestSnapshot(request_id=f"r{n}", phase=p) for n, p in enumerate(phases))
    seen = InstanceSnapshot(
        instance=0, time_s=0.0, num_blocks=9, num_free_blocks=9, block_size=16, max_num_seqs=3, requests=requests
    )
    assert may_have_run(["r0", "r1", "r2", "r3", "new"], seen) == ["r0", "r1", "r2", "new"]
    assert may_have_run(["r0"], None) == ["r0"]
