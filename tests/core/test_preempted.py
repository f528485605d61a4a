"""Preemptions as load reports show them, and which of them a move could have avoided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arriero.core.config import SchedulerConfig
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import InstanceId, InstanceSnapshot, Phase, RequestSnapshot

SIZE = 16


def request(
    name: str, num_tokens: int, phase: Phase = Phase.RUNNING, num_computed: int | None = None
) -> RequestSnapshot:
    return RequestSnapshot.of(
        request_id=name,
        phase=phase,
        priority=0,
        num_tokens=num_tokens,
        num_computed=num_tokens - 1 if num_computed is None else num_computed,
        num_blocks=0 if phase is Phase.WAITING else -(-num_tokens // SIZE),
        block_size=SIZE,
    )


def report(instance: InstanceId, *requests: RequestSnapshot, free: int = 0, preemptions: int = 0) -> InstanceSnapshot:
    return InstanceSnapshot.of(
        requests,
        instance=instance,
        time_s=0.0,
        num_blocks=40,
        num_free_blocks=free,
        block_size=SIZE,
        max_num_seqs=8,
        num_preemptions=preemptions,
    )


def scheduler(*reports: InstanceSnapshot) -> GlobalScheduler:
    made = GlobalScheduler(SchedulerConfig(rebalancing=None))
    for told in reports:
        made.instance_joined(told.instance, 0.0)
        made.snapshot(told, 0.0)
    return made


BEFORE = report(0, request("small", 3 * SIZE), request("large", 9 * SIZE), request("prompt", SIZE, num_computed=0))
AFTER = report(0, request("small", 3 * SIZE + 1), request("large", 9 * SIZE, Phase.WAITING), preemptions=1)


@pytest.mark.parametrize(("free", "avoidable"), [(0, False), (4, False), (5, True), (40, True)])
def test_it_was_avoidable_if_the_smallest_that_decoded_had_room_elsewhere(free: int, avoidable: bool) -> None:
    """With its next token the smallest takes a fourth block; who goes there wants one more for what comes."""
    (found,) = scheduler(BEFORE, report(1, free=free), report(2)).preempted_in(AFTER)
    assert (found.request_id, found.smallest_blocks, found.free_blocks) == ("large", 4, free)
    assert found.avoidable is avoidable
    assert found.roomiest == 1


def test_an_instance_that_takes_nobody_is_no_way_out() -> None:
    cluster = scheduler(BEFORE, report(1, free=40), report(2, free=6))
    cluster.instance_draining(1, 1.0)
    (found,) = cluster.preempted_in(AFTER)
    assert (found.roomiest, found.free_blocks, found.avoidable) == (2, 6, True)


def test_blocks_that_a_prompt_is_going_to_take_are_no_room() -> None:
    other = report(1, request("prompt", 9 * SIZE, num_computed=SIZE), free=10)  # computed in parts: 9 blocks to come
    other = replace(other, prefill_demand_blocks=9)
    (found,) = scheduler(BEFORE, other, report(2, free=2)).preempted_in(AFTER)
    assert (found.roomiest, found.free_blocks, found.avoidable) == (2, 2, False)


def test_alone_an_instance_has_no_way_out() -> None:
    (found,) = scheduler(BEFORE).preempted_in(AFTER)
    assert (found.roomiest, found.free_blocks, found.avoidable) == (None, 0, False)


def test_where_only_prompts_were_computed_there_was_nobody_to_move() -> None:
    before = report(0, request("a", 5 * SIZE, num_computed=SIZE), request("b", 5 * SIZE, num_computed=SIZE))
    after = report(0, request("a", 5 * SIZE), request("b", 5 * SIZE, Phase.WAITING), preemptions=1)
    (found,) = scheduler(before, report(1, free=40)).preempted_in(after)
    assert (found.request_id, found.smallest_blocks, found.avoidable) == ("b", None, False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BEFORE, report(0, request("small", 50), request("large", 150))),
        (BEFORE, report(0, request("new", 50, Phase.WAITING))),  # nobody was preempted: it has just come
        (BEFORE, report(0, request("new", 50, Phase.WAITING), preemptions=1)),  # who was is gone
        (report(0, request("large", 150, Phase.WAITING), preemptions=1), AFTER),  # told before
    ],
)
def test_who_waits_for_another_reason_was_not_preempted(before: InstanceSnapshot, after: InstanceSnapshot) -> None:
    assert scheduler(before, report(1, free=40)).preempted_in(after) == []


def test_a_first_report_shows_no_preemption() -> None:
    made = GlobalScheduler(SchedulerConfig(rebalancing=None))
    made.instance_joined(0, 0.0)
    assert made.preempted_in(AFTER) == []
