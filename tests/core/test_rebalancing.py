"""Rebalancing rules: who gives, who takes, and which request moves."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from arriero.core.commands import Move
from arriero.core.config import LoadConfig, RebalancingConfig, RebalancingRule
from arriero.core.rebalancing import Rebalancer, pair
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, InstanceState, Phase, RequestSnapshot
from arriero.core.view import ClusterView

CONFIG = RebalancingConfig(low_freeness=3, high_freeness=10, cooldown_s=5)
PAPER = replace(CONFIG, rule=RebalancingRule.PAPER)

freenesses = st.one_of(st.integers(-20, 40).map(float), st.just(-math.inf))
free_maps = st.dictionaries(st.integers(0, 60), freenesses, max_size=12)
configs = st.builds(
    lambda low, gap, rule: RebalancingConfig(low_freeness=low, high_freeness=low + gap, rule=rule),
    st.integers(-5, 20),
    st.integers(0, 10),
    st.sampled_from(RebalancingRule),
)


def request(
    name: str, phase: Phase = Phase.RUNNING, blocks: int = 10, *, priority: int = 0, tokens: int = 100
) -> RequestSnapshot:
    held, demand = (0, blocks) if phase is Phase.WAITING else (blocks, 0)
    return RequestSnapshot(
        request_id=name, phase=phase, priority=priority, num_tokens=tokens, num_blocks=held, demand_blocks=demand
    )


def instance(number: InstanceId, *requests: RequestSnapshot, num_blocks: int = 100) -> InstanceSnapshot:
    used = sum(r.num_blocks for r in requests)
    return InstanceSnapshot.of(
        requests, instance=number, time_s=0.0, num_blocks=num_blocks, num_free_blocks=max(0, num_blocks - used),
        block_size=16, max_num_seqs=8,
    )  # fmt: skip


@st.composite
def instances(draw: st.DrawFn, number: InstanceId) -> InstanceSnapshot:
    drawn = draw(
        st.lists(
            st.tuples(st.sampled_from(Phase), st.integers(1, 40), st.integers(-1, 1), st.integers(1, 5)), max_size=6
        )
    )
    requests = [
        request(f"{number}-{n}", phase, blocks, priority=priority, tokens=tokens)
        for n, (phase, blocks, priority, tokens) in enumerate(drawn)
    ]
    used = sum(r.num_blocks for r in requests)
    return instance(number, *requests, num_blocks=used + draw(st.integers(0, 150)))


clusters = st.integers(0, 5).flatmap(lambda num: st.tuples(*[instances(n) for n in range(num)]))


def facts(name: str, num_prompt_tokens: int = 15, unmovable: str | None = None) -> Dispatchable:
    return Dispatchable(request_id=name, num_prompt_tokens=num_prompt_tokens, max_tokens=1, unmovable=unmovable)


def view_of(
    *snapshots: InstanceSnapshot, draining: InstanceId | None = None, load: LoadConfig | None = None
) -> ClusterView:
    view = ClusterView(load or LoadConfig(), random.Random(0))
    for snapshot in snapshots:
        state = InstanceState.DRAINING if snapshot.instance == draining else InstanceState.READY
        view.set_state(snapshot.instance, state)
        view.see(snapshot)
    return view


def moves(config: RebalancingConfig, *snapshots: InstanceSnapshot, draining: InstanceId | None = None) -> list[Move]:
    return Rebalancer(config).round(view_of(*snapshots, draining=draining), {}, 0.0)


def who(config: RebalancingConfig, *snapshots: InstanceSnapshot, draining: InstanceId | None = None) -> list[str]:
    return [m.request_id for m in moves(config, *snapshots, draining=draining)]


# ---------------------------------------------------------------------- pairs


def test_the_fullest_gives_to_the_emptiest_and_so_on() -> None:
    free = {0: 1.0, 1: 30.0, 2: -5.0, 3: 12.0, 4: 5.0}
    assert pair(free, CONFIG) == [(2, 1), (0, 3)]


def test_between_the_thresholds_an_instance_neither_gives_nor_takes() -> None:
    assert pair({0: 3.0, 1: 10.0, 2: 5.0}, CONFIG) == []
    assert pair({0: 2.9, 1: 10.1}, CONFIG) == [(0, 1)]


def test_with_more_givers_than_takers_the_fullest_come_first() -> None:
    assert pair({0: 2.0, 1: 1.0, 2: 0.0, 3: 11.0}, CONFIG) == [(2, 3)]


def test_a_draining_instance_gives_before_all_others_and_never_takes() -> None:
    config = RebalancingConfig(low_freeness=-1e9, high_freeness=-1e9)
    assert pair({0: -1.0, 1: -math.inf, 2: 50.0}, config) == [(1, 2)]


@given(free_maps, configs)
def test_no_instance_is_in_two_pairs_or_on_both_sides(free: Mapping[int, float], config: RebalancingConfig) -> None:
    involved = [i for ends in pair(free, config) for i in ends]
    assert len(involved) == len(set(involved))


@given(free_maps, configs)
def test_pairs_respect_the_thresholds_and_the_order(free: Mapping[int, float], config: RebalancingConfig) -> None:
    pairs = pair(free, config)
    sources, destinations = [free[s] for s, _ in pairs], [free[d] for _, d in pairs]
    assert all(f < config.low_freeness for f in sources)
    assert all(f > config.high_freeness for f in destinations)
    assert sources == sorted(f for f in free.values() if f < config.low_freeness)[: len(pairs)]
    assert destinations == sorted((f for f in free.values() if f > config.high_freeness), reverse=True)[: len(pairs)]


@given(free_maps, configs)
def test_nobody_who_could_give_or_take_is_left_out(free: Mapping[int, float], config: RebalancingConfig) -> None:
    num_givers = sum(f < config.low_freeness for f in free.values())
    num_takers = sum(f > config.high_freeness for f in free.values())
    assert len(pair(free, config)) == min(num_givers, num_takers)


@given(st.lists(freenesses, unique=True, max_size=8), configs, st.data())
def test_renaming_the_instances_renames_the_pairs_unless_there_is_a_tie(
    free: list[float], config: RebalancingConfig, data: st.DataObject
) -> None:
    names = data.draw(st.permutations(range(len(free))))
    before = pair(dict(enumerate(free)), config)
    after = pair(dict(zip(names, free, strict=True)), config)
    assert after == [(names[s], names[d]) for s, d in before]


# ---------------------------------------------------------------------- laws of both rules


@given(clusters, configs, st.data())
def test_whoever_moves_is_free_to_move_and_fits_and_no_instance_is_on_both_sides(
    snapshots: tuple[InstanceSnapshot, ...], config: RebalancingConfig, data: st.DataObject
) -> None:
    by_number = {s.instance: s for s in snapshots}
    draining = data.draw(st.sampled_from([None, *by_number]))
    ids = [r.request_id for s in snapshots for r in s.requests]
    moving = data.draw(st.dictionaries(st.sampled_from(ids), st.just((90, 91)), max_size=2)) if ids else {}
    found = Rebalancer(config).round(view_of(*snapshots, draining=draining), moving, 0.0)
    ends = [i for m in found for i in (m.source, m.destination)]
    assert len(ends) == len(set(ends))
    assert draining not in [m.destination for m in found]
    for move in found:
        (chosen,) = [r for r in by_number[move.source].requests if r.request_id == move.request_id]
        assert chosen.phase in (Phase.WAITING, Phase.RUNNING)
        assert chosen.request_id not in moving
        assert max(chosen.num_blocks, chosen.demand_blocks) <= by_number[move.destination].num_free_blocks


@pytest.mark.parametrize("config", [CONFIG, PAPER])
def test_what_cannot_move_stays(config: RebalancingConfig) -> None:
    full = instance(0, request("a", blocks=50), request("b", blocks=50))
    view = view_of(full, instance(1))
    view.sent(facts("a", unmovable="an adapter"), 0)
    view.see(full)
    (move,) = Rebalancer(config).round(view, {}, 0.0)
    assert move.request_id == "b"


@pytest.mark.parametrize("config", [CONFIG, PAPER])
def test_requests_on_their_way_count_at_the_destination(config: RebalancingConfig) -> None:
    """Right after a burst an instance that still looks empty is not: it has been given its part."""
    full = instance(0, request("a", blocks=50), request("b", blocks=50))
    for num_pending, wanted in ((0, True), (3, False)):
        view = view_of(full, instance(1))
        for number in range(num_pending):
            view.sent(facts(f"new{number}", 16 * 19 - 1), 1)
        assert bool(Rebalancer(config).round(view, {}, 0.0)) is wanted


def test_one_source_alone_goes_on_as_soon_as_a_move_of_it_has_ended() -> None:
    full = [instance(n, request(f"{n}a", blocks=50), request(f"{n}b", blocks=50)) for n in range(2)]
    view = view_of(*full, instance(2), instance(3))
    for config in (CONFIG, PAPER):
        assert [m.source for m in Rebalancer(config).round(view, {}, 0.0)] == [0, 1]
        assert [m.source for m in Rebalancer(config).round(view, {}, 0.0, source=1)] == [1]


# ---------------------------------------------------------------------- the paper's rule


def test_in_the_paper_the_less_urgent_request_moves_and_then_the_shorter_one() -> None:
    """vLLM's sign: the higher number is the less urgent."""

    def first(*requests: RequestSnapshot) -> str:
        (chosen,) = who(PAPER, instance(0, *requests, num_blocks=sum(r.num_blocks for r in requests)), instance(1))
        return chosen

    urgent, normal = request("urgent", priority=-1, tokens=1), request("normal", tokens=90)
    assert first(urgent, normal) == "normal"
    assert first(request("long", tokens=90), request("short", tokens=10)) == "short"
    assert first(request("b"), request("a")) == "a"


