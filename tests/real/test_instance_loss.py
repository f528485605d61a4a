"""An instance is killed: what ran there goes on elsewhere, token by token as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from .conftest import Engines
from .test_live_migration import regex, sampling

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

ENGINE_FLAGS = ("--dtype", "float32")

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 11},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3},
    "grammar": {"structured_outputs": regex, "ignore_eos": False},
    "logprobs": {"logprobs": 2},
}


def _params(name: str) -> Any:
    return sampling(**{k: v() if callable(v) else v for k, v in REQUESTS[name].items()}, max_tokens=150)


async def test_streams_of_a_killed_instance_go_on_whole(engines: Engines) -> None:
    prompts = {name: engines.prompt(200 + 20 * i, offset=50 * i) for i, name in enumerate(REQUESTS)}
    stayed = {name: await engines.run(prompts[name], _params(name)) for name in REQUESTS}
    await engines.forget_prefixes()
    engines.cluster.scheduler.instance_draining(0, engines.cluster.clock())  # all on 1
    tasks = {name: asyncio.create_task(engines.run(prompts[name], _params(name), name=name)) for name in REQUESTS}
    while sum(len(r.tokens) > 20 for r in engines.cluster.requests) < len(REQUESTS):
        await asyncio.sleep(0.01)
    engines.cluster.scheduler.instance_joined(0, engines.cluster.clock())
    moving = asyncio.create_task(engines.cluster.migrate_all("greedy", 0))  # and one is on its way
    await asyncio.sleep(0.01)
    os.killpg(engines.cluster.instances[1].pid, signal.SIGKILL)
    for name, task in tasks.items():
        run = await task
        assert run.tokens == stayed[name].tokens, name
        assert run.finish == stayed[name].finish, name
    await moving
    states = {i["id"]: i["state"] for i in engines.cluster.describe_instances()}
    assert states == {0: "ready", 1: "dead"}
