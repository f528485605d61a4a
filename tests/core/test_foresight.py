"""Who knows the future: bounded looks at memory, places kept for requests that are foretold, and who goes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from arriero.core.commands import Command, Dispatch, Move, Reject
from arriero.core.config import LoadConfig, QueueingConfig, QueueTerm, RebalancingConfig, SchedulerConfig
from arriero.core.errors import ConfigError
from arriero.core.foresight import peak_blocks
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, Phase, RequestId, RequestSnapshot

KNOWING = QueueingConfig(
    trusts_max_tokens=True, horizon_s=5.0, patience_s=10.0, ttft_target_s_per_token=0, earmark_share=0.5
)
STEP_S = 0.05  # a hundred steps in the horizon


def facts(name: str, prompt: int, output: int = 16, priority: int = 0) -> Dispatchable:
    """Of so many blocks of prompt, with the place of the first output token in the last of them."""
    return Dispatchable(request_id=name, num_prompt_tokens=16 * prompt - 1, max_tokens=output, priority=priority)


def cluster(
    *running: Sequence[Dispatchable],
    num_blocks: int = 100,
    step_s: float = STEP_S,
    queueing: QueueingConfig = KNOWING,
    **options: object,
) -> GlobalScheduler:
    """An instance for each of the lists, and it runs them."""
    config = SchedulerConfig(load=LoadConfig(queue_term=QueueTerm.ALL), queueing=queueing)
    made = GlobalScheduler(replace(config, **options))  # type: ignore[arg-type]
    for instance, requests in enumerate(running):
        made.instance_joined(instance, 0.0)
        for request in requests:
            made.view.sent(request, instance)
    for instance, requests in enumerate(running):
        made.snapshot(shown(instance, requests, num_blocks, step_s), 0.0)
    return made


def shown(
    instance: InstanceId, requests: Sequence[Dispatchable], num_blocks: int = 100, step_s: float = STEP_S
) -> InstanceSnapshot:
    blocks = {r.request_id: -(-(r.num_prompt_tokens + 1) // 16) for r in requests}
    seen = [
        RequestSnapshot(
            request_id=r.request_id,
            phase=Phase.RUNNING,
            num_tokens=r.num_prompt_tokens,
            num_blocks=blocks[r.request_id],
        )
        for r in requests
    ]
    return InstanceSnapshot.of(
        seen, instance=instance, time_s=0.0, num_blocks=num_blocks, num_free_blocks=num_blocks - sum(blocks.values()),
        block_size=16, max_num_seqs=8, step_s=step_s,
    )  # fmt: skip


def sent(commands: list[Command]) -> dict[RequestId, InstanceId]:
    return {c.request_id: c.instance for c in commands if isinstance(c, Dispatch)}


# ---------------------------------------------------------------------- memory within the horizon


def test_memory_must_suffice_for_the_horizon_alone() -> None:
    """What runs grows by 100 tokens within the horizon, and by 1600 in all; so does the new one."""
    growing, new = [facts("old", 40, 1600)], facts("new", 40, 1600)
    assert sent(cluster(growing).arrived(new, 0.0)) == {"new": 0}
    to_the_end = replace(KNOWING, horizon_s=0.0)
    assert sent(cluster(growing, queueing=to_the_end).arrived(new, 0.0)) == {}
    assert sent(cluster(growing, step_s=0.0).arrived(new, 0.0)) == {}, "no step is known: nor what the horizon is"


def test_what_is_lacking_after_a_request_has_ended_is_not_its_fault() -> None:
    made = cluster([facts("old", 40, 1600)], num_blocks=100)
    assert peak_blocks(made.view, 0) == -(-(16 * 40 - 1 + 1600) // 16) + 1
    assert peak_blocks(made.view, 0, num_steps=16) == 41 + 1
    assert peak_blocks(made.view, 0, facts("new", 40, 16), num_steps=16) == 82 + 2


def test_what_comes_later_meets_those_that_run_then() -> None:
    made = cluster([facts("short", 50, 10), facts("long", 20, 90)])
    made.view.sent(facts("pending", 10, 5), 0)
    new = facts("new", 60, 10)
    assert peak_blocks(made.view, 0, new) > 100
    assert peak_blocks(made.view, 0, new, first=10) == -(-(16 * 20 - 1 + 10 + 16 * 60 - 1 + 20) // 16) + 2
    assert peak_blocks(made.view, 0, new, first=90) == -(-(16 * 60 - 1 + 10) // 16) + 1


def test_an_instance_that_has_shown_nothing_gets_one_request() -> None:
    made = cluster()
    made.instance_joined(0, 0.0)
    assert sent(made.arrived(facts("first", 40), 0.0)) == {"first": 0}
    assert sent(made.arrived(facts("second", 40), 0.0)) == {}


# ---------------------------------------------------------------------- arrivals


def test_an_instance_is_kept_for_a_large_request_that_is_foretold() -> None:
    """Once it has come, it is there that it starts."""
    made = cluster([facts("a", 60, 1600)], [facts("b", 50, 1600)])
    assert made.foretold(facts("large", 70), 3.0, 0.0) == []
    assert made.view.earmarks == {1: 70}
    assert sent(made.arrived(facts("large", 70), 3.0)) == {}
    assert made.view.earmarks == {1: 70}
    made.ended("b", 3.5)
    assert sent(made.snapshot(shown(1, []), 3.5)) == {"large": 1}
    assert made.view.earmarks == {}


def test_requests_move_away_before_it_has_come() -> None:
    old = [facts("a", 10, 1600)], [facts("b", 30, 1600), facts("c", 40, 1600)]
    made = cluster(*old, rebalancing=RebalancingConfig(), num_blocks=100)
    made.view.sent(facts("d", 55, 1600), 0)
    made.snapshot(shown(0, [*old[0], facts("d", 55, 1600)]), 0.0)
    made.foretold(facts("large", 50), 3.0, 0.0)
    assert made.view.earmarks == {0: 50}
    (move,) = [c for c in made.tick(0.25) if isinstance(c, Move)]
    assert (move.request_id, move.source, move.destination) == ("a", 0, 1)


def test_who_waits_takes_over_what_is_kept_for_who_has_not_come() -> None:
    made = cluster([facts("a", 60, 1600)])
    made.foretold(facts("large", 70), 3.0, 0.0)
    made.arrived(facts("here", 50), 1.0)
    assert made.view.earmarks == {0: 50}


def test_small_requests_find_a_place_unless_they_are_urgent() -> None:
    for priority, kept in ((0, {}), (-1, {0: 9})):
        made = cluster([facts("a", 95, 1600)])
        made.foretold(facts("small", 9, priority=priority), 3.0, 0.0)
        assert made.view.earmarks == kept


def test_none_is_kept_where_those_that_run_will_have_ended() -> None:
    """In 3 s are 60 steps: whoever has 59 tokens to go is gone by then."""
    for output, kept in ((59, {}), (200, {0: 70})):
        made = cluster([facts("old", 60, output)])
        made.foretold(facts("large", 70), 3.0, 0.0)
        assert made.view.earmarks == kept
    made = cluster([facts("old", 60, 59)], step_s=0.0)
    made.foretold(facts("large", 70), 3.0, 0.0)
    assert made.view.earmarks == {0: 70}, "no step is known: as if it came now"


def test_the_urgent_have_their_places_first_and_each_tick_looks_again() -> None:
    old = [facts("a", 60, 1600)], [facts("b", 50, 1600)]
    made = cluster(*old)
    made.instance_lost(1, 0.0)  # one instance is left, and one may be kept
    made.instance_lost(0, 0.0)
    made.foretold(facts("normal", 70), 2.0, 0.0)
    made.foretold(facts("urgent", 71, priority=-1), 3.0, 0.0)
    assert made.view.earmarks == {}, "there is nothing to keep"
    made.instance_joined(2, 0.5)
    made.tick(0.5)
    assert made.view.earmarks == {}, "it has shown nothing yet"
    made.view.sent(old[0][0], 2)
    made.snapshot(shown(2, old[0]), 0.6)
    made.tick(0.75)
    assert made.view.earmarks == {2: 71}
    made.tick(1.0)
    assert made.view.earmarks == {2: 71}


def test_a_kept_instance_that_is_lost_is_replaced() -> None:
    old = [facts("a", 60, 1600)], [facts("b", 50, 1600)]
    made = cluster(*old)
    made.foretold(facts("large", 70), 3.0, 0.0)
    made.instance_lost(1, 0.1)
    made.tick(0.25)
    assert made.view.earmarks == {0: 70}


def test_who_is_refused_as_it_comes_keeps_nothing() -> None:
    made = cluster([facts("a", 60, 1600)])
    made.foretold(facts("huge", 170), 3.0, 0.0)
    assert made.view.earmarks == {0: 170}
    (refused,) = made.arrived(facts("huge", 170), 3.0)
    assert isinstance(refused, Reject)
    assert made.view.earmarks == {}


def test_others_hear_nothing() -> None:
    made = cluster([facts("a", 60, 1600)], queueing=QueueingConfig())
    assert made.foretold(facts("large", 70), 3.0, 0.0) == []
    made.tick(0.25)
    assert made.view.earmarks == {}


# ---------------------------------------------------------------------- order


def test_short_prompts_go_first_until_a_long_one_has_waited_enough() -> None:
    """Both fit once the old one is gone, but not together."""
    for now, first in ((9.0, "short"), (11.0, "long")):
        made = cluster([facts("old", 90, 1600)])
        made.arrived(facts("long", 80), 0.0)
        made.arrived(facts("short", 40), 0.5)
        assert made.tick(now) == []
        made.view.ended("old")
        assert list(sent(made.snapshot(shown(0, []), now))) == [first]


def test_urgent_requests_go_before_shorter_ones() -> None:
    made = cluster([facts("old", 90, 1600)])
    made.arrived(facts("short", 40), 0.0)
    made.arrived(facts("urgent", 80, priority=-1), 0.5)
    made.view.ended("old")
    assert list(sent(made.snapshot(shown(0, []), 1.0))) == ["urgent"]


@pytest.mark.parametrize("name", ["horizon_s", "patience_s"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_times_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.* is invalid: it must be 0 or more seconds"):
        QueueingConfig(**{name: value})  # type: ignore[arg-type]
