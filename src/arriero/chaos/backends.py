"""What stands behind a server and can be hurt: arriero's instances, our own test servers, or processes by port.

A fault that a kind of backend does not have is skipped, and the scoreboard says why. Only this machine is ever touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp
import psutil

from arriero.bench.client import Client
from arriero.bench.server import Server
from arriero.chaos.flip import flip_staged
from arriero.chaos.script import Action
from arriero.chaos.slow_pipe import SlowPipe
from arriero.core.errors import ConfigError

RELAUNCH_S = 1.0
"""How long a killed test server stays away: what a supervisor's first backoff would take."""

CORRUPT_EVERY_S = 0.001
POLL_S = 0.05
DETECTION_TIMEOUT_S = 10.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Backend:
    """One of them, while it is up."""

    name: str
    pid: int  #: of its first process; its descendants belong to it


class Backends(Protocol):
    """Complete because faults need to know who is up, and what a process signal cannot do."""

    async def up(self) -> Sequence[Backend]:
        """Those that serve now, in a fixed order."""

    async def act(self, action: Action, backend: Backend, for_s: float) -> str | None:
        """Carry out what is not done by a signal; why not, if it cannot be done here."""

    def killed(self, backend: Backend) -> None:
        """It was killed: see that it comes back, if nobody else does."""

    async def detection_s(self, backend: Backend, killed_s: float) -> float | None:
        """How long after ``killed_s`` (``time.perf_counter()``) the server knew; None if it does not say."""

    async def close(self) -> None:
        """End what belongs to us."""


def require_loopback(url: str) -> str:
    """``url`` without a trailing slash. Raises ConfigError if it leads off this machine: chaos hurts what it finds."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname not in LOOPBACK:
        raise ConfigError(
            f"{url} is not on this machine: chaos takes http://127.0.0.1:PORT only, it kills what it finds"
        )
    return url.rstrip("/")


def signal_tree(pid: int, number: signal.Signals) -> None:
    """To a process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


async def is_arriero(client: Client) -> bool:
    """Whether the server has arriero's admin API."""
    try:
        return isinstance(await client.get("/instances"), list)
    except (aiohttp.ClientError, ValueError):
        return False


# ---------------------------------------------------------------------- arriero


class ArrieroBackends:
    """The instances of an arriero server on this machine, by their process ids. It restarts them itself."""

    def __init__(self, client: Client, rng: random.Random, disk: SlowPipe | None = None) -> None:
        self._client = client
        self._rng = rng
        self._disk = disk

    async def up(self) -> Sequence[Backend]:
        """See :class:`Backends`."""
        rows = await self._client.get("/instances")
        return [Backend(f"instance {row['id']}", row["pid"]) for row in rows if row["state"] == "ready"]

    async def act(self, action: Action, backend: Backend, for_s: float) -> str | None:
        """See :class:`Backends`."""
        match action:
            case Action.DRAIN:
                return await self._drain(backend)
            case Action.CORRUPT:
                return await self._corrupt(for_s)
            case Action.SLOW_DISK if self._disk is not None:
                await self._disk.stall(for_s)
                return None
            case Action.SLOW_DISK:
                return "the server writes to no disk of ours: start it with --event-log PIPE, as make chaos does"
        return "its links are sockets inside one machine, they break with a process only"

    def killed(self, backend: Backend) -> None:
        """See :class:`Backends`."""

    async def detection_s(self, backend: Backend, killed_s: float) -> float | None:
        """See :class:`Backends`. The server's events are timed by the same clock of this machine."""
        number = int(backend.name.removeprefix("instance "))
        last = 0
        while perf_counter() < killed_s + DETECTION_TIMEOUT_S:
            try:
                events = await self._client.get("/events", after=last, limit=1000)
            except (aiohttp.ClientError, ValueError):
                events = []
            for event in events:
                last = max(last, event["seq"])
                if event["event"] == "instance_lost" and event["instance"] == number:
                    return float(event["time_s"]) - killed_s
            if not events:
                await asyncio.sleep(POLL_S)
        return None

    async def close(self) -> None:
        """See :class:`Backends`."""

    async def _drain(self, backend: Backend) -> str | None:
        number = backend.name.removeprefix("instance ")
        status, answer = await self._client.post(f"/instances/{number}/drain", {})
        return None if status < 300 else f"the server answered {status}: {answer}"

    async def _corrupt(self, for_s: float) -> str | None:
        """Move every running request to and fro, and change bytes of whatever is staged meanwhile."""
        ready = [b.name.removeprefix("instance ") for b in await self.up()]
        pids = [b.pid for b in await self.up()]
        if len(ready) < 2:
            return "nothing can be moved: fewer than two instances are ready"
        moves = [
            asyncio.create_task(self._client.migrate(row["id"], int(self._rng.choice(others))))
            for row in await self._client.get("/requests")
            if (others := [i for i in ready if int(i) != row["instance"]])
        ]
        loop = asyncio.get_running_loop()
        until_s, num_flipped = loop.time() + for_s, 0
        while loop.time() < until_s:
            num_flipped += flip_staged(pids, self._rng)
            await asyncio.sleep(CORRUPT_EVERY_S)
        await asyncio.gather(*moves, return_exceptions=True)
        return None if num_flipped else "no KV block was on its way"


