"""Where an HTTP request was placed, or why it was refused, in the status and the headers of its answer.

A streaming answer's headers are due before vLLM hands its request to an instance. They are held for that moment, so
that a request that is refused gets a status that says so, and one that is not gets its instance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arriero.core.errors import ArrieroError
from arriero.core.types import InstanceId
from arriero.frontend.openai_errors import answer_to

INSTANCE_HEADER = "x-arriero-instance"


class Placement:
    """What became of the first engine request that an HTTP request has led to."""

    def __init__(self, on_settled: Callable[[], None]) -> None:
        self.instance: InstanceId | None = None
        self.refusal: ArrieroError | None = None
        self.is_settled = False
        self._on_settled = on_settled

    def placed(self, instance: InstanceId | None) -> None:
        """It is in an instance's care; None: it waits for one."""
        self._settle(instance, None)

    def refused(self, error: ArrieroError) -> None:
        """No instance will get it."""
        self._settle(None, error)

    def _settle(self, instance: InstanceId | None, refusal: ArrieroError | None) -> None:
        if not self.is_settled:
            self.is_settled, self.instance, self.refusal = True, instance, refusal
            self._on_settled()


_current: ContextVar[Placement | None] = ContextVar("arriero_placement", default=None)


def current_placement() -> Placement:
    """Of the HTTP request on whose behalf this code runs; one that nobody looks at, if there is none."""
    return _current.get() or Placement(lambda: None)


class Placements:
    """ASGI middleware; the innermost, so that all others see the status that the client sees."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        token = _current.set(answer.placement)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            _current.reset(token)


class _Answer:
    """The messages of one answer on their way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.placement = Placement(self._settled)
        self._scope, self._receive, self._send = scope, receive, send
        self._held: Message | None = None
        self._replaced = False
        self._order = asyncio.Lock()
        self._opening: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        """From the application."""
        async with self._order:
            if message["type"] == "http.response.start":
                self._held = message
                if _is_stream(message) and not self.placement.is_settled:
                    return  # until the request is placed or refused, or there is something to send
            if self._held is not None:
                await self._open()
            if not self._replaced and message["type"] != "http.response.start":
                await self._send(message)

    def _settled(self) -> None:
        if self._held is not None:
            self._opening = asyncio.get_running_loop().create_task(self._open_in_order())

    async def _open_in_order(self) -> None:
        async with self._order:
            if self._held is not None:
                await self._open()

    async def _open(self) -> None:
        start, self._held = self._held, None
        assert start is not None
        refusal = self.placement.refusal
        if refusal is not None and _is_stream(start):
            self._replaced = True
            await answer_to(refusal)(self._scope, self._receive, self._send)
            return
        headers = MutableHeaders(scope=start)
        if refusal is not None and refusal.retry_after_s is not None:
            headers["retry-after"] = answer_to(refusal).headers["retry-after"]
        if self.placement.instance is not None:
            headers[INSTANCE_HEADER] = str(self.placement.instance)
        await self._send(start)


def _is_stream(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")