def test_in_the_paper_only_running_requests_move() -> None:
    source = instance(0, request("waits", Phase.WAITING, 20), request("runs", blocks=99, tokens=500))
    assert who(PAPER, source, instance(1, num_blocks=200)) == ["runs"]


def test_in_the_paper_nothing_moves_where_nothing_fits() -> None:
    assert who(PAPER, instance(0, request("big", blocks=99)), instance(1, num_blocks=99)) == []


def test_a_move_says_which_figures_led_to_it() -> None:
    (move,) = moves(PAPER, instance(3, request("r", blocks=99)), instance(1))
    assert move.reason == "freeness 1.0 at 3, 100.0 at 1"


# ---------------------------------------------------------------------- relief


def test_a_waiting_request_goes_first_because_it_moves_without_a_copy() -> None:
    source = instance(0, request("runs", blocks=90, tokens=1), request("waits", Phase.WAITING, 20, tokens=500))
    assert who(CONFIG, source, instance(1)) == ["waits"]


@pytest.mark.parametrize(("demand", "goes"), [(20, True), (21, False)])
def test_a_waiting_request_goes_wherever_it_can_start(demand: int, goes: bool) -> None:
    """With 30 of 100 blocks free, two running ones and high_freeness 10, a running request finds no room there. What
    waits finds what the global queue's would: else that overtakes a preempted one, whose stream stands still.
    """
    source = instance(0, request("a", blocks=60), request("b", blocks=40), request("w", Phase.WAITING, demand))
    busy = instance(1, request("c", blocks=30), request("d", blocks=40))
    assert who(CONFIG, source, busy) == ["w"] * goes
    assert who(replace(CONFIG, start_share=0), source, busy) == ["w"]
    assert moves(CONFIG, instance(0, request("a", blocks=60), request("b", blocks=40)), busy) == [], "these run"


