"""A small OpenAI-compatible server whose every token is known: `python -m arriero.chaos.token_server --port N`.

Token i of an answer is a function of the prompt and the seed (sim/tokens.py), so a stream that was stitched together
wrongly shows. It stands behind other people's routers, and breaks its connections on SIGUSR1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from arriero.sim.tokens import expected_tokens

MODEL = "known-tokens"
TOKEN_TIME_S = 0.015
MAX_TOKENS = 4096

Body = dict[str, Any]


def prompt_tokens(body: Body) -> list[int]:
    """Token ids as they are, text by its bytes, a chat by those of its messages."""
    prompt = body.get("prompt", json.dumps(body.get("messages")))
    return list(prompt) if isinstance(prompt, list) else list(str(prompt).encode())


def answer_tokens(body: Body) -> list[int]:
    """The tokens that answer ``body``."""
    count = min(int(body.get("max_tokens") or body.get("max_completion_tokens") or 16), MAX_TOKENS)
    return expected_tokens(prompt_tokens(body), body.get("seed"), count)


def text_of(token_ids: Sequence[int]) -> str:
    """How tokens look: their numbers."""
    return "".join(f" {token_id}" for token_id in token_ids)


class TokenServer:
    """The endpoints that routers and clients of completions need."""

    def __init__(self, model: str, token_time_s: float) -> None:
        self._model = model
        self._token_time_s = token_time_s
        self._numbers = itertools.count()
        self._open: dict[int, web.Request] = {}

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._complete)
        return app

    def cut(self) -> None:
        """Break every connection that carries an answer."""
        for request in self._open.values():
            if request.transport is not None:
                request.transport.abort()

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self._model, "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
            tokens = answer_tokens(body)
        except (ValueError, TypeError) as error:
            return web.json_response({"error": {"message": str(error), "type": "BadRequestError"}}, status=400)
        number = next(self._numbers)
        answer = _Answer(f"{number}", self._model, body, is_chat=request.path.startswith("/v1/chat"))
        self._open[number] = request
        try:
            if body.get("stream"):
                return await self._stream(request, answer, tokens)
            await asyncio.sleep(self._token_time_s * len(tokens))
            return web.json_response(answer.payload(tokens, "length", usage=len(tokens)))
        finally:
            del self._open[number]

    async def _stream(self, request: web.Request, answer: _Answer, tokens: list[int]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            due_s = time.monotonic()
            for number, token in enumerate(tokens, start=1):
                due_s += self._token_time_s
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                finish = "length" if number == len(tokens) else None
                await _send(response, json.dumps(answer.payload([token], finish, usage=None)))
            if answer.wants_usage:
                await _send(response, json.dumps(answer.payload([], None, usage=len(tokens), with_choice=False)))
            await _send(response, "[DONE]")
            await response.write_eof()
        return response


async def _send(response: web.StreamResponse, data: str) -> None:
    await response.write(f"data: {data}\n\n".encode())


class _Answer:
    """One answer's payloads, in OpenAI's shape."""

    def __init__(self, name: str, model: str, body: Body, *, is_chat: bool) -> None:
        self._is_chat, self._is_stream = is_chat, bool(body.get("stream"))
        self.wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        kind = "chat.completion" if is_chat else "text_completion"
        kind += ".chunk" if is_chat and self._is_stream else ""
        prefix = "chatcmpl" if is_chat else "cmpl"
        self._base = {"id": f"{prefix}-{name}", "object": kind, "created": int(time.time()), "model": model}
        self._num_prompt = len(prompt_tokens(body))

    def payload(self, tokens: list[int], finish: str | None, *, usage: int | None, with_choice: bool = True) -> Body:
        """A chunk, or the whole."""
        payload: Body = {**self._base, "choices": [self._choice(tokens, finish)] if with_choice else []}
        if usage is not None:
            total = self._num_prompt + usage
            payload["usage"] = {
                "prompt_tokens": self._num_prompt, "completion_tokens": usage, "total_tokens": total
            }  # fmt: skip
        return payload

    def _choice(self, tokens: list[int], finish: str | None) -> Body:
        choice: Body = {"index": 0, "finish_reason": finish, "token_ids": tokens, "logprobs": None}
        if not self._is_chat:
            return {**choice, "text": text_of(tokens)}
        part = "delta" if self._is_stream else "message"
        return {**choice, part: {"role": "assistant", "content": text_of(tokens)}}


async def _serve(server: TokenServer, port: int) -> None:
    runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, shutdown_timeout=0.1).start()
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, server.cut)
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await runner.cleanup()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, or until the parent ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--token-time", type=float, default=TOKEN_TIME_S, help="seconds (default: %(default)s)")
    args = parser.parse_args(argv)
    asyncio.run(_serve(TokenServer(args.model, args.token_time), args.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
