"""An instance dies or is drained: what ran there goes on elsewhere, token by token as if nothing had happened."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import pytest_asyncio

from arriero.core.errors import ConflictError
from arriero.frontend.requests import LiveRequest

from .conftest import Engines
from .test_live_migration import regex, sampling

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

ENGINE_FLAGS = ("--dtype", "float32")

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 11},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3},
    "grammar": {"structured_outputs": regex, "ignore_eos": False},
    "logprobs": {"logprobs": 2},
}


def _params(name: str) -> Any:
    return sampling(**{k: v() if callable(v) else v for k, v in REQUESTS[name].items()}, max_tokens=200)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def streams(engines: Engines) -> Streams:
    """With their references: what each says when nothing happens to it."""
    made = Streams(engines)
    runs = await asyncio.gather(*(engines.run(made.prompts[name], _params(name)) for name in REQUESTS))
    made.stayed = dict(zip(REQUESTS, runs, strict=True))
    return made


class Streams:
    """One of each kind, all on one instance."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self.prompts = {name: engines.prompt(200 + 20 * i, offset=50 * i) for i, name in enumerate(REQUESTS)}
        self.tasks: dict[str, asyncio.Task[Any]] = {}
        self.stayed: dict[str, Any] = {}

    async def start(self) -> int:
        """All of them, up to some tokens. Returns the instance where they are."""
        engines = self.engines
        await engines.forget_prefixes()
        here, *others = engines.cluster.instances.ready_ids()
        for name in REQUESTS:
            task = engines.run(self.prompts[name], _params(name), name=name)
            self.tasks[name] = asyncio.create_task(task)
        await self._all(lambda r: r.tokens)
        for name in REQUESTS:
            with contextlib.suppress(ConflictError):  # it is there
                await engines.cluster.migrate_all(name, here)
        await self._all(lambda r: len(r.tokens) > 20 and r.route == here)
        assert others
        return here

    async def _all(self, condition: Callable[[LiveRequest], Any]) -> None:
        while sum(bool(condition(r)) for r in self.engines.cluster.requests) < len(REQUESTS):
            await asyncio.sleep(0.01)

    async def assert_whole(self) -> None:
        for name, task in self.tasks.items():
            run = await task
            assert run.tokens == self.stayed[name].tokens, name
            assert run.finish == self.stayed[name].finish, name


async def replaced(engines: Engines, instance: int) -> int:
    """Wait for the replacement to serve."""
    while (new := engines.cluster.instances[instance].replaced_by) is None or new not in (
        engines.cluster.instances.ready_ids()
    ):
        await asyncio.sleep(0.05)
    return new


async def test_streams_of_a_killed_instance_go_on_whole_and_it_is_replaced(engines: Engines, streams: Streams) -> None:
    here = await streams.start()
    other = next(i for i in engines.cluster.instances.ready_ids() if i != here)
    moving = asyncio.create_task(engines.cluster.migrate_all("greedy", other))  # one is on its way
    await asyncio.sleep(0.01)
    os.killpg(engines.cluster.instances[here].pid, signal.SIGKILL)
    await streams.assert_whole()
    await moving
    assert await replaced(engines, here) not in (here, other)


async def test_a_killed_worker_takes_its_instance_with_it_and_the_streams_go_on(
    engines: Engines, streams: Streams
) -> None:
    here = await streams.start()
    children = psutil.Process(engines.cluster.instances[here].pid).children(recursive=True)
    workers = [child for child in children if "Worker" in child.name()]
    assert workers, children
    workers[0].kill()
    while not engines.cluster.instances.is_dead(here):
        await asyncio.sleep(0.01)
    await streams.assert_whole()
    await replaced(engines, here)


async def test_an_instance_that_is_told_to_end_is_drained_and_nobody_notices(
    engines: Engines, streams: Streams
) -> None:
    here = await streams.start()
    os.kill(engines.cluster.instances[here].pid, signal.SIGTERM)
    while not engines.cluster.instances.is_dead(here):
        await asyncio.sleep(0.01)
    assert engines.cluster.instances[here].stage == "drained"
    assert any(not task.done() for task in streams.tasks.values()), "it has not waited for their ends"
    await streams.assert_whole()
    ended = [e for e in engines.cluster.events.recent(1000) if e["event"] == "drain_ended"]
    assert (ended[-1]["ok"], ended[-1]["cause"]) == (True, "SIGTERM")
