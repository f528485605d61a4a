"""Streams that outlive their connections: the application writes into a journal, whoever is connected reads from it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arriero.core.config import HttpConfig
from arriero.core.errors import ConflictError, NotFoundError
from arriero.frontend.journal import Journal

logger = logging.getLogger(__name__)

HEADER = "x-arriero-resume"
"""In a request: seconds that its stream outlives the connection. In the answer: those that were granted."""

EVENT_END = b"\n\n"


@dataclass(slots=True, eq=False)
class _Reader:
    """A connection that the stream is sent to."""

    wake: asyncio.Event = field(default_factory=asyncio.Event)
    has_gone: bool = False

    def gone(self) -> None:
        self.has_gone = True
        self.wake.set()


class ResumableStream:
    """One stream: the application's task on one side, at most one connection at a time on the other."""

    def __init__(self, name: str, owner: bytes, grace_s: float, streams: ResumableStreams) -> None:
        self.name, self.owner, self.grace_s = name, owner, grace_s
        self.journal = Journal()
        self.has_ended = False
        self.head: Message | None = None
        self._streams = streams
        self._rest = b""
        self._reader: _Reader | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._abandoned = asyncio.Event()
        self._body_read = asyncio.Event()
        self._opened = asyncio.Event()
        self._comment = False

    # ------------------------------------------------------------------ the application's side

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the first connection. What is no stream of events after all is passed on as it is."""
        passed_on = False

        async def receive_here() -> Message:
            if not self._body_read.is_set():
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    self._body_read.set()
                return message
            await self._abandoned.wait()
            return {"type": "http.disconnect"}

        async def send_here(message: Message) -> None:
            nonlocal passed_on
            if message["type"] == "http.response.start":
                self.head = message
                passed_on = not _is_event_stream(message)
                if not passed_on:
                    MutableHeaders(scope=message)[HEADER] = f"{self.grace_s:g}"
                    self._streams.add(self)
                    self._opened.set()
            if passed_on:
                await send(message)
            elif message["type"] == "http.response.body":
                await self._write(message.get("body", b""))

        async def serve() -> None:
            await app(scope, receive_here, send_here)

        task = asyncio.create_task(serve(), name=f"arriero stream {self.name}")
        task.add_done_callback(self._ended)
        gone = asyncio.create_task(self._disconnected(receive))
        opened = asyncio.create_task(self._opened.wait())
        try:
            await asyncio.wait({task, gone, opened}, return_when=asyncio.FIRST_COMPLETED)
            if self._opened.is_set():
                await self._send_to(send, gone, after=0)
                return
            if gone.done():
                self._abandoned.set()
            await task
        except asyncio.CancelledError:
            task.cancel()  # the server stops
            raise
        finally:
            gone.cancel()
            opened.cancel()

    async def _write(self, chunk: bytes) -> None:
        *events, self._rest = (self._rest + chunk).split(EVENT_END)
        for event in events:
            if event.startswith(b":"):
                self._comment = True
            else:
                await self._streams.append(self, event + EVENT_END)
            self._wake_reader()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.has_ended = True
        self._abandoned.set()
        self._wake_reader()
        if self._opened.is_set() and self._reader is None:
            self._leave()
        if not task.cancelled() and (error := task.exception()) is not None and self._opened.is_set():
            logger.error("stream %s has ended early", self.name, exc_info=error)

    # ------------------------------------------------------------------ a connection's side

    async def resume(self, receive: Receive, send: Send, after: int) -> None:
        """Send a connection what comes behind event ``after``, and take the stream from the connection that has it."""
        self._body_read.set()
        gone = asyncio.create_task(self._disconnected(receive))
        try:
            await self._send_to(send, gone, after)
        finally:
            gone.cancel()

    def abandon(self) -> None:
        """End the request: nobody will come for it."""
        self._abandoned.set()
        self._streams.remove(self)

    async def _disconnected(self, receive: Receive) -> None:
        await self._body_read.wait()
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _send_to(self, send: Send, gone: asyncio.Task[None], after: int) -> None:
        reader = self._attach()
        self.journal.taken(after)
        gone.add_done_callback(lambda _: reader.gone())
        assert self.head is not None
        try:
            await send(self.head)
            while self._reader is reader and not reader.has_gone:
                reader.wake.clear()
                events = self.journal.after(after)
                if events:
                    await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
                    after += len(events)
                    self.journal.taken(after)
                    self._streams.wake_writers()
                elif self.has_ended:
                    break
                elif self._comment:
                    self._comment = False
                    await send({"type": "http.response.body", "body": b":" + EVENT_END, "more_body": True})
                else:
                    await reader.wake.wait()
            if not reader.has_gone:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._reader is reader:
                self._reader = None
                self.journal.taken(0)  # who knows what has arrived of it: nothing is dropped until somebody says
                self._leave()

    @property
    def is_read(self) -> bool:
        """Whether a connection has it."""
        return self._reader is not None

    def _attach(self) -> _Reader:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        before, self._reader = self._reader, _Reader()
        if before is not None:
            before.wake.set()
        return self._reader

    def _leave(self) -> None:
        """Nobody is connected: the grace begins, or begins anew when the stream ends in it."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self.grace_s, self.abandon)

    def _wake_reader(self) -> None:
        if self._reader is not None:
            self._reader.wake.set()


