"""Dispatch rules: which instance takes a new request."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.config import LoadConfig
from arriero.core.dispatch import (
    DISPATCH_POLICIES,
    CacheAware,
    ClusterView,
    DispatchPolicy,
    LeastOutstanding,
    MaxFreeness,
    PowerOfTwo,
    PrefixFreeness,
    RoundRobin,
    VllmDataParallel,
    make_dispatch_policy,
)
from arriero.core.errors import ConfigError
from arriero.core.prefixes import PrefixMap
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, InstanceState, Phase, RequestSnapshot

BLOCK_SIZE = 16
REQUEST = Dispatchable(request_id="new", num_prompt_tokens=100, max_tokens=10)

Loads = Mapping[InstanceId, tuple[int, int]]
"""For each instance: blocks that running requests hold, and requests that no snapshot shows yet."""

loads = st.dictionaries(st.integers(0, 50), st.tuples(st.integers(0, 120), st.integers(0, 4)), min_size=1, max_size=8)


def snapshot(instance: InstanceId, used_blocks: int = 0) -> InstanceSnapshot:
    running = RequestSnapshot(request_id=f"old-{instance}", phase=Phase.RUNNING, num_blocks=used_blocks)
    return InstanceSnapshot.of(
        (running,) if used_blocks else (), instance=instance, time_s=0.0, num_blocks=100,
        num_free_blocks=max(0, 100 - used_blocks), block_size=BLOCK_SIZE, max_num_seqs=8,
    )  # fmt: skip


def send(seen: ClusterView, instance: InstanceId, num_requests: int = 1, num_prompt_tokens: int = 159) -> None:
    for number in range(num_requests):
        name = f"sent-{instance}-{number}-{num_prompt_tokens}"
        seen.sent(Dispatchable(request_id=name, num_prompt_tokens=num_prompt_tokens, max_tokens=1), instance)


def view(load: Loads, candidates: Sequence[InstanceId] | None = None) -> ClusterView:
    seen = ClusterView(LoadConfig(), random.Random(0))
    for instance, (used, unseen) in load.items():
        is_candidate = candidates is None or instance in candidates
        seen.set_state(instance, InstanceState.READY if is_candidate else InstanceState.DRAINING)
        seen.see(snapshot(instance, used))
        send(seen, instance, unseen)
    return seen


# ---------------------------------------------------------------------- what a policy sees


def test_a_view_counts_requests_on_their_way_as_load() -> None:
    assert view({0: (40, 0)}).freeness(0) == 60
    assert view({0: (40, 2)}).freeness(0) == (60 - 2 * 10) / 3


def test_an_instance_without_a_snapshot_has_no_room_to_show() -> None:
    seen = ClusterView(LoadConfig(), random.Random(0))
    seen.set_state(0, InstanceState.READY)
    assert seen.freeness(0) == 0


# ---------------------------------------------------------------------- laws of all policies


@given(st.sampled_from(sorted(DISPATCH_POLICIES)), st.lists(loads, min_size=1, max_size=6))
def test_every_policy_chooses_one_of_the_candidates_whatever_the_load(name: str, rounds: list[Loads]) -> None:
    policy = make_dispatch_policy(name)
    for load in rounds:
        assert policy.choose(REQUEST, view(load)) in load


@given(st.sampled_from(sorted(DISPATCH_POLICIES)), loads, st.data())
def test_no_policy_looks_beyond_the_candidates(name: str, load: Loads, data: st.DataObject) -> None:
    """Draining instances still have snapshots, and may be the emptiest of all."""
    candidates = data.draw(st.lists(st.sampled_from(sorted(load)), min_size=1, unique=True).map(sorted))
    assert make_dispatch_policy(name).choose(REQUEST, view(load, candidates)) in candidates


@given(st.sampled_from(["freeness", "least_outstanding"]), st.data())
def test_renaming_the_instances_renames_the_choice_unless_there_is_a_tie(name: str, data: st.DataObject) -> None:
    def score(figures: tuple[int, int]) -> float:
        used, unseen = figures
        free = (max(0, 100 - used) - 10 * unseen) / max(1, (used > 0) + unseen)
        return free if name == "freeness" else unseen

    figures = st.tuples(st.integers(0, 120), st.integers(0, 8))
    load = data.draw(st.lists(figures, min_size=1, max_size=6, unique_by=score))
    names = data.draw(st.permutations(range(len(load))))
    policy = make_dispatch_policy(name)
    before = policy.choose(REQUEST, view(dict(enumerate(load))))
    after = policy.choose(REQUEST, view(dict(zip(names, load, strict=True))))
    assert after == names[before]


# ---------------------------------------------------------------------- one rule each


@given(st.sets(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 4))
def test_round_robin_gives_every_instance_its_turn_in_the_order_of_numbers(ids: set[int], rounds: int) -> None:
    policy, load = RoundRobin(), {i: (0, 0) for i in ids}
    chosen = [policy.choose(REQUEST, view(load)) for _ in range(rounds * len(ids))]
    assert chosen == sorted(ids) * rounds


def test_round_robin_goes_on_behind_an_instance_that_is_gone() -> None:
    policy = RoundRobin()
    load = {0: (0, 0), 1: (0, 0), 2: (0, 0)}
    assert [policy.choose(REQUEST, view(load)) for _ in range(2)] == [0, 1]
    assert policy.choose(REQUEST, view(load, [0, 2])) == 2
    assert policy.choose(REQUEST, view(load, [0, 1])) == 0


@given(loads)
def test_least_outstanding_chooses_an_instance_that_nobody_undercuts(load: Loads) -> None:
    seen = view(load)
    chosen = LeastOutstanding().choose(REQUEST, seen)
    best = min(seen.ledger.num_outstanding(i) for i in load)
    assert chosen == min(i for i in load if seen.ledger.num_outstanding(i) == best)


@given(loads)
def test_freeness_chooses_an_instance_that_nobody_is_freer_than(load: Loads) -> None:
    seen = view(load)
    chosen = MaxFreeness().choose(REQUEST, seen)
    assert seen.freeness(chosen) == max(seen.freeness(i) for i in load)


@given(st.sampled_from(["freeness", "least_outstanding"]), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 120))))
def test_a_policy_that_follows_the_changes_chooses_as_one_that_looks_anew(
    name: str, changes: list[tuple[InstanceId, int]]
) -> None:
    """Snapshots, dispatches, departures and returns, in any order."""
    policy, seen = make_dispatch_policy(name), view({0: (0, 0)})
    for number, (instance, used) in enumerate(changes):
        if used > 110 and len(seen.candidates) > 1:
            seen.remove(instance)
        elif used > 100:
            seen.set_state(instance, InstanceState.READY)
        elif instance in seen.states:
            seen.see(snapshot(instance, used))
        chosen = policy.choose(REQUEST, seen)
        assert chosen == make_dispatch_policy(name).choose(REQUEST, seen)
        seen.sent(Dispatchable(request_id=f"n{number}", num_prompt_tokens=20, max_tokens=1), chosen)


def test_headroom_keeps_normal_requests_away_and_is_free_for_urgent_ones() -> None:
    """Instance 0 runs an urgent request, so that it counts as nearly full; in truth it is the emptier one."""
    seen = ClusterView(LoadConfig(load_targets=((-1, 0.2),)), random.Random(0))
    for instance, priority, used in ((0, -1, 5), (1, 0, 30)):
        seen.set_state(instance, InstanceState.READY)
        one = RequestSnapshot(request_id=f"{instance}", phase=Phase.RUNNING, num_blocks=used, priority=priority)
        seen.see(
            InstanceSnapshot.of(
                [one], instance=instance, time_s=0.0, num_blocks=100, num_free_blocks=100 - used, block_size=16,
                max_num_seqs=8,
            )
        )  # fmt: skip
    assert [seen.freeness(i) for i in (0, 1)] == [15, 70]
    assert [seen.freeness(i, with_headroom=False) for i in (0, 1)] == [95, 70]
    assert MaxFreeness().choose(REQUEST, seen) == 1
    assert MaxFreeness().choose(replace(REQUEST, priority=-1), seen) == 0


def test_freeness_breaks_a_tie_by_fewer_requests_and_then_by_the_lower_number() -> None:
    assert MaxFreeness().choose(REQUEST, view({3: (10, 0), 5: (10, 0)})) == 3
    # 10 blocks in use by one, or 10 blocks on their way for one: equally free, but 5 has no request in its care.
    assert MaxFreeness().choose(REQUEST, view({3: (0, 1), 5: (10, 0)})) == 5


@given(st.integers(1, 5), st.integers(0, 40), st.integers(0, 200))
def test_a_burst_between_two_snapshots_spreads_evenly(num_instances: int, num_requests: int, tokens: int) -> None:
    """No instance gets two requests more than another, though no snapshot has shown a single one."""
    policy, seen = MaxFreeness(), view(dict.fromkeys(range(num_instances), (0, 0)))
    counts = Counter(dict.fromkeys(range(num_instances), 0))
    for number in range(num_requests):
        request = Dispatchable(request_id=f"r{number}", num_prompt_tokens=tokens, max_tokens=1)
        chosen = policy.choose(request, seen)
        seen.sent(request, chosen)
        counts[chosen] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


def test_of_two_drawn_at_random_the_one_with_fewer_requests_is_chosen() -> None:
    """The most loaded of three is never chosen, and over many draws both others are."""
    seen = view({0: (0, 5), 1: (0, 1), 2: (0, 0)})
    chosen = Counter(PowerOfTwo().choose(REQUEST, seen) for _ in range(100))
    assert set(chosen) == {1, 2}
    assert chosen[2] > chosen[1]
    assert PowerOfTwo().choose(REQUEST, view({7: (0, 3)})) == 7


def test_the_score_of_vllms_balancer_punishes_queues_on_full_instances() -> None:
    def shown(instance: InstanceId, used: int, num_running: int, num_waiting: int) -> InstanceSnapshot:
        phases = [Phase.RUNNING] * num_running + [Phase.WAITING] * num_waiting
        requests = [RequestSnapshot(request_id=f"{instance}-{n}", phase=p) for n, p in enumerate(phases)]
        return InstanceSnapshot.of(
            requests, instance=instance, time_s=0.0, num_blocks=100, num_free_blocks=100 - used, block_size=16,
            max_num_seqs=8,
        )  # fmt: skip

    seen = view({0: (0, 0), 1: (0, 0)})
    seen.see(shown(0, 40, num_running=6, num_waiting=1))
    seen.see(shown(1, 90, num_running=3, num_waiting=2))
    # 7, as its memory is not half full; 5 + 2 * 6 * 0.4 = 9.8.
    assert VllmDataParallel().choose(REQUEST, seen) == 0
    seen.see(shown(1, 50, num_running=3, num_waiting=2))
    assert VllmDataParallel().choose(REQUEST, seen) == 1
    send(seen, 1, 8)
    assert VllmDataParallel().choose(REQUEST, seen) == 0, "8 of our own are on their way"
    seen.set_state(9, InstanceState.READY)
    assert VllmDataParallel().choose(REQUEST, seen) == 9, "it has shown nothing yet, and has nothing of ours"


def with_prefix(name: str, *hashes: int) -> Dispatchable:
    tokens = 16 * len(hashes)
    return Dispatchable(
        request_id=name, num_prompt_tokens=tokens, max_tokens=1, block_hashes=hashes, num_hashed_tokens=tokens
    )


def test_a_prompt_follows_the_longest_prefix_that_was_sent_somewhere() -> None:
    policy, seen = CacheAware(), view({0: (0, 0), 1: (0, 0), 2: (0, 0)})

    def choose(request: Dispatchable) -> InstanceId:
        chosen = policy.choose(request, seen)
        seen.sent(request, chosen)
        return chosen

    assert [choose(with_prefix("a", 1, 2, 3)), choose(with_prefix("b", 7, 8))] == [0, 1]
    assert choose(with_prefix("c", 1, 2, 4, 5)) == 0, "half of it is known there"
    assert choose(with_prefix("d", 7, 9, 10)) == 2, "a third is not enough"
    assert choose(with_prefix("e", 1, 2, 4, 5, 6)) == 0
    seen.remove(0)
    assert choose(with_prefix("f", 1, 2, 3)) in (1, 2)


def test_affinity_ends_where_the_holder_takes_no_requests() -> None:
    policy, seen = CacheAware(), view({0: (0, 0), 1: (0, 0)})
    seen.sent(with_prefix("first", 1), 0)
    seen.set_state(0, InstanceState.DRAINING)
    assert policy.choose(with_prefix("next", 1), seen) == 1


def test_affinity_ends_where_the_instance_has_far_more_requests_than_another() -> None:
    policy, seen = CacheAware(), view({0: (0, 0), 1: (0, 0)})
    seen.sent(with_prefix("first", 1), policy.choose(with_prefix("first", 1), seen))
    send(seen, 0, CacheAware.MARGIN - 1)
    assert policy.choose(with_prefix("next", 1), seen) == 0
    send(seen, 0, 1, num_prompt_tokens=7)
    assert policy.choose(with_prefix("last", 1), seen) == 1


def test_a_holder_of_the_prefix_may_be_fuller_by_what_it_holds() -> None:
    policy, seen = PrefixFreeness(), view({0: (6, 0), 1: (10, 0)})
    seen.sent(with_prefix("first", 1, 2, 3, 4), 1)
    seen.ended("first")
    same = with_prefix("same", 1, 2, 3, 4, 5)
    assert policy.choose(same, seen) == 0, "4 blocks are as much as it is fuller by"
    seen.see(snapshot(0, 7))
    assert policy.choose(same, seen) == 1
    assert policy.choose(with_prefix("shorter", 1, 2, 3, 9), seen) == 0, "here 3 blocks"
    assert policy.choose(with_prefix("other", 6, 7, 8, 9), seen) == 0
    assert policy.choose(REQUEST, seen) == 0, "of which no hashes are known"
    seen.sent(same, 0)
    seen.ended("same")
    assert policy.choose(same, seen) == 0, "it holds it now itself"


def test_what_is_on_its_way_to_a_holder_counts_as_load_and_as_work() -> None:
    policy, seen = PrefixFreeness(), view({0: (0, 0), 1: (0, 0)})
    seen.sent(with_prefix("first", 1, 2, 3, 4), 1)
    assert policy.choose(with_prefix("next", 1, 2, 3, 4), seen) == 0
    seen.set_state(0, InstanceState.DRAINING)
    assert policy.choose(with_prefix("next", 1, 2, 3, 4), seen) == 1, "nobody else takes requests"


def test_a_holder_that_has_shown_nothing_yet_is_asked_like_the_others() -> None:
    policy, seen = PrefixFreeness(), view({0: (10, 0)})
    seen.set_state(1, InstanceState.READY)
    seen.sent(with_prefix("first", *range(50)), 1)
    assert policy.choose(with_prefix("next", *range(50)), seen) == 0
    seen.ended("first")
    assert policy.choose(with_prefix("next", *range(50)), seen) == 1


def test_a_holder_that_takes_no_requests_is_passed_over() -> None:
    policy, seen = PrefixFreeness(), view({0: (0, 0), 1: (0, 0)})
    seen.sent(with_prefix("first", *range(50)), 1)
    seen.set_state(1, InstanceState.DRAINING)
    assert policy.choose(with_prefix("next", *range(50)), seen) == 0
    seen.remove(1)
    assert len(seen.prefixes) == 0


def test_a_prefix_is_known_where_its_request_moved_to() -> None:
    seen = view({0: (0, 0), 1: (0, 0)})
    request = with_prefix("r", 1, 2)
    seen.sent(request, 0)
    seen.moved("r", 1)
    assert list(seen.prefixes.find(request)[0]) == [0, 1]


def test_of_prefixes_so_much_is_remembered_as_the_memory_holds() -> None:
    prefixes = PrefixMap()
    prefixes.sent(with_prefix("a", 1, 2), 0, 48)
    prefixes.sent(with_prefix("b", 3), 1, None)
    prefixes.sent(with_prefix("c", 1, 4), 0, 48)
    assert prefixes.find(with_prefix("d", 1, 2)) == ({0: None}, 32)
    prefixes.sent(with_prefix("e", 5), 0, 48)
    assert prefixes.find(with_prefix("d", 1, 2)) == ({0: None}, 16), "a prompt's last block goes first"
    prefixes.sent(with_prefix("e", 5, 6, 7), 0, 48)
    assert prefixes.find(with_prefix("d", 1, 2)) == ({}, 0)
    assert prefixes.find(with_prefix("b", 3, 9)) == ({1: None}, 16)
    assert prefixes.find(with_prefix("f")) == ({}, 0)
    prefixes.sent(with_prefix("g", 3), 0, None)
    prefixes.forget(1)
    assert prefixes.find(with_prefix("b", 3, 9)) == ({0: None}, 16), "another holds it, too"
    prefixes.forget(0)
    assert not len(prefixes)


def test_a_heap_of_many_changes_is_swept() -> None:
    policy, seen = MaxFreeness(), view(dict.fromkeys(range(3), (0, 0)))
    for number in range(100):
        seen.see(snapshot(number % 3, 1 + number % 7))
        policy.choose(REQUEST, seen)
    assert len(policy._ranking._heap) < 4 * 3 + 16 + 3


# ---------------------------------------------------------------------- by name


class LowestNumber:
    """A user's own policy."""

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        return min(view.candidates)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("my_policies")
    module.LowestNumber = LowestNumber  # type: ignore[attr-defined]
    module.NotAPolicy = object  # type: ignore[attr-defined]
    module.NeedsArguments = ClusterView  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_policies", module)
    return module


@pytest.mark.parametrize("name", sorted(DISPATCH_POLICIES))
def test_a_policy_is_made_by_its_name_and_does_not_share_state(name: str) -> None:
    policy: DispatchPolicy = make_dispatch_policy(name)
    assert type(policy) is DISPATCH_POLICIES[name]
    assert policy is not make_dispatch_policy(name)


def test_a_policy_of_the_user_is_made_by_its_dotted_path(plugin: ModuleType) -> None:
    assert isinstance(make_dispatch_policy("my_policies.LowestNumber"), LowestNumber)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fastest", "freeness, least_outstanding, round_robin"),
        ("", "freeness, least_outstanding, round_robin"),
        ("no_such_module.Policy", "no_such_module"),
        ("my_policies.Missing", "Missing"),
        ("my_policies.", "cannot be loaded"),
        ("..Policy", "cannot be loaded"),
        ("my_policies.NeedsArguments", "required positional argument"),
        ("my_policies.NotAPolicy", "no method choose(request, view)"),
    ],
)
def test_a_policy_that_cannot_be_made_is_refused_with_the_reason(plugin: ModuleType, name: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_dispatch_policy(name)
    assert repr(name) in str(caught.value)
    assert why in str(caught.value)
