"""Late binding: who waits for what, who may go ahead, and that nobody starves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.commands import Command, Dispatch, Move
from arriero.core.config import LoadConfig, QueueingConfig, QueueTerm, RebalancingConfig, SchedulerConfig
from arriero.core.foresight import peak_blocks
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, Phase, RequestId, RequestSnapshot

QUEUEING = QueueingConfig(
    reserve_tokens_per_running=32,
    prefill_backlog_tokens=1000,
    earmark_share=0.5,
    scan_depth=4,
    ttft_target_s_per_token=0,
)


def facts(name: str, blocks: int = 1, priority: int = 0) -> Dispatchable:
    return Dispatchable(request_id=name, num_prompt_tokens=16 * blocks - 1, max_tokens=10, priority=priority)


def running(name: str, blocks: int, prefill_tokens: int = 0) -> RequestSnapshot:
    return RequestSnapshot(request_id=name, phase=Phase.RUNNING, num_blocks=blocks, prefill_tokens=prefill_tokens)


def snapshot(instance: InstanceId, *requests: RequestSnapshot, num_blocks: int = 100) -> InstanceSnapshot:
    return InstanceSnapshot.of(
        requests, instance=instance, time_s=0.0, num_blocks=num_blocks,
        num_free_blocks=num_blocks - sum(r.num_blocks for r in requests), block_size=16, max_num_seqs=8,
    )  # fmt: skip


def cluster(*snapshots: InstanceSnapshot, queueing: QueueingConfig = QUEUEING, **options: object) -> GlobalScheduler:
    config = SchedulerConfig(load=LoadConfig(queue_term=QueueTerm.ALL), queueing=queueing)
    made = GlobalScheduler(replace(config, **options))  # type: ignore[arg-type]
    for shown in snapshots:
        made.instance_joined(shown.instance, 0.0)
        made.snapshot(shown, 0.0)
    return made


def sent(commands: Sequence[Command]) -> dict[RequestId, InstanceId]:
    return {c.request_id: c.instance for c in commands if isinstance(c, Dispatch)}


def test_a_request_waits_until_a_snapshot_shows_room_for_it_and_for_the_growth_of_those_that_run() -> None:
    made = cluster(snapshot(0, running("old", 90)))
    assert made.arrived(facts("new", 9), 0.0) == [], "10 are free, and 2 of them the other's"
    assert made.num_queued == 1
    assert sent(made.snapshot(snapshot(0, running("old", 89)), 1.0)) == {"new": 0}
    assert made.num_queued == 0


def test_small_requests_go_ahead_of_a_large_one_but_not_where_that_is_to_start() -> None:
    made = cluster(snapshot(0, running("a", 60)), snapshot(1, running("b", 70)))
    assert made.arrived(facts("large", 80), 0.0) == []
    assert set(made.view.earmarks.items()) == {(0, 80)}
    assert sent(made.arrived(facts("small", 5), 0.0)) == {"small": 1}
    assert made.arrived(facts("medium", 30), 0.0) == [], "it would fit at 0 alone, which is kept"
    assert sent(made.snapshot(snapshot(0), 1.0)) == {"large": 0}
    made.tick(1.1)
    assert set(made.view.earmarks.items()) == {(1, 30)}, "now it is the medium one's turn"


@pytest.mark.parametrize("priority", [-1, 0])
def test_a_request_starts_where_room_is_first_also_if_another_instance_is_kept_for_it(priority: int) -> None:
    made = cluster(snapshot(0, running("a", 60)), snapshot(1, running("b", 70)))
    made.arrived(facts("large", 80, priority=priority), 0.0)
    made.arrived(facts("later", 40), 0.0)
    assert set(made.view.earmarks.items()) == {(0, 80)}
    assert sent(made.snapshot(snapshot(1), 1.0)) == {"large": 1}, "not the later one, which would fit, too"
    assert not made.view.earmarks


def test_only_a_share_of_the_instances_is_kept_and_one_at_least() -> None:
    full = [snapshot(n, running(f"r{n}", 95)) for n in range(4)]
    made = cluster(*full)
    for number in range(4):
        assert made.arrived(facts(f"large{number}", 50), 0.0) == []
    assert len(made.view.earmarks) == 2
    only = cluster(full[0], queueing=replace(QUEUEING, earmark_share=0))
    only.arrived(facts("large", 50), 0.0)
    assert len(only.view.earmarks) == 1
    only.arrived(facts("another", 50), 0.0)
    assert len(only.view.earmarks) == 1


def test_what_is_kept_is_free_again_when_the_request_or_the_instance_goes() -> None:
    made = cluster(snapshot(0, running("a", 60)), snapshot(1, running("b", 70)), no_instance_timeout_s=60)
    made.arrived(facts("large", 80), 0.0)
    made.ended("large", 0.0)
    assert not made.view.earmarks
    made.arrived(facts("large", 80), 0.0)
    made.instance_draining(0, 0.0)
    made.tick(1.0)
    assert set(made.view.earmarks) == {1}, "it waits for the other one now"
    made.instance_lost(1, 2.0)
    assert not made.view.earmarks
    made.tick(2.0)
    assert made.num_queued == 1
    assert sent(made.instance_joined(7, 3.0)) == {"large": 7}


def test_a_full_batch_or_a_backlog_of_prefills_takes_nobody() -> None:
    full = snapshot(0, *[running(f"r{n}", 1) for n in range(8)])
    assert cluster(full).arrived(facts("new"), 0.0) == []
    busy = snapshot(0, running("old", 70, prefill_tokens=1000))
    assert cluster(busy).arrived(facts("new"), 0.0) == []
    assert sent(cluster(snapshot(0, running("old", 70, prefill_tokens=999))).arrived(facts("new"), 0.0)) == {"new": 0}


def test_an_instance_that_has_shown_nothing_yet_gets_one_request() -> None:
    made = cluster(queueing=QUEUEING)
    made.instance_joined(0, 0.0)
    assert sent(made.arrived(facts("a"), 0.0)) == {"a": 0}
    assert made.arrived(facts("b"), 0.0) == []
    assert sent(made.snapshot(snapshot(0), 0.1)) == {"b": 0}


def test_the_policy_chooses_among_those_with_room() -> None:
    """0 is the freest, but has less room than the request needs; 1 has it."""
    few, many = snapshot(0, running("a", 80)), snapshot(1, *[running(f"b{n}", 14) for n in range(5)])
    assert sent(cluster(few, many).arrived(facts("small", 3), 0.0)) == {"small": 0}
    assert sent(cluster(few, many).arrived(facts("large", 19), 0.0)) == {"large": 1}


def test_the_more_urgent_goes_first_whatever_came_before() -> None:
    made = cluster(snapshot(0, running("old", 95)))
    made.arrived(facts("normal", 60), 0.0)
    made.arrived(facts("urgent", 60, priority=-1), 0.0)
    assert sent(made.snapshot(snapshot(0, running("old", 30)), 1.0)) == {"urgent": 0}
    made = cluster(snapshot(0, *[running(f"r{n}", 1) for n in range(8)]))
    made.arrived(facts("normal", 3), 0.0)
    made.arrived(facts("urgent", 3, priority=-1), 0.0)
    assert list(sent(made.snapshot(snapshot(0), 1.0))) == ["urgent", "normal"]


def test_requests_move_away_from_where_a_large_one_is_to_start() -> None:
    rebalancing = RebalancingConfig(low_freeness=2, high_freeness=2)
    made = cluster(
        snapshot(0, running("a", 30), running("b", 30)), snapshot(1, running("c", 62)), rebalancing=rebalancing
    )
    made.arrived(facts("large", 60), 0.0)
    (move,) = made.tick(0.1)
    assert isinstance(move, Move)
    assert (move.request_id, move.source, move.destination) == ("a", 0, 1)


def test_where_ends_are_known_a_request_is_bound_if_memory_suffices_to_its_end() -> None:
    """When the new one ends, all three hold 50 blocks and 3 partial ones. That the long one will take 61 later is not
    its fault.
    """
    for num_blocks, fits in ((53, True), (52, False)):
        made = cluster(queueing=replace(QUEUEING, trusts_max_tokens=True))
        made.instance_joined(0, 0.0)
        for name, prompt, output in (("short", 10, 10), ("long", 20, 40)):
            made.view.sent(replace(facts(name, prompt), max_tokens=16 * output), 0)
        shown = [replace(running("short", 10), num_tokens=160), replace(running("long", 20), num_tokens=320)]
        made.snapshot(snapshot(0, *shown, num_blocks=num_blocks), 0.0)
        assert bool(sent(made.arrived(replace(facts("new", 5), max_tokens=80), 0.0))) is fits
    stranger = cluster(snapshot(0, running("of another", 90)), queueing=replace(QUEUEING, trusts_max_tokens=True))
    assert peak_blocks(stranger.view, 0) == 2, "its end is not known"


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.integers(1, 3))
def test_nobody_starves(sizes: list[int], num_instances: int) -> None:
    """Whatever fits an empty instance is sent once what runs has ended, and never twice."""
    made = cluster(*[snapshot(n, running(f"old{n}", 95)) for n in range(num_instances)])
    placed = [r for n, size in enumerate(sizes) for r in sent(made.arrived(facts(f"r{n}", size), 0.0))]
    for turn in range(2 * len(sizes)):
        for n in range(num_instances):
            for request in [r for r in placed if made.ledger.instance_of(r) == n]:
                placed += sent(made.ended(request, 1.0 + turn))
            placed += sent(made.snapshot(snapshot(n), 1.0 + turn))
    assert sorted(placed) == sorted(f"r{n}" for n in range(len(sizes)))
