"""Virtual usage and freeness, against the paper's formula (Llumnix, OSDI'24, section 4.4.2)."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.load import freeness, virtual_usage
from arriero.core.types import InstanceSnapshot, Phase, RequestSnapshot

HOLDING = (Phase.RUNNING, Phase.FROZEN, Phase.INCOMING)


def request(phase: Phase, blocks: int, name: str = "r") -> RequestSnapshot:
    """A request that holds (or, while it waits, will need) ``blocks``."""
    if phase is Phase.WAITING:
        return RequestSnapshot(request_id=name, phase=phase, demand_blocks=blocks)
    return RequestSnapshot(request_id=name, phase=phase, num_blocks=blocks, demand_blocks=99)


def snapshot(*requests: RequestSnapshot, num_blocks: int = 100) -> InstanceSnapshot:
    return InstanceSnapshot(
        instance=0,
        time_s=0.0,
        num_blocks=num_blocks,
        num_free_blocks=0,
        block_size=16,
        max_num_seqs=8,
        requests=requests,
    )


requests = st.builds(request, st.sampled_from(Phase), st.integers(0, 200))
snapshots = st.builds(
    lambda rs, num_blocks: snapshot(*rs, num_blocks=num_blocks), st.lists(requests, max_size=8), st.integers(1, 1000)
)


@pytest.mark.parametrize("phase", HOLDING)
def test_a_request_with_blocks_counts_the_blocks_that_it_holds(phase: Phase) -> None:
    for is_head_of_line in (True, False):
        assert virtual_usage(request(phase, 7), is_head_of_line=is_head_of_line) == 7


def test_a_waiting_request_counts_its_demand_at_the_head_of_the_line_and_nothing_behind_it() -> None:
    assert virtual_usage(request(Phase.WAITING, 7), is_head_of_line=True) == 7
    assert virtual_usage(request(Phase.WAITING, 7), is_head_of_line=False) == 0


def test_freeness_is_what_is_left_for_each_running_request() -> None:
    running = [request(Phase.RUNNING, 20), request(Phase.RUNNING, 10)]
    assert freeness(snapshot(*running)) == (100 - 30) / 2


def test_an_idle_instance_is_as_free_as_it_has_blocks() -> None:
    assert freeness(snapshot()) == 100


def test_a_queue_head_that_cannot_fit_makes_an_instance_look_overloaded() -> None:
    """The rule that defragments: running requests move away to make room for it."""
    assert freeness(snapshot(request(Phase.RUNNING, 60), request(Phase.WAITING, 50))) == -10


def test_only_the_head_of_the_line_counts_wherever_running_requests_stand_in_the_list() -> None:
    line = [request(Phase.WAITING, 5), request(Phase.RUNNING, 20), request(Phase.WAITING, 70)]
    assert freeness(snapshot(*line)) == 100 - 25


def test_a_draining_instance_is_infinitely_full_even_if_it_is_idle() -> None:
    assert freeness(snapshot(), draining=True) == -math.inf


@given(snapshots, st.integers(0, 500))
def test_freeness_is_the_formula_of_the_paper(load: InstanceSnapshot, pending: int) -> None:
    waiting = [r.demand_blocks for r in load.requests if r.phase is Phase.WAITING]
    held = sum(r.num_blocks for r in load.requests if r.phase in HOLDING)
    batch = [r for r in load.requests if r.phase is Phase.RUNNING]
    expected = Fraction(load.num_blocks - held - sum(waiting[:1]) - pending, max(1, len(batch)))
    assert freeness(load, pending_blocks=pending) == float(expected)


@given(snapshots, st.integers(1, 500))
def test_requests_on_their_way_always_make_an_instance_less_free(load: InstanceSnapshot, pending: int) -> None:
    assert freeness(load, pending_blocks=pending) < freeness(load)


@given(snapshots, st.integers(0, 200))
def test_one_more_in_a_queue_changes_nothing_for_those_who_look_only_at_its_head(
    load: InstanceSnapshot, demand: int
) -> None:
    queued = replace(load, requests=(request(Phase.WAITING, 3), *load.requests))
    longer = replace(queued, requests=(*queued.requests, request(Phase.WAITING, demand)))
    assert freeness(longer) == freeness(queued)


@given(snapshots, st.randoms(use_true_random=False))
def test_the_order_of_requests_that_hold_blocks_does_not_matter(load: InstanceSnapshot, random) -> None:  # type: ignore[no-untyped-def]
    holding = [r for r in load.requests if r.phase is not Phase.WAITING]
    waiting = [r for r in load.requests if r.phase is Phase.WAITING]
    random.shuffle(holding)
    assert freeness(replace(load, requests=(*holding, *waiting))) == freeness(load)
