"""The benchmarks' client: what it takes from chunks, what it derives from their times, and that it streams."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web

from arriero.bench.client import (
    COMPLETIONS,
    Chunk,
    Client,
    Reply,
    chunk_of_token,
    decode_body,
    flatten_logprobs,
    intervals,
    median,
    percentile,
    poll,
    random_prompt,
)

CHUNKS = [Chunk(1.0, 1), Chunk(1.1, 1), Chunk(1.4, 3), Chunk(2.0, 1)]


# ---------------------------------------------------------------------- statistics


def test_a_chunk_of_several_tokens_shares_its_interval_among_them() -> None:
    assert intervals(CHUNKS) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])


def test_intervals_belong_to_the_window_in_which_they_end() -> None:
    assert intervals(CHUNKS, after_s=1.1) == pytest.approx([0.1, 0.1, 0.1, 0.6])
    assert intervals(CHUNKS, until_s=1.1) == pytest.approx([0.1])
    assert intervals(CHUNKS, after_s=1.4, until_s=1.9) == []
    assert intervals(CHUNKS[:1]) == intervals([]) == []


@pytest.mark.parametrize(("token", "chunk"), [(0, 0), (1, 1), (2, 2), (4, 2), (5, 3), (6, None)])
def test_a_token_is_found_in_its_chunk(token: int, chunk: int | None) -> None:
    assert chunk_of_token(CHUNKS, token) == chunk


def test_percentiles_are_linear_between_values_and_nan_without_any() -> None:
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert percentile(range(101), 99) == pytest.approx(99.0)
    assert median(iter([4.0, 1.0])) == 2.5
    assert math.isnan(median([]))


def test_time_of_first_and_of_later_tokens() -> None:
    reply = Reply()
    reply.started_s, reply.chunks, reply.num_tokens = 0.5, CHUNKS, 6
    assert reply.ttft_s == pytest.approx(0.5)
    assert reply.tpot_s == pytest.approx(1.0 / 5)


# ---------------------------------------------------------------------- what a reply takes in


def completion_chunk(text: str, token_ids: list[int], finish: str | None = None, index: int = 0) -> dict[str, object]:
    choice = {"index": index, "text": text, "token_ids": token_ids, "finish_reason": finish, "logprobs": None}
    return {"id": "cmpl-1", "choices": [choice]}


def test_a_completion_grows_chunk_by_chunk() -> None:
    reply = Reply()
    reply.take(completion_chunk("a b", [1, 2]), 1.0)
    reply.take(completion_chunk("", []), 1.5)
    reply.take(completion_chunk(" c", [3], "length"), 2.0)
    reply.take({"id": "cmpl-1", "choices": [], "usage": {"completion_tokens": 3}}, 2.1)
    choice = reply.choices[0]
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("a b c", [1, 2, 3], "length")
    assert reply.chunks == [Chunk(1.0, 2), Chunk(2.0, 1)]
    assert (reply.request_id, reply.num_tokens, reply.usage_tokens) == ("cmpl-1", 3, 3)


def test_sequences_are_kept_apart() -> None:
    reply = Reply()
    reply.take(completion_chunk("a", [1], index=0), 1.0)
    reply.take(completion_chunk("x", [2], index=1), 1.0)
    assert {i: c.text for i, c in reply.choices.items()} == {0: "a", 1: "x"}


def test_a_chat_is_read_from_deltas_and_from_a_whole_message() -> None:
    streamed, whole = Reply(), Reply()
    streamed.take({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}, 0.9)
    streamed.take({"id": "c", "choices": [{"index": 0, "delta": {"content": "hi"}, "token_ids": [7]}]}, 1.0)
    message = {"index": 0, "message": {"content": "hi"}, "token_ids": [7], "finish_reason": "stop"}
    whole.take({"id": "c", "choices": [message], "usage": {"completion_tokens": 1}}, 1.0)
    assert streamed.choices[0].text == whole.choices[0].text == "hi"
    assert streamed.chunks == whole.chunks == [Chunk(1.0, 1)]


def test_an_error_in_the_stream_is_kept() -> None:
    reply = Reply()
    reply.take({"error": {"message": "engine died"}}, 1.0)
    assert reply.error is not None
    assert "engine died" in reply.error


def test_logprobs_of_both_endpoints_are_flattened_alike() -> None:
    completion = {"token_logprobs": [-0.5, -1.0], "top_logprobs": [{"a": -0.5, "b": -2.0}, {"c": -1.0}]}
    chat = {
        "content": [
            {"logprob": -0.5, "top_logprobs": [{"logprob": -2.0}, {"logprob": -0.5}]},
            {"logprob": -1.0, "top_logprobs": [{"logprob": -1.0}]},
        ]
    }
    assert flatten_logprobs(completion) == flatten_logprobs(chat) == [-0.5, -0.5, -2.0, -1.0, -1.0]
    assert flatten_logprobs(None) == flatten_logprobs({"content": None}) == []
    assert flatten_logprobs({"token_logprobs": [-0.5], "top_logprobs": None}) == [-0.5]


def test_prompts_are_fresh_but_the_same_for_the_same_seed() -> None:
    one, other = random.Random(1), random.Random(1)
    first = random_prompt(one, 300)
    assert first == random_prompt(other, 300)
    assert first != random_prompt(one, 300)
    assert all(100 <= token < 40_000 for token in first)


# ---------------------------------------------------------------------- over HTTP


async def _complete(request: web.Request) -> web.StreamResponse:
    """Streams a token every 10 ms, the second event cut in two packets; "refuse" and "lost" do as they say."""
    body = await request.json()
    if body["model"] == "refuse":
        return web.Response(status=400, text="no such model")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for token in range(body["max_tokens"]):
        event = b"data: " + json.dumps(completion_chunk("x", [token])).encode() + b"\n\n"
        for part in (event[:9], event[9:]) if token == 1 else (event,):
            await response.write(part)
            await asyncio.sleep(0.005)
        if body["model"] == "lost":
            request.transport.abort()  # type: ignore[union-attr]
            return response
    await response.write(b"data: [DONE]\n\n")
    return response


async def _migrate(request: web.Request) -> web.Response:
    if request.match_info["id"] == "crash":
        return web.Response(status=500, text="Internal Server Error")
    return web.json_response({"ok": False, "asked": await request.json()}, status=409)


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Client]:
    app = web.Application()
    app.router.add_post(COMPLETIONS, _complete)
    app.router.add_post("/requests/{id}/migrate", _migrate)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with Client(f"http://127.0.0.1:{port}") as client:
        yield client
    await runner.cleanup()


async def test_a_stream_is_read_to_its_end_mark(client: Client) -> None:
    reply = await client.send(COMPLETIONS, decode_body("m", [1, 2, 3], 4))
    assert reply.choices[0].token_ids == [0, 1, 2, 3]
    assert reply.is_complete
    assert reply.error is None
    times = [reply.started_s, *(chunk.time_s for chunk in reply.chunks), reply.ended_s]
    assert len(times) == 6
    assert times == sorted(times)


async def test_a_call_can_be_watched_and_hung_up(client: Client) -> None:
    call = client.start(COMPLETIONS, decode_body("m", [1], 10_000))
    assert await call.wait_for_tokens(3)
    assert call.is_running
    await call.cancel()
    assert not call.is_running
    assert not call.reply.is_complete
    assert 3 <= call.reply.num_tokens < 10_000


async def test_waiting_for_more_tokens_than_come_ends_with_the_stream(client: Client) -> None:
    call = client.start(COMPLETIONS, decode_body("m", [1], 2))
    assert not await call.wait_for_tokens(3)


async def test_a_refused_request_says_why(client: Client) -> None:
    reply = await client.send(COMPLETIONS, decode_body("refuse", [1], 2))
    assert reply.error == "status 400: no such model"
    assert not reply.is_complete


async def test_a_lost_connection_is_an_error_not_an_end(client: Client) -> None:
    reply = await client.send(COMPLETIONS, decode_body("lost", [1], 2))
    assert not reply.is_complete
    assert reply.error is not None


async def test_a_refused_migration_is_an_answer(client: Client) -> None:
    assert await client.migrate("r", 1, "live") == (409, {"ok": False, "asked": {"to": 1, "mode": "live"}})
    status, answer = await client.migrate("crash", 1)
    assert status == 500
    assert "Internal Server Error" in answer["error"]["message"]


async def test_polling_ends_with_the_answer_or_with_the_time() -> None:
    answers = iter(range(100))

    async def probe() -> int:
        return next(answers)

    assert await poll(probe, lambda answer: answer == 2, timeout_s=10.0) == 2
    assert await poll(probe, lambda _: False, timeout_s=0.0) == 3


async def test_a_measurement_during_which_the_machine_stood_still_is_taken_anew(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.bench.client.STALL_S", 0.2)
    pauses = iter((0.5, 0.4, 0.0))

    async def take() -> float:
        pause = next(pauses)
        time.sleep(pause)  # noqa: ASYNC251 - as if suspended
        await asyncio.sleep(0.1)
        return pause

    assert await client.undisturbed(take) == 0.0
    assert client.stalled_s() > 0.7
    assert client.stalled_s(time.perf_counter()) == 0.0


async def test_a_machine_that_stands_still_again_and_again_does_not_keep_us_for_ever(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.bench.client.STALL_S", -1.0)
    tries = []

    async def take() -> None:
        tries.append(1)

    await client.undisturbed(take)
    assert len(tries) == 5
