"""The migration benchmark: what it runs, and what it makes of what it saw."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any, cast

import pytest

from arriero.bench.client import Call, Chunk
from arriero.bench.migration import (
    Plan,
    describe,
    seen_by_client,
    slowdowns,
    summarise,
    surplus,
    targets_of,
)

PLAN = Plan(
    contexts=(256, 7500),
    modes=("live", "stop_and_copy", "recompute"),
    loads=("idle", "loaded"),
    repeats=5,
    recompute_repeats=3,
    neighbours=8,
    before_tokens=40,
    after_tokens=40,
    max_model_len=8192,
    seed=0,
)


def sample(load: str, context: int, mode: str = "live", **fields: Any) -> dict[str, Any]:
    defaults = {
        "ok": True,
        "source_itl_ms": 20.0,
        "destination_itl_ms": 20.0,
        "gap_ms": 24.0,
        "ratio": 1.2,
        "total_ms": 100.0,
        "num_bytes": 1 << 20,
        "stages": [{}],
        "neighbours": {"source": [], "destination": []},
    }
    return {"load": load, "context": context, "mode": mode, "repeat": 0, **defaults, **fields}


def met(samples: list[dict[str, Any]]) -> dict[str, bool]:
    return {target.name: target.met for target in targets_of(summarise(samples))}


# ---------------------------------------------------------------------- the plan


def test_every_context_and_mode_is_run_in_each_repeat_in_an_order_of_its_own() -> None:
    rng = random.Random(0)
    orders = [PLAN.cells(repeat, rng) for repeat in range(3)]
    assert all(sorted(o) == sorted(orders[0]) for o in orders)
    assert set(orders[0]) == {(c, m) for c in PLAN.contexts for m in PLAN.modes}
    assert len({tuple(o) for o in orders}) == 3


def test_recomputation_has_fewer_repeats() -> None:
    rng = random.Random(0)
    counts = [sum(mode == "recompute" for _, mode in PLAN.cells(repeat, rng)) for repeat in range(PLAN.repeats)]
    assert counts == [2, 2, 2, 0, 0]


def test_the_same_seed_gives_the_same_order() -> None:
    plan = replace(PLAN, seed=7)
    assert plan.cells(0, random.Random(plan.seed)) == PLAN.cells(0, random.Random(7))


def test_the_longest_context_has_room_for_its_output() -> None:
    assert PLAN.max_tokens == 692


def test_neighbours_beyond_the_quota_move_to_the_other_side() -> None:
    calls = [cast(Call, f"call {i}") for i in range(4)]
    assert surplus({calls[0]: 0, calls[1]: 0, calls[2]: 0, calls[3]: 1}, 2) == [(calls[2], 1)]
    assert surplus(dict.fromkeys(calls, 1), 2) == [(calls[2], 0), (calls[3], 0)]
    assert surplus(dict(zip(calls, (0, 1, 0, 1), strict=True)), 2) == []


# ---------------------------------------------------------------------- one sample


def test_the_gap_lies_between_the_last_token_of_the_source_and_the_first_of_the_destination() -> None:
    # The source makes a token every 20 ms, slower once the migration has begun at 0.05; the destination every 10 ms.
    chunks = [Chunk(t, 1) for t in (0.0, 0.02, 0.04, 0.08, 0.12, 0.135, 0.145, 0.155, 0.165)]
    seen = seen_by_client(chunks, first=5, started_s=0.05)
    assert seen == {
        "source_itl_ms": pytest.approx(20.0),
        "destination_itl_ms": pytest.approx(10.0),
        "destination_itl_p90_ms": pytest.approx(10.0),
        "gap_ms": pytest.approx(15.0),
        "ratio": pytest.approx(1.5),
    }


def test_neighbours_are_compared_with_their_own_pace_before() -> None:
    # A prefill disturbs them until 1.0: it is no part of "before".
    chunks = [Chunk(t, 1) for t in (0.0, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.6, 2.6)]
    assert slowdowns(chunks, since_s=1.0, started_s=1.3, ended_s=1.6) == pytest.approx([2.0, 1.0])
    assert slowdowns(chunks, since_s=1.0, started_s=1.3, ended_s=1.4) == []


# ---------------------------------------------------------------------- the summary


def test_rows_are_medians_over_the_repeats_that_succeeded() -> None:
    samples = [
        sample("idle", 256, gap_ms=20.0, ratio=1.0),
        sample("idle", 256, gap_ms=22.0, ratio=1.1),
        sample("idle", 256, gap_ms=90.0, ratio=4.5),
        {"load": "idle", "context": 256, "mode": "live", "repeat": 3, "ok": False, "reason": "timeout"},
        sample("idle", 256, "recompute", ratio=10.0),
    ]
    live, recompute = summarise(samples)
    assert (live["repeats"], live["failed"]) == (3, 1)
    assert (live["gap_ms"], live["gap_max_ms"], live["ratio"], live["ratio_max"]) == (22.0, 90.0, 1.1, 4.5)
    assert (live["mebibytes"], live["stages"]) == (1.0, 1.0)
    assert math.isnan(live["neighbours"])
    assert recompute["ratio"] == 10.0


def test_neighbours_of_both_sides_and_all_repeats_are_pooled() -> None:
    samples = [
        sample("loaded", 256, neighbours={"source": [1.0, 1.0], "destination": [1.2]}),
        sample("loaded", 256, neighbours={"source": [1.1], "destination": [1.3]}),
    ]
    (row,) = summarise(samples)
    assert row["neighbours"] == pytest.approx(1.1)
    assert row["neighbours_mean"] == pytest.approx(1.12)
    assert row["neighbour_tokens"] == 5


# ---------------------------------------------------------------------- the targets


def test_targets_that_are_met() -> None:
    beside = {"source": [1.0, 1.04], "destination": [1.05]}
    samples = [sample("idle", 256), sample("idle", 7500), sample("loaded", 256, ratio=1.5, neighbours=beside)]
    verdicts = met(samples)
    assert all(verdicts.values())
    assert len(verdicts) == 6  # three gaps, the growth, the neighbours, the failures


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([sample("idle", 256, ratio=1.31)], "idle, context 256"),
        ([sample("loaded", 4096, ratio=1.51)], "loaded, context 4096"),
        ([sample("idle", 256, ratio=1.0), sample("idle", 7500, ratio=1.11)], "gap at 7500 over gap at 256"),
        ([sample("loaded", 256, neighbours={"source": [1.06], "destination": [1.06]})], "neighbours"),
        ([sample("idle", 256), {**sample("idle", 256), "ok": False}], "failed"),
    ],
)
def test_a_target_that_is_missed(samples: list[dict[str, Any]], words: str) -> None:
    missed = [name for name, is_met in met(samples).items() if not is_met]
    assert len(missed) == 1
    assert words in missed[0]


def test_other_modes_are_shown_but_promise_nothing() -> None:
    assert set(met([sample("idle", 256, "recompute", ratio=50.0)])) == {"migrations that failed"}


def test_a_line_of_progress() -> None:
    assert describe(sample("idle", 256)).endswith("gap 24.0 ms = 1.20 x 20.0 ms")
    assert describe({**sample("idle", 256), "ok": False, "reason": "timeout"}).endswith("failed: timeout")


def test_a_neighbour_whose_tokens_came_in_bursts_is_no_measure() -> None:
    bursts = [Chunk(t, 1) for t in (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.1)]
    assert slowdowns(bursts, 0.0, 2.0, 3.0) == []