# ---------------------------------------------------------------------- others


class TestServers:
    """Small servers with known tokens (token_server.py) behind somebody's router; we bring them back ourselves."""

    def __init__(self, ports: Sequence[int], *, logs: Path, token_time_s: float) -> None:
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self._ports = list(ports)
        self._logs = logs
        self._token_time_s = token_time_s
        self._starts = 0
        self._servers = [self._start(port) for port in ports]
        self._relaunches: set[asyncio.Task[None]] = set()

    def _start(self, port: int) -> Server:
        self._starts += 1
        command = [sys.executable, "-m", "arriero.chaos.token_server", "--port", str(port)]
        command += ["--token-time", str(self._token_time_s)]
        server = Server(command, port=port, log=self._logs / f"chaos-test-server-{port}-{self._starts}.log")
        server.launch()
        return server

    async def ready(self) -> None:
        """Wait until all answer. Raises LaunchError."""
        await asyncio.gather(*[asyncio.to_thread(s.wait_until_ready) for s in self._servers])

    async def up(self) -> Sequence[Backend]:
        """See :class:`Backends`."""
        healthy = await asyncio.gather(*[asyncio.to_thread(s.is_healthy) for s in self._servers])
        return [Backend(s.url, s.pid) for s, ok in zip(self._servers, healthy, strict=True) if ok]

    async def act(self, action: Action, backend: Backend, for_s: float) -> str | None:
        """See :class:`Backends`."""
        if action is Action.CUT:
            signal_tree(backend.pid, signal.SIGUSR1)
            return None
        return "the server has no such thing"

    def killed(self, backend: Backend) -> None:
        """See :class:`Backends`."""
        task = asyncio.create_task(self._relaunch(self._servers.index(self._of(backend))))
        self._relaunches.add(task)
        task.add_done_callback(self._relaunches.discard)

    async def detection_s(self, backend: Backend, killed_s: float) -> float | None:
        """See :class:`Backends`."""
        return None

    def _of(self, backend: Backend) -> Server:
        return next(s for s in self._servers if s.pid == backend.pid)

    async def _relaunch(self, index: int) -> None:
        await asyncio.to_thread(self._servers[index].stop)
        await asyncio.sleep(RELAUNCH_S)
        self._servers[index] = self._start(self._ports[index])

    async def close(self) -> None:
        """See :class:`Backends`."""
        for task in list(self._relaunches):
            task.cancel()
        await asyncio.gather(*self._relaunches, return_exceptions=True)
        for server in self._servers:
            await asyncio.to_thread(server.stop)


class FoundBackends:
    """Processes that listen on given ports of this machine. Whoever runs them brings them back, or nobody does."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = [require_loopback(url) for url in urls]

    async def up(self) -> Sequence[Backend]:
        """See :class:`Backends`."""
        return [Backend(url, pid) for url in self._urls if (pid := listener(urlsplit(url).port or 80)) is not None]

    async def act(self, action: Action, backend: Backend, for_s: float) -> str | None:
        """See :class:`Backends`."""
        return "only processes are known of it"

    def killed(self, backend: Backend) -> None:
        """See :class:`Backends`."""

    async def detection_s(self, backend: Backend, killed_s: float) -> float | None:
        """See :class:`Backends`."""
        return None

    async def close(self) -> None:
        """See :class:`Backends`."""


def listener(port: int) -> int | None:
    """The process that listens on ``port``, if we may see it."""
    for connection in psutil.net_connections("tcp"):
        address = connection.laddr
        if connection.status == psutil.CONN_LISTEN and connection.pid and address and address[1] == port:
            return int(connection.pid)
    return None
