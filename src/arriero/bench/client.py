"""A streaming client of the OpenAI API that notes when every chunk of tokens arrives.

Times are ``time.perf_counter()``; on Linux that is the clock of the server's events too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import numpy as np

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

POLL_S = 0.05
STALL_S = 1.0  #: no other program keeps us waiting that long
MAX_TRIES = 5

T = TypeVar("T")

_DATA = b"data: "
_DONE = b"[DONE]"


# ---------------------------------------------------------------------- what comes back


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that arrived together."""

    time_s: float
    num_tokens: int


@dataclass(slots=True)
class Choice:
    """One sequence of an answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  #: of each token, then its alternatives'
    finish_reason: str | None = None


class Reply:
    """An answer, while it comes in and after. The body must ask for ``return_token_ids``."""

    def __init__(self) -> None:
        self.request_id = ""
        self.started_s = 0.0
        self.ended_s: float | None = None
        self.choices: dict[int, Choice] = {}
        self.chunks: list[Chunk] = []  #: of all choices, in order of arrival
        self.num_tokens = 0
        self.arrivals_s: list[float] = []  #: of every chunk that says anything, also without token ids
        self.usage_tokens: int | None = None  #: what the server says it has produced
        self.is_complete = False  #: the stream's end mark, or the whole body, was seen
        self.error: str | None = None
        self.news = asyncio.Event()

    def take(self, payload: dict[str, Any], time_s: float) -> None:
        """A chunk of a stream, or the whole answer."""
        self.request_id = payload.get("id", self.request_id)
        if "error" in payload:
            self.error = str(payload["error"])
        if payload.get("usage"):
            self.usage_tokens = payload["usage"]["completion_tokens"]
        choices = payload.get("choices", ())
        num_tokens = sum(self._take_choice(choice) for choice in choices)
        if choices:
            self.arrivals_s.append(time_s)
        if num_tokens:
            self.num_tokens += num_tokens
            self.chunks.append(Chunk(time_s, num_tokens))
        self.news.set()

    def _take_choice(self, payload: dict[str, Any]) -> int:
        choice = self.choices.setdefault(payload["index"], Choice())
        message = payload.get("delta") or payload.get("message") or {}
        choice.text += payload.get("text") or message.get("content") or ""
        choice.logprobs += flatten_logprobs(payload.get("logprobs"))
        choice.finish_reason = payload.get("finish_reason") or choice.finish_reason
        token_ids = payload.get("token_ids") or []
        choice.token_ids += token_ids
        return len(token_ids)

    @property
    def ttft_s(self) -> float:
        """From sending the request to its first token."""
        return self.chunks[0].time_s - self.started_s

    @property
    def tpot_s(self) -> float:
        """Mean time of an output token after the first ones."""
        first, last = self.chunks[0], self.chunks[-1]
        return (last.time_s - first.time_s) / max(1, self.num_tokens - first.num_tokens)


def flatten_logprobs(logprobs: dict[str, Any] | None) -> list[float]:
    """All numbers of a completion's or chat's logprobs, token by token, alternatives sorted."""
    if not logprobs:
        return []
    if "content" in logprobs:
        entries = [(e["logprob"], [t["logprob"] for t in e["top_logprobs"]]) for e in logprobs["content"] or ()]
    else:
        tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["token_logprobs"])
        entries = [(p, list((top or {}).values())) for p, top in zip(logprobs["token_logprobs"], tops, strict=True)]
    return [number for own, top in entries for number in (own, *sorted(top, reverse=True))]


# ---------------------------------------------------------------------- statistics


def intervals(chunks: Sequence[Chunk], after_s: float = float("-inf"), until_s: float = float("inf")) -> list[float]:
    """Inter-token times in seconds of the tokens that arrived in ``(after_s, until_s]``.

    A chunk of k tokens counts as k times the k-th part of its interval.
    """
    return [
        (chunk.time_s - before.time_s) / chunk.num_tokens
        for before, chunk in itertools.pairwise(chunks)
        if after_s < chunk.time_s <= until_s
        for _ in range(chunk.num_tokens)
    ]


def chunk_of_token(chunks: Sequence[Chunk], index: int) -> int | None:
    """The chunk that holds output token ``index`` (from 0), None if it has not come."""
    seen = 0
    for position, chunk in enumerate(chunks):
        seen += chunk.num_tokens
        if seen > index:
            return position
    return None


def percentile(values: Iterable[float], q: float) -> float:
    """The ``q``-th percentile, linear between values; NaN without any."""
    array = np.asarray(list(values), dtype=np.float64)
    return float(np.percentile(array, q)) if array.size else float("nan")


def median(values: Iterable[float]) -> float:
    """NaN without any."""
    return percentile(values, 50.0)


# ---------------------------------------------------------------------- the client


class Call:
    """A request that runs as a task of its own."""

    def __init__(self, reply: Reply, task: asyncio.Task[None]) -> None:
        self.reply = reply
        self._task = task

    @property
    def is_running(self) -> bool:
        """Whether more may come."""
        return not self._task.done()

    async def wait_for_tokens(self, count: int) -> bool:
        """Until ``count`` tokens have come; False if the answer ended before. One waiter at a time."""
        while self.reply.num_tokens < count and self.is_running:
            self.reply.news.clear()
            await self.reply.news.wait()
        return self.reply.num_tokens >= count

    async def finish(self) -> Reply:
        """Until the answer is whole."""
        await self._task
        return self.reply

    async def cancel(self) -> None:
        """Hang up, as a client that has lost interest."""
        self._task.cancel()
        await asyncio.wait([self._task])


class Client:
    """Talks to one server; an async context manager. It notices when the whole machine stands still."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url
        self._stalls: list[tuple[float, float]] = []  # when, for how many seconds
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A busy server closes an idle connection (uvicorn: after 5 s) as a request comes in on it: none is used twice.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)

    async def __aenter__(self) -> Self:
        self._watch = asyncio.create_task(self._watch_clock())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.cancel()
        await self._session.close()

    async def _watch_clock(self) -> None:
        while True:
            slept_s = perf_counter()
            await asyncio.sleep(POLL_S)
            late_s = perf_counter() - slept_s - POLL_S
            if late_s > STALL_S:
                self._stalls.append((slept_s, late_s))

    def stalled_s(self, since_s: float = float("-inf")) -> float:
        """Seconds that this process did not get: a virtual machine was suspended, say. Hiccups are not counted."""
        return sum(late_s for when_s, late_s in self._stalls if when_s + POLL_S + late_s > since_s)

    async def undisturbed(self, take: Callable[[], Awaitable[T]]) -> T:
        """What ``take`` measures, taken anew if the machine stood still meanwhile."""
        for _ in range(MAX_TRIES):
            started_s = perf_counter()
            taken = await take()
            await asyncio.sleep(2 * POLL_S)  # the watch may be next only after us
            if not self.stalled_s(started_s):
                break
        return taken

    async def get(self, path: str, **params: Any) -> Any:
        """A JSON document. Raises aiohttp.ClientResponseError."""
        async with self._session.get(self._url + path, params=params, raise_for_status=True) as response:
            return await response.json()

    async def migrate(self, request_id: str, to: int, mode: str = "live") -> tuple[int, dict[str, Any]]:
        """Status and answer of the admin API."""
        return await self.post(f"/requests/{request_id}/migrate", {"to": to, "mode": mode})

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer; what is no JSON becomes an error of OpenAI's shape."""
        async with self._session.post(self._url + path, json=body) as response:
            if response.content_type != "application/json":
                return response.status, {"error": {"message": f"status {response.status}: {await response.text()}"}}
            return response.status, await response.json()

    def start(self, path: str, body: dict[str, Any], *, request_id: str | None = None) -> Call:
        """Send a request; its answer grows in the call's ``reply``."""
        reply = Reply()
        task = asyncio.create_task(self._run(path, body, reply, request_id))
        task.add_done_callback(lambda _: reply.news.set())
        return Call(reply, task)

    async def send(self, path: str, body: dict[str, Any], *, request_id: str | None = None) -> Reply:
        """Send a request and wait for the whole answer. An error is in the reply."""
        return await self.start(path, body, request_id=request_id).finish()

    async def _run(self, path: str, body: dict[str, Any], reply: Reply, request_id: str | None) -> None:
        headers = {"X-Request-Id": request_id} if request_id is not None else {}
        reply.started_s = perf_counter()
        try:
            async with self._session.post(self._url + path, json=body, headers=headers) as response:
                if response.status != 200:
                    reply.error = f"status {response.status}: {(await response.text())[:300]}"
                elif body.get("stream"):
                    await _read_stream(response, reply)
                else:
                    reply.take(await response.json(), perf_counter())
                    reply.is_complete = True
        except aiohttp.ClientError as error:
            reply.error = f"{type(error).__name__}: {error}"
        finally:
            reply.ended_s = perf_counter()


async def _read_stream(response: aiohttp.ClientResponse, reply: Reply) -> None:
    async for time_s, data in _events(response):
        if data == _DONE:
            reply.is_complete = True
        else:
            reply.take(json.loads(data), time_s)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    rest = b""
    async for data in response.content.iter_any():
        now = perf_counter()
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(_DATA):
                yield now, event.removeprefix(_DATA)


async def poll(probe: Callable[[], Awaitable[T]], done: Callable[[T], bool], timeout_s: float) -> T:
    """Ask again until the answer is ``done``, or time is up; returns the last answer."""
    deadline = perf_counter() + timeout_s
    while True:
        answer = await probe()
        if done(answer) or perf_counter() > deadline:
            return answer
        await asyncio.sleep(POLL_S)


# ---------------------------------------------------------------------- prompts


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Token ids that no prefix cache has seen: ordinary tokens, no special ones."""
    return [rng.randrange(100, 40_000) for _ in range(num_tokens)]


def decode_body(model: str, prompt: list[int] | str, max_tokens: int) -> dict[str, Any]:
    """A greedy streamed completion of exactly ``max_tokens`` tokens."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