def test_a_waiting_request_goes_to_an_instance_that_is_needy_itself() -> None:
    """Which has 30 blocks for twelve that run, but nobody waits there. Then it takes no part in another move."""
    source = instance(0, request("a", blocks=98), request("w", Phase.WAITING, 15))
    many = [request(str(n), blocks=14) for n in range(5)]
    short = instance(1, *many)
    config = replace(CONFIG, low_freeness=7)
    assert [(m.request_id, m.source, m.destination) for m in moves(config, source, short)] == [("w", 0, 1)]
    found = moves(config, source, short, instance(2, num_blocks=90))
    assert [(m.request_id, m.source, m.destination) for m in found] == [("w", 0, 2)], "the roomiest first"
    roomy = instance(2, request("x", blocks=30), num_blocks=55)
    found = moves(config, source, short, roomy)
    assert [(m.request_id, m.source, m.destination) for m in found] == [("w", 0, 1)], "none is in two moves"


def test_what_waits_for_a_place_of_an_urgent_one_moves_and_the_urgent_does_not() -> None:
    urgent = [request("u", blocks=60, priority=-1), request("uw", Phase.WAITING, 5, priority=-1)]
    source = instance(0, *urgent, request("n", blocks=10), request("w", Phase.WAITING, 5))
    view = view_of(source, instance(1), load=LoadConfig(load_targets=((-1, 0.25),)))
    (move,) = Rebalancer(CONFIG).round(view, {}, 0.0)
    assert move.request_id == "w"


