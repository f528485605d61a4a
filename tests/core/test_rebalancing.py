"""Rebalancing rules: who gives, who takes, and which request moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.config import RebalancingConfig
from arriero.core.rebalancing import choose_request, pair
from arriero.core.types import InstanceId, InstanceSnapshot, Phase, RequestSnapshot

CONFIG = RebalancingConfig(low_freeness=3, high_freeness=10, min_gain=0.1)
NOBODY: frozenset[str] = frozenset()

freenesses = st.one_of(st.integers(-20, 40).map(float), st.just(-math.inf))
free_maps = st.dictionaries(st.integers(0, 60), freenesses, max_size=12)
configs = st.builds(
    lambda low, gap, gain: RebalancingConfig(low_freeness=low, high_freeness=low + gap, min_gain=gain),
    st.integers(-5, 20),
    st.integers(0, 10),
    st.sampled_from([0.0, 0.1, 0.5, 0.9]),
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


def room(snapshot: InstanceSnapshot) -> int:
    """Free blocks once everybody who waits has got what it waits for."""
    waiting = [r for r in snapshot.requests if r.phase is Phase.WAITING]
    return snapshot.num_free_blocks - sum(r.demand_blocks for r in waiting)


def moved(
    source: InstanceSnapshot, destination: InstanceSnapshot, chosen: RequestSnapshot
) -> tuple[InstanceSnapshot, InstanceSnapshot]:
    """Both instances as they look after the move."""
    left = [r for r in source.requests if r is not chosen]
    return (
        with_requests(source, left, source.num_free_blocks + chosen.num_blocks),
        with_requests(destination, [*destination.requests, chosen], destination.num_free_blocks - chosen.num_blocks),
    )


def with_requests(
    snapshot: InstanceSnapshot, requests: Sequence[RequestSnapshot], num_free_blocks: int
) -> InstanceSnapshot:
    return InstanceSnapshot.of(
        requests, instance=snapshot.instance, time_s=0.0, num_blocks=snapshot.num_blocks,
        num_free_blocks=num_free_blocks, block_size=16, max_num_seqs=8,
    )  # fmt: skip


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


# ---------------------------------------------------------------------- which request


def choose(*requests: RequestSnapshot, resting: frozenset[str] = NOBODY) -> str | None:
    """The name of the request that leaves an instance with ``requests`` for an empty one of equal size."""
    chosen = choose_request(instance(0, *requests), instance(1), CONFIG, resting)
    return None if chosen is None else chosen.request_id


def test_a_waiting_request_moves_first_because_it_moves_without_a_copy() -> None:
    assert choose(request("runs", tokens=1), request("waits", Phase.WAITING, tokens=500)) == "waits"


def test_then_the_less_urgent_request_moves_and_then_the_shorter_one() -> None:
    """vLLM's sign: the higher number is the less urgent."""
    urgent, normal = request("urgent", priority=-1, tokens=1), request("normal", tokens=90)
    assert choose(urgent, normal) == "normal"
    assert choose(request("long", tokens=90), request("short", tokens=10)) == "short"
    assert choose(request("b"), request("a")) == "a"


@pytest.mark.parametrize("phase", [Phase.FROZEN, Phase.INCOMING])
def test_a_request_that_is_moving_is_left_alone(phase: Phase) -> None:
    assert choose(request("moves", phase)) is None
    assert choose(request("moves", phase), request("runs", tokens=500)) == "runs"


def test_a_request_that_rests_is_left_alone() -> None:
    assert choose(request("rests"), resting=frozenset({"rests"})) is None
    assert choose(request("rests"), request("runs", tokens=500), resting=frozenset({"rests"})) == "runs"


def test_a_request_must_fit_with_the_block_that_it_writes_next() -> None:
    crowd = (request("other", Phase.FROZEN, blocks=80), request("line", Phase.WAITING, blocks=200))
    source = instance(0, request("runs", blocks=20), *crowd)
    for free, fits in ((20, False), (21, True)):
        chosen = choose_request(source, instance(1, num_blocks=free), CONFIG, NOBODY)
        assert (chosen is not None) is fits
    waiting = instance(0, request("waits", Phase.WAITING, blocks=20), num_blocks=0)
    for free, fits in ((19, False), (20, True)):
        chosen = choose_request(waiting, instance(1, num_blocks=free), CONFIG, NOBODY)
        assert (chosen is not None) is fits


