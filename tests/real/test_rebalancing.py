"""`--rebalance`: requests leave the fuller instance by themselves, and their streams do not notice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .conftest import Engines
from .test_live_migration import sampling

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

ENGINE_FLAGS = ("--dtype", "float32", "--rebalance", "--rebalance-low", "65", "--rebalance-high", "75")


def moved(engines: Engines) -> list[dict[str, Any]]:
    """The moves until now that succeeded, the oldest first."""
    return [e for e in engines.cluster.events.recent(1000) if e["event"] == "migration" and e["ok"]]


async def test_a_skewed_load_evens_out_and_stays_even(engines: Engines) -> None:
    """Six long requests start on instance 0 of two: some move, none moves back, all are whole."""
    prompts = [engines.prompt(400, offset=40 * i) for i in range(6)]
    stayed = await asyncio.gather(*(engines.run(p, sampling(max_tokens=200)) for p in prompts))
    await engines.forget_prefixes()
    num_before = len(moved(engines))
    engines.cluster.scheduler.instance_draining(1, engines.cluster.clock())
    try:
        tasks = [asyncio.create_task(engines.run(p, sampling(max_tokens=200))) for p in prompts]
        while sum(len(r.tokens) > 0 for r in engines.cluster.requests) < 6:
            await asyncio.sleep(0.01)
    finally:
        engines.cluster.scheduler.instance_joined(1, engines.cluster.clock())
    for task, reference in zip(tasks, stayed, strict=True):
        assert (await task).tokens == reference.tokens
    moves = moved(engines)[num_before:]
    assert len(moves) == 3
    assert {(m["source"], m["destination"]) for m in moves} == {(0, 1)}
    assert "on demand" not in {m["cause"] for m in moves}