def test_the_head_of_a_queue_gets_what_it_lacks_by_the_smallest_move_that_suffices() -> None:
    """40 are lacking; the head itself has no room anywhere."""
    running = [request(n, blocks=b) for n, b in (("a", 20), ("b", 41), ("c", 39))]
    source = instance(0, *running, request("waits", Phase.WAITING, 90), num_blocks=150)
    (move,) = moves(CONFIG, source, instance(1, num_blocks=95))
    assert move.request_id == "b"
    assert move.reason == "the queue of 0 lacks 40 blocks; 41 blocks move"


def test_where_no_single_move_suffices_the_largest_goes() -> None:
    running = [request(n, blocks=b) for n, b in (("a", 20), ("b", 35), ("c", 39))]
    source = instance(0, *running, request("waits", Phase.WAITING, 90), num_blocks=130)
    assert who(CONFIG, source, instance(1, num_blocks=95)) == ["c"]


def test_a_less_urgent_request_goes_before_one_that_would_suffice() -> None:
    running = [request("urgent", blocks=50, priority=-1), request("normal", blocks=10)]
    source = instance(0, *running, request("waits", Phase.WAITING, 90), num_blocks=100)
    assert who(CONFIG, source, instance(1, num_blocks=95)) == ["normal"]


def test_an_instance_that_is_kept_for_a_request_gives_what_that_lacks_and_takes_nothing() -> None:
    """50 blocks are free, 60 are needed, and three for each running request."""
    kept, roomy = instance(0, request("a", blocks=10), request("b", blocks=20), request("c", blocks=20)), instance(1)
    view = view_of(kept, roomy)
    assert Rebalancer(CONFIG).round(view, {}, 0.0) == []
    view.earmark(0, 60)
    (move,) = Rebalancer(CONFIG).round(view, {}, 0.0)
    assert (move.request_id, move.reason) == ("b", "a request of 60 blocks is to start at 0; 20 blocks move")
    view.earmark(0, 40)
    assert Rebalancer(CONFIG).round(view, {}, 0.0) == [], "it lacks nothing"
    few = [request(str(n), blocks=2 + n) for n in range(8)]
    view = view_of(instance(0, *few), instance(1))
    view.earmark(0, 1)
    assert [m.request_id for m in Rebalancer(CONFIG).round(view, {}, 0.0)] == ["0"], "it lacks a place in its batch"
    full = instance(2, request("d", blocks=50), request("e", blocks=50))
    roomy = instance(0, request("a", blocks=10))
    assert Rebalancer(CONFIG).round(view_of(roomy, full), {}, 0.0) != []
    view = view_of(roomy, full)
    view.earmark(0, 60)
    assert Rebalancer(CONFIG).round(view, {}, 0.0) == []


def test_a_request_moves_before_another_one_is_preempted() -> None:
    """Two running ones with less than three blocks each to go."""
    source = instance(0, request("a", blocks=40), request("b", blocks=55))
    (move,) = moves(CONFIG, source, instance(1))
    assert (move.request_id, move.reason) == ("a", "0 has 2.5 blocks a request left; 40 blocks move")
    assert moves(CONFIG, instance(0, request("a", blocks=40), request("b", blocks=54)), instance(1)) == []
    assert moves(CONFIG, instance(0, request("alone", blocks=100)), instance(1)) == [], "nobody preempts it"


def test_the_destination_keeps_room_to_grow_for_all_that_run_there() -> None:
    source = instance(0, request("a", blocks=50), request("b", blocks=50))
    for busy, taken in ((29, True), (30, False)):
        assert bool(moves(CONFIG, source, instance(1, request("c", blocks=busy)))) is taken, "50 + 1, and 10 for each"
    full_batch = instance(1, *[request(f"c{n}", blocks=1) for n in range(8)], num_blocks=1000)
    assert moves(CONFIG, source, full_batch) == []


def test_the_most_urgent_need_gets_the_roomiest_destination() -> None:
    line = instance(0, request("a", blocks=50), request("w", Phase.WAITING, 95))
    short = instance(1, request("b", blocks=49), request("c", blocks=49))
    found = moves(CONFIG, short, line, instance(2), instance(3, num_blocks=90))
    assert [(m.source, m.destination) for m in found] == [(0, 2), (1, 3)]
    assert len(moves(replace(CONFIG, max_moves_per_round=1), short, line, instance(2), instance(3))) == 1


