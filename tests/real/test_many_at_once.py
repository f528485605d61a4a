"""Many requests at once in float32, where batches are exact: moves change nothing, queues move, load evens out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from arriero.core.types import MigrationMode, Phase

from .conftest import Engines, Move
from .test_live_migration import LIVE, RECOMPUTE, sampling

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

ENGINE_FLAGS = ("--dtype", "float32", "--max-num-seqs", "6", "--policy", "infaas")  # requests queue in instances
ENGINE_FLAGS += ("--max-num-batched-tokens", "512")  # whole steps of a long prompt take 20 s on a slow core


async def test_requests_of_a_batch_that_all_move_equal_their_unmoved_selves(engines: Engines) -> None:
    prompts = [engines.prompt(150 + 29 * i, offset=90 * i) for i in range(8)]
    params: list[dict[str, Any]] = [
        {"temperature": 0.8, "seed": i} if i % 2 else {"logprobs": 1} for i in range(len(prompts))
    ]
    stayed = await asyncio.gather(*[engines.run(p, sampling(**s)) for p, s in zip(prompts, params, strict=True)])
    await engines.forget_prefixes()

    async def moving(number: int) -> Any:
        name = f"batch-{number}"
        task = asyncio.create_task(engines.run(prompts[number], sampling(**params[number]), name=name))
        while (request_id := engines.internal_id(name)) is None:
            await asyncio.sleep(0.001)
        request = engines.cluster.requests.get(request_id)
        assert request is not None
        while len(request.tokens) < 10 + number:
            await asyncio.sleep(0.005)
        report = await engines.cluster.migrate(request_id, 1 - request.route)
        return await task, report

    results = await asyncio.gather(*[moving(i) for i in range(len(prompts))])
    for (moved, _), reference in zip(results, stayed, strict=True):
        assert moved.tokens == reference.tokens
        assert moved.finish == reference.finish
    assert sum(report.ok for _, report in results) >= len(prompts) // 2


async def test_all_sequences_of_a_request_move_by_the_clients_id(engines: Engines) -> None:
    """n > 1: vLLM runs a sequence each; the id that the client knows names them all."""
    from vllm.sampling_params import RequestOutputKind

    params = sampling(n=3, temperature=0.9, seed=7, max_tokens=80, output_kind=RequestOutputKind.FINAL_ONLY)
    prompt = {"prompt_token_ids": engines.prompt(200)}

    async def texts(name: str, move: bool) -> list[str]:
        task = asyncio.create_task(_last(engines.llm.generate(prompt, params, name)))
        if move:
            while sum(len(r.tokens) > 5 for r in engines.cluster.requests) < 3:
                await asyncio.sleep(0.01)
            where = {r.route for r in engines.cluster.requests.find(name)}
            reports = await engines.cluster.migrate_all(name, 0 if where == {1} else 1)
            assert all(r.ok for r in reports), [r.reason for r in reports]
            assert {r.route for r in engines.cluster.requests.find(name)} <= {0, 1}
        return [c.text for c in sorted((await task).outputs, key=lambda c: c.index)]

    stayed = await texts("triplet-a", move=False)
    await engines.forget_prefixes()
    assert await texts("triplet-b", move=True) == stayed


async def _last(stream: Any) -> Any:
    async for output in stream:
        last = output
    return last


async def test_a_waiting_request_moves_without_a_copy(engines: Engines) -> None:
    """Instance 0's batch is full: the request that queues there starts at once on instance 1."""
    engines.cluster.scheduler.instance_draining(1, engines.cluster.clock())  # dispatch everything to 0
    try:
        running = [
            asyncio.create_task(engines.run(engines.prompt(60, i), sampling(max_tokens=150), name=f"runs-{i}"))
            for i in range(6)
        ]
        while sum(len(r.tokens) > 2 for r in engines.cluster.requests) < 6:
            await asyncio.sleep(0.01)
        queued = asyncio.create_task(engines.run(engines.prompt(60, 99), sampling(max_tokens=10), name="queued"))
        while (request_id := engines.internal_id("queued")) is None:
            await asyncio.sleep(0.005)
    finally:
        engines.cluster.scheduler.instance_joined(1, engines.cluster.clock())
    while not (waiting := [r.request_id for r in engines.seen_at(0) if r.phase is Phase.WAITING]):
        await asyncio.sleep(0.01)
    assert waiting == [request_id]
    report = await engines.cluster.migrate(request_id, 1)
    run = await queued
    still_running = sum(not task.done() for task in running)
    await asyncio.gather(*running)
    assert report.ok, report.reason
    assert report.num_bytes == 0
    assert len(run.tokens) == 10
    assert still_running == 6


async def test_priority_survives_a_move(engines: Engines) -> None:
    """The destination's scheduler sees the priority that the client gave."""
    task = asyncio.create_task(
        _last(engines.llm.generate(_ids(engines), sampling(max_tokens=90), "urgent", priority=-3))
    )
    while (request_id := engines.internal_id("urgent")) is None:
        await asyncio.sleep(0.005)
    request = engines.cluster.requests.get(request_id)
    assert request is not None
    while len(request.tokens) < 10:
        await asyncio.sleep(0.005)
    report = await engines.cluster.migrate(request_id, 1 - request.route)
    assert report.ok, report.reason
    assert request.route is not None
    while not (priorities := [r.priority for r in engines.seen_at(request.route) if r.request_id == request_id]):
        await asyncio.sleep(0.01)
    await task
    assert priorities == [-3]


def _ids(engines: Engines) -> dict[str, Any]:
    return {"prompt_token_ids": engines.prompt(100)}


async def test_a_prompt_that_is_being_prefilled_can_move(engines: Engines) -> None:
    """Its parts are others than those of the prompt that stays: exact in float32 only."""
    prompt = engines.prompt(3000)
    stayed = await engines.run(prompt, sampling(max_tokens=20))
    await engines.forget_prefixes()
    task = asyncio.create_task(engines.run(prompt, sampling(max_tokens=20), name="prefilling"))
    while not any(0 < r.prefill_tokens < len(prompt) for r in engines.seen_at(0) + engines.seen_at(1)):
        await asyncio.sleep(0.01)
    (request,) = engines.cluster.requests
    assert not request.tokens
    assert request.route is not None
    report = await engines.cluster.migrate(request.request_id, 1 - request.route)
    moved = await task
    assert report.ok, report.reason
    assert moved.tokens == stayed.tokens


@pytest.mark.parametrize("mode", [LIVE, RECOMPUTE])
async def test_a_recompute_is_exact_in_float32(engines: Engines, mode: MigrationMode) -> None:
    params = {"temperature": 0.9, "seed": 11, "max_tokens": 60}
    stayed = await engines.run(engines.prompt(300), sampling(**params))
    await engines.forget_prefixes()
    moved = await engines.run(engines.prompt(300), sampling(**params), [Move(20, 1, mode)])
    assert [m.ok for m in moved.moves] == [True]
    assert moved.tokens == stayed.tokens
