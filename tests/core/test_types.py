"""The vocabulary: values that count what they hold, and never change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.types import Dispatchable, InstanceSnapshot, InstanceState, MigrationMode, Phase, RequestSnapshot

SNAPSHOT = InstanceSnapshot(
    instance=1, time_s=0.0, num_blocks=10, num_free_blocks=10, block_size=16, max_num_seqs=4, requests=()
)


@given(st.lists(st.sampled_from(Phase)))
def test_a_snapshot_counts_running_and_waiting_requests_and_no_others(phases: list[Phase]) -> None:
    requests = tuple(RequestSnapshot(request_id=f"r{n}", phase=phase) for n, phase in enumerate(phases))
    fields = {
        name: getattr(SNAPSHOT, name)
        for name in ("instance", "time_s", "num_blocks", "num_free_blocks", "block_size", "max_num_seqs")
    }
    snapshot = InstanceSnapshot.of(requests, **fields)
    assert snapshot.num_running == phases.count(Phase.RUNNING)
    assert snapshot.num_waiting == phases.count(Phase.WAITING)


@pytest.mark.parametrize(
    ("phase", "num_tokens", "num_computed", "demand_blocks", "prefill_tokens"),
    [
        pytest.param(Phase.RUNNING, 100, 60, 7, 40, id="a prompt in parts: blocks of all of it and the next token"),
        pytest.param(Phase.RUNNING, 96, 94, 7, 2, id="the next token begins a block"),
        pytest.param(Phase.RUNNING, 95, 93, 6, 2, id="the next token fills the last block"),
        pytest.param(Phase.RUNNING, 100, 99, 0, 0, id="it decodes"),
        pytest.param(Phase.RUNNING, 100, 100, 0, 0, id="its token is being computed"),
        pytest.param(Phase.WAITING, 100, 0, 7, 100, id="it waits"),
        pytest.param(Phase.WAITING, 100, 99, 7, 1, id="it waits with all but a token computed: it has no place yet"),
    ],
)
def test_a_request_demands_what_its_prompt_and_the_next_token_take(
    phase: Phase, num_tokens: int, num_computed: int, demand_blocks: int, prefill_tokens: int
) -> None:
    request = RequestSnapshot.of(
        request_id="r",
        phase=phase,
        priority=-3,
        num_tokens=num_tokens,
        num_computed=num_computed,
        num_blocks=4,
        block_size=16,
    )
    assert (request.demand_blocks, request.prefill_tokens) == (demand_blocks, prefill_tokens)
    assert (request.phase, request.priority, request.num_tokens, request.num_blocks) == (phase, -3, num_tokens, 4)


def test_the_aggregates_of_a_snapshot_are_sums_over_its_requests() -> None:
    def request(phase: Phase, **figures: int) -> RequestSnapshot:
        return RequestSnapshot(request_id="r", phase=phase, **figures)

    snapshot = InstanceSnapshot.of(
        [
            request(Phase.RUNNING, priority=1, prefill_tokens=100, num_blocks=2, demand_blocks=9),
            request(Phase.RUNNING, priority=-1, num_blocks=3, demand_blocks=3),
            request(Phase.RUNNING, priority=1),
            request(Phase.WAITING, demand_blocks=4, prefill_tokens=60),
            request(Phase.WAITING, demand_blocks=3, prefill_tokens=40, priority=-7),
            request(Phase.FROZEN, num_blocks=5),
            request(Phase.INCOMING, num_blocks=6, prefill_tokens=5),
        ],
        instance=0,
        time_s=0.0,
        num_blocks=10,
        num_free_blocks=2,
        block_size=16,
        max_num_seqs=4,
    )
    assert (snapshot.head_demand_blocks, snapshot.waiting_demand_blocks) == (4, 7)
    assert snapshot.prefill_tokens == 200
    assert (snapshot.prefill_demand_blocks, snapshot.num_unclaimed_blocks) == (7, -5)
    assert snapshot.running_by_priority == ((-1, 1), (1, 2))


@pytest.mark.parametrize(
    "value",
    [
        SNAPSHOT,
        RequestSnapshot(request_id="r", phase=Phase.WAITING),
        Dispatchable(request_id="r", num_prompt_tokens=1, max_tokens=1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_cannot_be_changed(value: Any) -> None:
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, getattr(value, field.name))


def test_states_phases_and_modes_are_their_own_names_on_the_wire_and_in_urls() -> None:
    for member in (*InstanceState, *Phase, *MigrationMode):
        assert str(member) == member.value == member.name.lower()