def test_others_leave_where_urgent_requests_are_crowded_and_nothing_comes_there() -> None:
    """A quarter of 100 blocks is the load that urgent requests want: 40 are in use, of them 30 by others."""
    urgent, normal = request("urgent", blocks=10, priority=-1), request("normal", blocks=30)
    view = view_of(instance(0, urgent, normal), instance(1), load=LoadConfig(load_targets=((-1, 0.25),)))
    (move,) = Rebalancer(CONFIG).round(view, {}, 0.0)
    assert (move.request_id, move.source, move.destination) == ("normal", 0, 1)
    assert move.reason == "15 blocks crowd the urgent requests at 0; 30 blocks move"
    alone = view_of(instance(0, urgent, request("u", blocks=40, priority=-2)), instance(1), load=view.config)
    assert Rebalancer(CONFIG).round(alone, {}, 0.0) == [], "they do not crowd each other"
    few = view_of(instance(0, urgent, request("n", blocks=5)), instance(1), load=view.config)
    assert Rebalancer(CONFIG).round(few, {}, 0.0) == []
    full = instance(1, request("a", blocks=50), request("b", blocks=50))
    assert Rebalancer(CONFIG).round(view_of(instance(0, urgent), full, load=view.config), {}, 0.0) == []


@pytest.mark.parametrize("config", [CONFIG, PAPER])
def test_a_draining_instance_is_neither_source_nor_destination(config: RebalancingConfig) -> None:
    """What leaves it is the evacuation's business."""
    full = instance(0, request("a", blocks=50), request("b", blocks=50))
    assert moves(config, full, instance(1)) != []
    for draining in (0, 1):
        assert moves(config, full, instance(1), draining=draining) == []


def test_a_copy_that_would_end_after_memory_has_run_out_is_not_begun() -> None:
    """The trap of long contexts: the copy slows two instances and prevents nothing."""
    rebalancer = Rebalancer(CONFIG)

    def snapshot(step_s: float) -> InstanceSnapshot:
        return replace(instance(0, request("a", blocks=40), request("b", blocks=56)), step_s=step_s)

    def one_move_took(seconds: float) -> None:
        rebalancer.started("past", instance(0, request("past", blocks=10)), 0.0)
        rebalancer.moved("past", seconds, ok=True)
        rebalancer.ended("past")

    view = view_of(snapshot(0.1), instance(1))
    # 2 blocks of 16 tokens each, 0.1 s a token: 3.2 s are left for 40 blocks.
    one_move_took(0.8)
    assert len(rebalancer.round(view, {}, 100.0)) == 1
    for _ in range(5):
        one_move_took(0.9)
    assert rebalancer.round(view, {}, 100.0) == []
    assert len(rebalancer.round(view_of(snapshot(0.2), instance(1)), {}, 100.0)) == 1


def test_small_moves_in_the_past_do_not_keep_a_large_request_from_leaving() -> None:
    """They took their time for messages and steps; an idle instance beside one that preempts would be absurd."""
    rebalancer = Rebalancer(CONFIG)
    for num_blocks in (2, 9, 4, 6):
        rebalancer.started("past", instance(0, request("past", blocks=num_blocks)), 0.0)
        rebalancer.moved("past", 0.2 + 0.01 * num_blocks, ok=True)
        rebalancer.ended("past")
    crowded = replace(instance(0, request("a", blocks=40), request("b", blocks=56)), step_s=0.025)
    assert len(rebalancer.round(view_of(crowded, instance(1)), {}, 100.0)) == 1, "0.6 s of the 0.8 that are left"


@given(clusters, configs)
def test_relief_lowers_the_predicted_imbalance(
    snapshots: tuple[InstanceSnapshot, ...], config: RebalancingConfig
) -> None:
    """Afterwards the destination is better off than the source was, so that nothing is ever wanted back."""
    assume(config.low_freeness >= 0)
    by_number = {s.instance: s for s in snapshots}
    for move in moves(replace(config, rule=RebalancingRule.RELIEF), *snapshots):
        source, destination = by_number[move.source], by_number[move.destination]
        (moved,) = [r for r in source.requests if r.request_id == move.request_id]
        left = destination.num_free_blocks - destination.waiting_demand_blocks - moved.num_blocks - moved.demand_blocks
        kept = config.high_freeness * (destination.num_running + destination.num_waiting + 1)
        if moved.phase is Phase.WAITING:
            assert left >= min(kept, config.start_share * destination.num_blocks), "it can start there"
        else:
            assert left >= kept, "the destination is not needy"
        free = source.num_free_blocks - source.head_demand_blocks
        assert free < 0 or free < config.low_freeness * source.num_running, "the source was"