def test_a_request_that_would_only_turn_the_imbalance_over_stays() -> None:
    """Gap 40 blocks; the move of 40 would leave the same gap the other way round."""
    source, destination = instance(0, request("big", blocks=39), num_blocks=39), instance(1, num_blocks=40)
    for gain in (0.0, 0.1):
        config = RebalancingConfig(min_gain=gain)
        assert choose_request(source, destination, config, NOBODY) is None


def test_a_move_must_be_worth_its_share_of_the_gap() -> None:
    """Gap 100 blocks: a move of n blocks gains 2n; 5 blocks and the next are 12 %, 4 and the next are 10 %."""
    for blocks, min_gain, moves in ((4, 0.1, True), (3, 0.1, False), (24, 0.5, True), (23, 0.5, False)):
        source = instance(0, request("r", blocks=blocks), num_blocks=blocks)
        config = RebalancingConfig(min_gain=min_gain)
        assert (choose_request(source, instance(1), config, NOBODY) is not None) is moves


def test_a_waiting_queue_counts_as_use_on_both_sides() -> None:
    """The destination has more free blocks, but a longer line for them: nothing moves there."""
    line = [request(f"w{n}", Phase.WAITING, blocks=40) for n in range(3)]
    source = instance(0, request("runs", blocks=40), request("moves", Phase.FROZEN, blocks=55))
    assert choose_request(source, instance(1, *line), CONFIG, NOBODY) is None
    assert choose_request(source, instance(1), CONFIG, NOBODY) is not None


@given(instances(0), instances(1), configs, st.data())
def test_whoever_moves_is_free_to_move_and_fits(
    source: InstanceSnapshot, destination: InstanceSnapshot, config: RebalancingConfig, data: st.DataObject
) -> None:
    names = [r.request_id for r in source.requests]
    resting = frozenset(data.draw(st.sets(st.sampled_from(names)))) if names else NOBODY
    chosen = choose_request(source, destination, config, resting)
    if chosen is not None:
        assert chosen in source.requests
        assert chosen.request_id not in resting
        assert chosen.phase in (Phase.WAITING, Phase.RUNNING)
        assert max(chosen.num_blocks, chosen.demand_blocks) <= destination.num_free_blocks


@given(instances(0), instances(1), configs)
def test_a_move_lowers_the_imbalance(
    source: InstanceSnapshot, destination: InstanceSnapshot, config: RebalancingConfig
) -> None:
    chosen = choose_request(source, destination, config, NOBODY)
    if chosen is not None:
        gap = room(destination) - room(source)
        emptier, fuller = moved(source, destination, chosen)
        assert abs(room(fuller) - room(emptier)) < gap


@given(instances(0), instances(1), configs)
def test_a_request_is_not_wanted_back_from_where_it_moved(
    source: InstanceSnapshot, destination: InstanceSnapshot, config: RebalancingConfig
) -> None:
    """No ping-pong, even without a rest between two moves."""
    chosen = choose_request(source, destination, config, NOBODY)
    if chosen is not None:
        emptier, fuller = moved(source, destination, chosen)
        back = choose_request(fuller, emptier, config, NOBODY)
        assert back is None or back.request_id != chosen.request_id


# ---------------------------------------------------------------------- draining


def test_everything_leaves_a_draining_instance_that_fits_elsewhere_though_the_gap_widens() -> None:
    """The draining instance is nearly empty: by the gap alone, nothing would leave it, and it would never end."""
    source, destination = instance(0, request("last", blocks=2)), instance(1, request("busy", blocks=60))
    assert choose_request(source, destination, CONFIG, NOBODY) is None
    chosen = choose_request(source, destination, CONFIG, NOBODY, draining=True)
    assert chosen is not None
    assert chosen.request_id == "last"
    full = instance(1, request("busy", blocks=98))
    assert choose_request(source, full, CONFIG, NOBODY, draining=True) is None


# ---------------------------------------------------------------------- on their way


def test_requests_on_their_way_count_on_both_sides() -> None:
    """Right after a burst a destination that still looks empty is not: it has been given its part."""
    source = instance(0, request("runs", blocks=20), request("moves", Phase.FROZEN, blocks=40))
    config = RebalancingConfig(min_gain=0)
    for here, there, moves in ((0, 0, True), (0, 38, True), (0, 39, False), (60, 79, True), (60, 80, False)):
        chosen = choose_request(source, instance(1), config, NOBODY, pending_blocks=(here, there))
        assert (chosen is not None) is moves, (here, there)
