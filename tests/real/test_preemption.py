"""An engine whose memory runs out: the smallest request gives way, and every stream is whole."""

from __future__ import annotations

import asyncio

import pytest

from arriero.core.types import Phase

from .conftest import Engines
from .test_live_migration import sampling

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

BLOCK_BYTES = 32 * 2 * 30 * 3 * 64 * 4  # tokens, keys and values, layers, heads, size, float32
ENGINE_FLAGS = ("--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(40 * BLOCK_BYTES))

PROMPTS = {"small": 64, "middle": 200, "large": 300}


async def test_the_smallest_gives_way_and_goes_on(engines: Engines) -> None:
    prompts = {name: engines.prompt(num_tokens, offset=num_tokens) for name, num_tokens in PROMPTS.items()}
    alone = {name: await engines.run(p, sampling(max_tokens=300)) for name, p in prompts.items()}
    await engines.forget_prefixes()
    engines.cluster.scheduler.instance_draining(1, engines.cluster.clock())  # all go to instance 0, and stay
    stopped: set[str] = set()
    try:
        tasks = {
            name: asyncio.create_task(engines.run(p, sampling(max_tokens=300), name=name))
            for name, p in prompts.items()
        }
        while not all(task.done() for task in tasks.values()):
            begun = {r.request_id: r.external_id for r in engines.cluster.requests if r.tokens}
            stopped |= {
                begun[s.request_id] for s in engines.seen_at(0) if s.phase is Phase.WAITING if s.request_id in begun
            }
            await asyncio.sleep(0.005)
    finally:
        engines.cluster.scheduler.instance_joined(1, engines.cluster.clock())
    assert stopped == {"small"}
    assert engines.cluster.scheduler.snapshot_of(0).num_preemptions > 0
    for name, task in tasks.items():
        assert (await task).tokens == alone[name].tokens