class ResumableStreams:
    """All streams that can be resumed, by the id of their request, and what their journals hold in all."""

    def __init__(self, config: HttpConfig) -> None:
        self._config = config
        self._streams: dict[str, ResumableStream] = {}  # in the order in which they began
        self._writers: list[asyncio.Future[None]] = []
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    def require_free(self, name: str) -> None:
        """Raise ConflictError if a stream has this name already."""
        if name in self._streams:
            raise ConflictError(f"a resumable stream is called {name!r} already: choose another X-Request-Id")

    def add(self, stream: ResumableStream) -> None:
        """It has begun."""
        self.require_free(stream.name)
        self._streams[stream.name] = stream

    def remove(self, stream: ResumableStream) -> None:
        """Nobody can resume it any more. Idempotent."""
        if self._streams.get(stream.name) is stream:
            del self._streams[stream.name]
            self.num_bytes -= stream.journal.num_bytes
            self.wake_writers()

    def find(self, name: str, owner: bytes) -> ResumableStream:
        """The stream called ``name``, by the client's own id or by that of the answer. Raises NotFoundError, also if
        somebody else's it is.
        """
        found = next((s for n in _names(name) if (s := self._streams.get(n)) is not None), None)
        if found is None or not secrets.compare_digest(found.owner, owner):
            raise NotFoundError(
                f"there is no stream {name!r} to resume: it was not asked to be resumable, or its grace is over"
            )
        return found

    # ------------------------------------------------------------------ the bound

    async def append(self, stream: ResumableStream, event: bytes) -> None:
        """Put an event into a stream's journal; waits while that holds too much that no client has taken."""
        journal = stream.journal
        while self._streams.get(stream.name) is stream:
            own = self._config.stream_journal_bytes - journal.num_bytes
            free = min(own, self._config.journal_bytes - self.num_bytes)
            if len(event) <= free or not journal.num_bytes:
                self.num_bytes += journal.append(event)
                return
            dropped = journal.drop_oldest()
            self.num_bytes -= dropped
            if not dropped and not (len(event) <= own and self._drop_ended()):
                self._writers.append(asyncio.get_running_loop().create_future())
                await self._writers[-1]

    def _drop_ended(self) -> bool:
        """Forget the oldest stream that has ended and that nobody reads, if there is one."""
        ended = next((s for s in self._streams.values() if s.has_ended and not s.is_read), None)
        if ended is not None:
            self.remove(ended)
        return ended is not None

    def wake_writers(self) -> None:
        """Something was taken or has gone: who waits to append looks again."""
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)


def _names(name: str) -> list[str]:
    """The client's own id may be known from the `id` of the answer's events: "cmpl-7", "chatcmpl-7"."""
    kind, _, own = name.partition("-")
    return [name, own] if kind in ("cmpl", "chatcmpl") else [name]


def _is_event_stream(start: Message) -> bool:
    return start["status"] == 200 and Headers(raw=start["headers"]).get("content-type", "").startswith(
        "text/event-stream"
    )
