"""The overhead benchmark: turns, ratios and targets."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.bench.overhead import ARRIERO, STOCK, Plan, ratio, summarise, targets_of, turns

PLAN = Plan(
    concurrencies=(1, 16, 64),
    starts=2,
    rounds=2,
    requests_per_client=2,
    min_requests=16,
    prompt_tokens=64,
    output_tokens=64,
    seed=0,
)


def sample(number: int, server: str, tokens_per_s: float, concurrency: int = 1, **fields: Any) -> dict[str, Any]:
    defaults = {"ttft_ms": [50.0, 52.0], "tpot_ms": [15.0, 17.0]}
    return {"start": 0, "round": number, "concurrency": concurrency, "server": server, "tokens_per_s": tokens_per_s} | (
        defaults | fields
    )


def test_requests_come_in_whole_waves_of_clients() -> None:
    assert [PLAN.num_requests(c) for c in (1, 5, 16, 64)] == [16, 20, 32, 128]


def test_both_servers_have_a_turn_at_each_concurrency_and_who_is_first_changes() -> None:
    plan = list(turns(PLAN))
    assert [(number, c) for number, c, _ in plan] == [(n, c) for n in (0, 1) for c in (1, 16, 64)]
    assert all(set(order) == {ARRIERO, STOCK} for *_, order in plan)
    first = [order[0] for *_, order in plan]
    assert first == [ARRIERO, STOCK, ARRIERO, STOCK, ARRIERO, STOCK]


def test_the_ratio_is_taken_within_rounds() -> None:
    # The machine is twice as fast in the second round; arriero has 1 % less in each.
    samples = [sample(0, ARRIERO, 99.0), sample(0, STOCK, 100.0), sample(1, STOCK, 200.0), sample(1, ARRIERO, 198.0)]
    assert ratio(samples, 1) == pytest.approx(0.99)


def test_each_start_counts_once_in_the_ratio() -> None:
    # Within a start the odd round does not count; between starts the processes are other ones.
    samples = [
        sample(number, server, rate, start=start)
        for start, ratios in enumerate([(0.98, 0.98, 0.5), (1.02, 1.02, 1.02)])
        for number, arriero in enumerate(ratios)
        for server, rate in ((ARRIERO, 100 * arriero), (STOCK, 100.0))
    ]
    assert ratio(samples, 1) == pytest.approx(1.0)


def test_latencies_of_all_rounds_are_taken_together() -> None:
    samples = [
        sample(0, STOCK, 100.0, ttft_ms=[10.0, 20.0]),
        sample(1, STOCK, 120.0, ttft_ms=[30.0]),
        sample(0, ARRIERO, 100.0),
        sample(1, ARRIERO, 120.0),
    ]
    stock, arriero = summarise(samples)
    assert (stock["server"], stock["requests"], stock["tokens_per_s"]) == (STOCK, 3, 110.0)
    assert stock["ttft_p50_ms"] == 20.0
    assert stock["ttft_p99_ms"] == pytest.approx(29.8)
    assert (arriero["server"], arriero["throughput_ratio"]) == (ARRIERO, 1.0)


@pytest.mark.parametrize(
    ("tokens_per_s", "ttft_ms", "verdicts"),
    [
        (98.0, 51.0, (True, True)),
        (97.9, 51.0, (False, True)),
        (105.0, 51.1, (True, False)),
    ],
)
def test_targets(tokens_per_s: float, ttft_ms: float, verdicts: tuple[bool, bool]) -> None:
    samples = [sample(0, STOCK, 100.0, ttft_ms=[50.0]), sample(0, ARRIERO, tokens_per_s, ttft_ms=[ttft_ms])]
    assert tuple(target.met for target in targets_of(summarise(samples))) == verdicts


def test_the_first_token_is_compared_at_the_lowest_concurrency_only() -> None:
    samples = [
        sample(0, server, 100.0, concurrency, ttft_ms=[concurrency * slow])
        for concurrency in (1, 16)
        for server, slow in ((STOCK, 1.0), (ARRIERO, 1.5))
    ]
    *throughputs, ttft = targets_of(summarise(samples))
    assert len(throughputs) == 2
    assert ttft.value == pytest.approx(0.5)
