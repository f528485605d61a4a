"""The end: who may finish, who is cut, and that everybody is told."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from arriero.core.types import Dispatchable
from arriero.frontend.requests import LiveRequest, RequestTable
from arriero.frontend.shutdown import Shutdown


class World:
    def __init__(self, num_requests: int) -> None:
        self.table = RequestTable()
        self.lost: list[tuple[str, str]] = []
        self.said: list[str] = []
        for n in range(num_requests):
            facts = Dispatchable(request_id=f"r{n}", num_prompt_tokens=1, max_tokens=9)
            self.table.add(LiveRequest(facts, None, 0, f"r{n}", 0.0, tokens=[1] * n))
        self.shutdown = Shutdown(self.table, self.lose, self.said.append)

    def lose(self, request: LiveRequest, reason: str) -> None:
        self.table.pop(request.request_id)
        self.lost.append((request.request_id, reason))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


async def test_with_nothing_running_it_is_over_at_once_and_silent() -> None:
    world = World(0)
    assert await world.shutdown.run(1000.0) == 0
    assert (world.said, world.shutdown.has_begun) == ([], True)


async def test_without_a_time_all_are_cut_at_once() -> None:
    world = World(2)
    assert await world.shutdown.run(0.0) == 2
    assert world.lost == [
        ("r0", "the server ends: cut after 0 tokens"),
        ("r1", "the server ends: cut after 1 tokens"),
    ]
    assert world.said == ["ending: 2 request(s) were cut"]


async def test_who_ends_in_time_is_not_cut_and_who_does_not_is() -> None:
    world = World(2)
    asyncio.get_running_loop().call_later(0.05, world.table.pop, "r0")
    assert await world.shutdown.run(0.5) == 1
    assert [r for r, _ in world.lost] == ["r1"]
    assert world.said[0] == "ending: 2 request(s) may finish within 0 s"


async def test_it_waits_no_longer_than_for_the_last_one() -> None:
    world = World(1)
    asyncio.get_running_loop().call_later(0.05, world.table.pop, "r0")
    assert await world.shutdown.run(1000.0) == 0


async def test_a_second_signal_cuts_at_once() -> None:
    world = World(1)
    asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
    assert await world.shutdown.run(1000.0) == 1
