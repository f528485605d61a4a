"""What can be told of a run on real engines beyond its answers: how fast the machine was, and, of arriero alone, its
moves and the preemptions that a move could have avoided (core/preempted.py).

Nothing here asks often: with two engines on two cores, what the bench itself computes is taken from them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from statistics import median
from time import thread_time
from typing import Any

import numpy as np

from arriero.bench.client import Client

PROBE_S = 1.0  #: between two looks at the machine's speed
EVENTS_S = 5.0  #: between two calls for events; the server keeps the last thousand
EVENTS_LIMIT = 1000
_MEMORY_BYTES = 16 << 20  # more than the caches next to a core hold
_CACHED_BYTES = 128 << 10


class SpeedWatch:
    """Times a little fixed work, again and again, in CPU time: what other processes take of the core does not count.

    Shared machines are slower in one quarter of an hour than in the next by more than what a race is about.
    """

    def __init__(self) -> None:
        self._large = np.ones(_MEMORY_BYTES // 4, np.float32)
        self._small = np.linspace(0.0, 1.0, _CACHED_BYTES // 4, dtype=np.float32)
        self._taken_s: list[float] = []
        self.probe()  # the first one pays for the pages

    def probe(self) -> float:
        """CPU seconds for one portion, about half of which goes into reading memory."""
        started_s = thread_time()
        self._large.sum()
        for _ in range(8):
            np.exp(self._small)
        return thread_time() - started_s

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(PROBE_S)
            self._taken_s.append(self.probe())

    @property
    def speed(self) -> float:
        """Portions a CPU second in the median; by one portion now if none was timed yet."""
        return self.speeds(1)[0]

    def speeds(self, num_parts: int) -> list[float]:
        """As :attr:`speed`, of each of at most so many equal parts of the time: one median hides a fast minute."""
        taken_s = self._taken_s or [self.probe()]
        size = -(-len(taken_s) // num_parts)
        return [1 / median(taken_s[i : i + size]) for i in range(0, len(taken_s), size)]


class EventWatch:
    """Gathers the events of an arriero server while it runs."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._seen = 0
        self.num_missed = 0
        self.events: list[dict[str, Any]] = []

    async def begin(self) -> None:
        """Pass over what has been."""
        await self.gather()
        self.events.clear()
        self.num_missed = 0

    async def gather(self) -> None:
        """Take what is new."""
        found = await self._client.get("/events", after=self._seen, limit=EVENTS_LIMIT)
        if found:
            self.num_missed += found[0]["seq"] - self._seen - 1
            self._seen = found[-1]["seq"]
            self.events += found

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVENTS_S)
            await self.gather()


@asynccontextmanager
async def beside(*watches: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run ``watches`` until the block ends."""
    tasks = [asyncio.create_task(watch) for watch in watches]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def seen_inside(events: Sequence[dict[str, Any]], started_s: float) -> dict[str, Any]:
    """Moves and preemptions among ``events``."""
    moves = [e for e in events if e["event"] == "migration"]
    return {
        "num_moves": sum(bool(m["ok"]) for m in moves),
        "moves": moves,
        "preemptions": [{**e, "time_s": e["time_s"] - started_s} for e in events if e["event"] == "preempt"],
    }
