"""Open-loop replay: requests leave at their own times, and what their clients see is noted."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web

from arriero.bench.client import Client
from arriero.bench.replay import Prompts, at_rate, capped, replay, spread
from arriero.core.errors import ArrieroError, ConfigError
from arriero.model.bundled import ensure_bundled_model
from arriero.workload.workload import Arrival, Workload


class Words(Prompts):
    """One word, so that no tokenizer is loaded."""

    def __init__(self) -> None:
        self._words, self._rng = [" llama"], random.Random(0)


class Server:
    """Streams what is asked for; every answer waits until ``open`` is set."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.prompts: list[str] = []
        self.cut_short = False

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.prompts.append(body["prompt"])
        await self.open.wait()
        response = web.StreamResponse()
        await response.prepare(request)
        for token in range(body["max_tokens"] - self.cut_short):
            choice = {"index": 0, "text": " x", "token_ids": [token]}
            await response.write(b"data: " + json.dumps({"id": "cmpl-1", "choices": [choice]}).encode() + b"\n\n")
            await asyncio.sleep(0.05 if token == 1 else 0.0)
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest_asyncio.fixture
async def served() -> AsyncIterator[tuple[Server, str]]:
    server, app = Server(), web.Application()
    app.router.add_post("/v1/completions", server.completions)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    yield server, f"http://127.0.0.1:{port}"
    await runner.cleanup()


ARRIVALS = [Arrival(0.0, 3, 4), Arrival(0.02, 5, 1)]


async def test_requests_leave_at_their_times_though_no_answer_has_come(served: tuple[Server, str]) -> None:
    server, url = served
    async with Client(url) as client:
        task = asyncio.create_task(replay(client, "m", ARRIVALS, Words()))
        while len(server.prompts) < 2:
            await asyncio.sleep(0.01)
        server.open.set()
        first, second = await task
    assert server.prompts == [" llama" * 3, " llama" * 5]
    assert (first.output_tokens, second.output_tokens) == (4, 1)
    assert first.silence_s >= 0.04  # the server paused after the second token
    assert second.silence_s == second.tpot_s == 0.0
    assert first.e2e_s >= first.ttft_s + first.silence_s - 1e-9
    assert first.late_s >= 0
    assert second.late_s >= 0


async def test_an_answer_that_is_not_whole_is_an_error_that_says_which(served: tuple[Server, str]) -> None:
    server, url = served
    server.cut_short = True
    server.open.set()
    async with Client(url) as client:
        with pytest.raises(ArrieroError, match=r"request of 0\.000 s has 3 of 4 tokens"):
            await replay(client, "m", ARRIVALS, Words())


def test_prompts_have_exactly_as_many_tokens_as_asked_for() -> None:
    from transformers import AutoTokenizer

    model = str(ensure_bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = Prompts(model, random.Random(1))
    texts = [prompts.text(n) for n in (1, 7, 300)]
    assert [len(tokenizer(text).input_ids) for text in texts] == [1, 7, 300]
    assert texts[2] != prompts.text(300)


def test_a_workload_is_stretched_to_a_rate_and_starts_at_once() -> None:
    workload = at_rate(Workload("w", [Arrival(3.0, 1, 1), Arrival(4.0, 1, 1), Arrival(7.0, 1, 1)]), 0.5)
    assert [a.arrival_s for a in workload.arrivals] == [0.0, 1.0, 4.0]
    with pytest.raises(ConfigError, match="1 arrivals"):
        at_rate(Workload("w", [Arrival(3.0, 1, 1)]), 0.5)


def test_lengths_are_cut_and_prefixes_dropped() -> None:
    workload = capped(Workload("w", [Arrival(0.0, 5000, 7, 0, ((1, 2),)), Arrival(1.0, 6, 900)]), 100, 50)
    assert [(a.prompt_tokens, a.output_tokens) for a in workload.arrivals] == [(100, 7), (6, 50)]
    assert not any(a.prefix_blocks for a in workload.arrivals)


def test_spread() -> None:
    assert spread(range(101)) == pytest.approx({"mean": 50.0, "p50": 50.0, "p99": 99.0})
