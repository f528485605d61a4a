"""Virtual usage and freeness, against the paper's formula (Llumnix, OSDI'24, section 4.4.2)."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.config import LoadConfig, QueueTerm
from arriero.core.load import freeness, headroom, virtual_usage
from arriero.core.types import InstanceSnapshot, Phase, RequestSnapshot

PAPER = LoadConfig()
ARTIFACT = LoadConfig(queue_term=QueueTerm.ALL)
CONFIGS = st.builds(
    LoadConfig,
    queue_term=st.sampled_from(QueueTerm),
    load_targets=st.sampled_from([(), ((-1, 0.25),), ((-2, 0.125), (0, 0.5))]),
)

HOLDING = (Phase.RUNNING, Phase.FROZEN, Phase.INCOMING)


def request(phase: Phase, blocks: int, name: str = "r", priority: int = 0, demand: int = 0) -> RequestSnapshot:
    """A request that holds (or, while it waits, will need) ``blocks``; ``demand``: its prompt's, while it runs."""
    if phase is Phase.WAITING:
        return RequestSnapshot(request_id=name, phase=phase, demand_blocks=blocks, priority=priority)
    if phase is not Phase.RUNNING:
        demand = 99
    return RequestSnapshot(request_id=name, phase=phase, num_blocks=blocks, demand_blocks=demand, priority=priority)


def snapshot(*requests: RequestSnapshot, num_blocks: int = 100) -> InstanceSnapshot:
    return InstanceSnapshot.of(
        requests,
        instance=0,
        time_s=0.0,
        num_blocks=num_blocks,
        num_free_blocks=num_blocks - sum(r.num_blocks for r in requests),
        block_size=16,
        max_num_seqs=8,
    )


requests = st.builds(
    request,
    st.sampled_from(Phase),
    st.integers(0, 200),
    priority=st.integers(-3, 2),
    demand=st.just(0) | st.integers(0, 400),
)
snapshots = st.builds(
    lambda rs, num_blocks: snapshot(*rs, num_blocks=num_blocks), st.lists(requests, max_size=8), st.integers(1, 1000)
)


@pytest.mark.parametrize("phase", HOLDING)
def test_a_request_with_blocks_counts_the_blocks_that_it_holds(phase: Phase) -> None:
    for is_head_of_line in (True, False):
        assert virtual_usage(request(phase, 7), PAPER, is_head_of_line=is_head_of_line) == 7


def test_a_prompt_that_is_computed_in_parts_counts_whole_from_the_first_part_on() -> None:
    assert virtual_usage(request(Phase.RUNNING, 7, demand=30), PAPER) == 30
    assert virtual_usage(request(Phase.RUNNING, 30, demand=30), PAPER) == 30
    others = [request(Phase.RUNNING, 20), request(Phase.WAITING, 5)]
    assert freeness(snapshot(request(Phase.RUNNING, 7, demand=30), *others), PAPER) == (100 - 30 - 20 - 5) / 2


def test_a_waiting_request_counts_its_demand_at_the_head_of_the_line_and_nothing_behind_it() -> None:
    assert virtual_usage(request(Phase.WAITING, 7), PAPER, is_head_of_line=True) == 7
    assert virtual_usage(request(Phase.WAITING, 7), PAPER, is_head_of_line=False) == 0


def test_freeness_is_what_is_left_for_each_running_request() -> None:
    running = [request(Phase.RUNNING, 20), request(Phase.RUNNING, 10)]
    assert freeness(snapshot(*running), PAPER) == (100 - 30) / 2


def test_an_idle_instance_is_as_free_as_it_has_blocks() -> None:
    assert freeness(snapshot(), PAPER) == 100


def test_a_queue_head_that_cannot_fit_makes_an_instance_look_overloaded() -> None:
    """The rule that defragments: running requests move away to make room for it."""
    assert freeness(snapshot(request(Phase.RUNNING, 60), request(Phase.WAITING, 50)), PAPER) == -10


def test_only_the_head_of_the_line_counts_wherever_running_requests_stand_in_the_list() -> None:
    line = [request(Phase.WAITING, 5), request(Phase.RUNNING, 20), request(Phase.WAITING, 70)]
    assert freeness(snapshot(*line), PAPER) == 100 - 25


def test_all_who_wait_count_where_the_configuration_says_so() -> None:
    line = snapshot(request(Phase.WAITING, 5), request(Phase.RUNNING, 20), request(Phase.WAITING, 70))
    assert freeness(line, ARTIFACT) == 100 - 20 - 75


@pytest.mark.parametrize(("priority", "free"), [(-5, 12), (-2, 12), (-1, 50), (0, 50), (1, 100)])
def test_headroom_stays_free_for_urgent_requests_by_their_level(priority: int, free: int) -> None:
    config = LoadConfig(load_targets=((-2, 0.125), (0, 0.5)))
    assert 100 - headroom(priority, config, 100) == free + (free == 12)
    assert freeness(snapshot(request(Phase.RUNNING, 3, priority=priority)), config) == free + (free == 12) - 3


@given(snapshots, CONFIGS, st.integers(0, 500), st.integers(0, 5))
def test_freeness_is_the_formula_of_the_paper(
    load: InstanceSnapshot, config: LoadConfig, pending: int, num_pending: int
) -> None:
    """From the aggregates, what the sum over all requests is."""
    batch = Counter(r.priority for r in load.requests if r.phase is Phase.RUNNING)
    head = next((r for r in load.requests if r.phase is Phase.WAITING), None)
    usage = math.fsum(
        virtual_usage(
            r,
            config,
            is_head_of_line=r is head,
            num_blocks=load.num_blocks,
            num_peers=batch[r.priority],
        )
        for r in load.requests
    )
    expected = (load.num_blocks - usage - pending) / max(1, batch.total() + num_pending)
    assert freeness(load, config, pending_blocks=pending, num_pending=num_pending) == pytest.approx(expected)


@given(snapshots, CONFIGS, st.integers(1, 500))
def test_demand_on_its_way_always_makes_an_instance_less_free(
    load: InstanceSnapshot, config: LoadConfig, pending: int
) -> None:
    assert freeness(load, config, pending_blocks=pending) < freeness(load, config)


@given(snapshots, st.integers(0, 200))
def test_one_more_in_a_queue_changes_nothing_for_those_who_look_only_at_its_head(
    load: InstanceSnapshot, demand: int
) -> None:
    queued = [request(Phase.WAITING, 3), *load.requests]
    longer = [*queued, request(Phase.WAITING, demand)]
    assert freeness(snapshot(*longer), PAPER) == freeness(snapshot(*queued), PAPER)
