"""Who gets what on two real engines: the urgent overtake the line, streams go on beside long prompts; and all that was
decided can be repeated.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest

from arriero.observe.parity import replay

from .conftest import Engines
from .test_live_migration import sampling

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

FOLDER = tempfile.TemporaryDirectory(prefix="arriero-real-")
LOG = Path(FOLDER.name) / "events.jsonl"
ENGINE_FLAGS = ("--max-num-seqs", "2", "--itl-target-ms", "100", "--event-log", str(LOG), "--event-log-level", "full")


async def generate(
    engines: Engines, name: str, priority: int, started: list[str], max_tokens: int, num_prompt: int = 100
) -> int:
    """The tokens that came; ``started`` hears of the first."""
    num_tokens = 0
    prompt = {"prompt_token_ids": engines.prompt(num_prompt, offset=7 * len(name))}
    params = sampling(max_tokens=max_tokens, ignore_eos=True)
    async for output in engines.llm.generate(prompt, params, name, priority=priority):
        if not num_tokens:
            started.append(name)
        num_tokens += len(output.outputs[0].token_ids)
    return num_tokens


async def test_streams_go_on_while_a_long_prompt_is_computed_beside_them(engines: Engines) -> None:
    """In vLLM's own steps they would stand still until its first token. It is the first prompt of these engines: they
    know from their start what its tokens take.
    """
    # More than they can have before the prompt is computed, even if its parts take 60 steps and more each token.
    streams = [asyncio.create_task(generate(engines, f"stream-{i}", 0, [], 4000 + i, num_prompt=1)) for i in range(2)]
    try:
        while len(engines.cluster.requests) < 2 or not all(r.tokens for r in engines.cluster.requests):
            await asyncio.sleep(0.01)
        running = list(engines.cluster.requests)
        assert {r.route for r in running} == {0, 1}
        begun = [len(r.tokens) for r in running]
        prompt = {"prompt_token_ids": engines.prompt(2000, offset=300)}
        async for _ in engines.llm.generate(prompt, sampling(max_tokens=1, ignore_eos=True), "long"):
            assert min(len(r.tokens) - before for r, before in zip(running, begun, strict=True)) >= 5
        assert not any(task.done() for task in streams)
        begun = [len(r.tokens) for r in running]
        while min(len(r.tokens) - before for r, before in zip(running, begun, strict=True)) < 5:  # they go on
            await asyncio.sleep(0.01)
    finally:
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


async def test_an_urgent_request_starts_before_those_that_came_first(engines: Engines) -> None:
    """Two engines with two places each are full; two normal requests wait; then comes an urgent one."""
    started: list[str] = []
    # Long enough that none has ended before the last has begun, even if one engine's first step takes seconds. One
    # place becomes free long before the others: with two at once it is chance whose prompt is computed first.
    lengths = [400, 500, 501, 502]
    running = [asyncio.create_task(generate(engines, f"running-{i}", 0, started, n)) for i, n in enumerate(lengths)]
    while len(started) < 4:
        await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(generate(engines, f"waiting-{i}", 0, started, 20)) for i in range(2)]
    while len(engines.cluster.requests) < 6:
        await asyncio.sleep(0.01)
    urgent = asyncio.create_task(generate(engines, "urgent", -1, started, 20))
    while len(engines.cluster.requests) < 7:
        await asyncio.sleep(0.01)
    assert not any(task.done() for task in running)
    assert await asyncio.gather(*running, *waiting, urgent) == [*lengths, 20, 20, 20]
    assert started[4] == "urgent"
    (explained,) = engines.cluster.explain("urgent")
    steps = [s["event"] for s in explained["steps"] if s["event"] != "migration"]  # it may move once others have ended
    assert steps[-3:] == ["dispatch", "first_token", "finish"], str(explained)


async def test_what_the_scheduler_decided_over_real_engines_is_decided_alike_when_replayed(engines: Engines) -> None:
    """All that the test above has brought about, and a move."""
    task = asyncio.create_task(generate(engines, "moved", 0, [], 80))
    while not any(r.tokens for r in engines.cluster.requests):
        await asyncio.sleep(0.01)
    (request,) = engines.cluster.requests
    assert request.route is not None
    report = await engines.cluster.migrate(request.request_id, 1 - request.route)
    assert await task == 80
    assert report.ok, report.reason
    await engines.assert_no_leaks()
    while b'"on":"migration_ended"' not in LOG.read_bytes():  # it is written by a thread
        await asyncio.sleep(0.05)
    whole = LOG.read_bytes()
    (copy := LOG.with_suffix(".copy")).write_bytes(whole[: whole.rindex(b"\n") + 1])
    result = replay(copy)
    assert result.difference is None, str(result)
    assert result.num_events > 100
    assert result.num_commands >= 8
