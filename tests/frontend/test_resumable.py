"""Resumable streams without a server: what they hold is bounded, and nothing that a client lacks is thrown away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from arriero.core.config import HttpConfig
from arriero.core.errors import GoneError, NotFoundError
from arriero.frontend.resumable import ResumableStream, ResumableStreams

OWNER = b"owner"
WAIT_S = 30.0


class Client:
    """A connection: takes what it is sent, as fast as it likes."""

    def __init__(self, *, reads: bool = True) -> None:
        self.body = b""
        self.has_ended = False
        self._reads = asyncio.Event()
        self._gone = asyncio.Event()
        self._asked = False
        if reads:
            self._reads.set()

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self._reads.wait()
        if message["type"] == "http.response.body" and not self._gone.is_set():
            self.body += message["body"]
            self.has_ended |= not message.get("more_body")

    def read(self) -> None:
        self._reads.set()

    def leave(self) -> None:
        self._gone.set()
        self._reads.set()  # as servers do: sending to a closed connection returns

    @property
    def numbers(self) -> list[int]:
        return [int(line[4:]) for line in self.body.split(b"\n") if line.startswith(b"id: ")]


class Application:
    """Streams events of 100 bytes until the client has gone."""

    def __init__(self, num_events: int) -> None:
        self.num_events = num_events
        self.num_sent = 0
        self.disconnected = False

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Any]) -> None:
        await receive()
        gone = asyncio.ensure_future(receive())
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(self.num_events):
            if gone.done():
                self.disconnected = True
                return
            event = b"data: %090d\n\n" % number
            await send({"type": "http.response.body", "body": event[:40], "more_body": True})
            await send({"type": "http.response.body", "body": event[40:], "more_body": True})
            self.num_sent += 1
            await asyncio.sleep(0)
        gone.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def tasks() -> AsyncIterator[list[asyncio.Task[None]]]:
    made: list[asyncio.Task[None]] = []
    yield made
    for task in made:
        task.cancel()
    await asyncio.gather(*made, return_exceptions=True)


def limited(**limits: int) -> ResumableStreams:
    return ResumableStreams(HttpConfig(**limits))


def begin(
    streams: ResumableStreams,
    name: str,
    app: Application,
    client: Client,
    tasks: list[asyncio.Task[None]],
    grace_s: float,
) -> ResumableStream:
    stream = ResumableStream(name, OWNER, grace_s, streams)
    tasks.append(asyncio.create_task(stream.run(app, {"type": "http"}, client.receive, client.send)))
    return stream


async def test_a_client_that_reads_slowly_holds_up_the_application_and_loses_nothing(
    tasks: list[asyncio.Task[None]],
) -> None:
    streams = limited(stream_journal_bytes=1000, journal_bytes=10_000)
    app, client = Application(100), Client(reads=False)
    stream = begin(streams, "a", app, client, tasks, grace_s=30)
    await until(lambda: app.num_sent >= 9)
    for _ in range(100):
        await asyncio.sleep(0)
    assert app.num_sent < 12
    assert stream.journal.num_bytes <= 1000
    client.read()
    await until(lambda: client.has_ended)
    assert client.numbers == list(range(1, 101))


async def test_with_nobody_connected_the_application_waits_at_the_bound(tasks: list[asyncio.Task[None]]) -> None:
    streams = limited(stream_journal_bytes=3000, journal_bytes=10_000)
    app, client = Application(200), Client()
    stream = begin(streams, "a", app, client, tasks, grace_s=30)
    await until(lambda: len(client.numbers) >= 5)
    client.leave()
    await until(lambda: not stream.is_read)
    for _ in range(300):
        await asyncio.sleep(0)
    assert app.num_sent < 200
    assert streams.num_bytes == stream.journal.num_bytes <= 3000
    back, last = Client(), client.numbers[-1]
    tasks.append(asyncio.create_task(stream.resume(back.receive, back.send, last)))
    await until(lambda: back.has_ended)
    assert client.numbers + back.numbers == list(range(1, 201))


async def test_after_the_grace_an_application_that_waits_is_let_go(tasks: list[asyncio.Task[None]]) -> None:
    streams = limited(stream_journal_bytes=1000, journal_bytes=10_000)
    app, client = Application(100_000), Client()
    begin(streams, "a", app, client, tasks, grace_s=0.05)
    await until(lambda: client.numbers)
    client.leave()
    await until(lambda: app.disconnected)
    assert len(streams) == streams.num_bytes == 0


async def test_what_the_client_has_is_dropped_at_the_bound_and_cannot_be_had_again(
    tasks: list[asyncio.Task[None]],
) -> None:
    streams = limited(stream_journal_bytes=1000, journal_bytes=10_000)
    app, client = Application(100), Client()
    stream = begin(streams, "a", app, client, tasks, grace_s=30)
    await until(lambda: client.has_ended)
    assert client.numbers == list(range(1, 101))
    assert stream.journal.num_bytes <= 1000
    with pytest.raises(GoneError):
        stream.journal.after(0)
    assert len(stream.journal.after(95)) == 5


async def test_all_streams_together_are_bounded_and_ended_ones_make_room(tasks: list[asyncio.Task[None]]) -> None:
    streams = limited(stream_journal_bytes=1000, journal_bytes=2500)
    clients = [Client() for _ in range(6)]
    for number, client in enumerate(clients):
        begin(streams, f"{number}", Application(8), client, tasks, grace_s=30)
        await until(lambda client=client: client.has_ended)
        assert streams.num_bytes <= 2500
    assert all(c.numbers == list(range(1, 9)) for c in clients)
    with pytest.raises(NotFoundError):
        streams.find("0", OWNER)
    assert streams.find("5", OWNER).has_ended


async def test_many_live_streams_share_the_bound_and_all_arrive(tasks: list[asyncio.Task[None]]) -> None:
    streams = limited(stream_journal_bytes=1000, journal_bytes=1000)
    clients = [Client() for _ in range(20)]
    for number, client in enumerate(clients):
        begin(streams, f"{number}", Application(50), client, tasks, grace_s=30)
    await until(lambda: all(c.has_ended for c in clients))
    assert all(c.numbers == list(range(1, 51)) for c in clients)
    assert streams.num_bytes <= 1000 + 20 * 120  # the one event that each may have whatever the others hold


async def test_nobody_else_finds_a_stream(tasks: list[asyncio.Task[None]]) -> None:
    streams = limited()
    client = Client()
    stream = begin(streams, "a", Application(1000), client, tasks, grace_s=30)
    await until(lambda: client.numbers)
    assert streams.find("a", OWNER) is streams.find("cmpl-a", OWNER) is streams.find("chatcmpl-a", OWNER) is stream
    for name, owner in (("a", b"other"), ("b", OWNER), ("cmpl-b", OWNER)):
        with pytest.raises(NotFoundError):
            streams.find(name, owner)


async def test_an_application_that_fails_ends_the_stream(
    tasks: list[asyncio.Task[None]], caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Application):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await super().__call__(scope, receive, send)
            raise RuntimeError("broken inside")

    streams, client = limited(), Client()
    begin(streams, "a", Failing(3), client, tasks, grace_s=30)
    await until(lambda: client.has_ended)
    assert client.numbers == [1, 2, 3]
    assert "broken inside" in caplog.text
