"""Nothing outlives its end: processes, shared memory and sockets, however a start or an end goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arriero.core.errors import LaunchError
from arriero.core.types import InstanceId
from arriero.launch.port import LaunchSpec
from arriero.sim.fleet import socket_folder
from arriero.transport.shm import sweep

from .harness import PLACED, WAIT_S, Fleet, fleet_of, is_running

pytestmark = pytest.mark.asyncio


@contextlib.contextmanager
def idle_fleet(**engine_of: dict[str, Any]) -> Iterator[Fleet]:
    """Not started yet."""
    with socket_folder() as folder:
        fleet = Fleet(folder, policy=PLACED)
        fleet.engine_of = {int(name.removeprefix("i")): engine for name, engine in engine_of.items()}
        try:
            yield fleet
        finally:
            fleet.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------- starts that fail


async def test_an_instance_that_cannot_start_is_named_and_the_others_are_ended(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with idle_fleet(i1={"num_blocks": 0}) as fleet:
        with pytest.raises(
            LaunchError, match="instance 1 ended with exit code 1 while starting; its log above says why"
        ):
            await fleet.cluster.start(3)
        assert "num_blocks=0 is invalid: it must be 1 or more" in capfd.readouterr().err
        assert len(list(fleet.cluster.instances)) == 3
        assert not any(is_running(i.pid) for i in fleet.cluster.instances)
        assert fleet.segments() == []


async def test_a_process_that_cannot_even_be_made_ends_those_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    with idle_fleet() as fleet:

        def spec(instance: InstanceId, place: int) -> LaunchSpec:
            if instance == 1:
                monkeypatch.setattr(sys, "executable", "/no/such/python")
            return fleet.spec(instance)

        fleet.cluster.instances.make_spec = spec
        with pytest.raises(LaunchError, match="instance 1 could not be started: .*/no/such/python"):  # noqa: RUF043
            await fleet.cluster.start(2)
        (first,) = fleet.cluster.instances
        assert not is_running(first.pid)


async def test_a_start_that_is_called_off_leaves_nothing() -> None:
    with idle_fleet() as fleet:
        start = asyncio.create_task(fleet.cluster.start(3))
        await fleet.until(lambda: len(list(fleet.cluster.instances)) == 3)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert not any(is_running(i.pid) for i in fleet.cluster.instances)


# ---------------------------------------------------------------------- ends


async def test_tasks_may_end_while_another_thread_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    with idle_fleet() as fleet:
        loop, tasks = asyncio.get_running_loop(), fleet.cluster._tasks
        call = loop.call_soon_threadsafe

        def call_and_let_all_end(callback: Callable[..., object], *arguments: Any) -> None:
            call(callback, *arguments)
            call(over.set)
            wait_until(lambda: not tasks)

        over = asyncio.Event()
        for _ in range(3):
            fleet.cluster.spawn(wait_for(over))
        monkeypatch.setattr(loop, "call_soon_threadsafe", call_and_let_all_end)
        close = asyncio.create_task(asyncio.to_thread(fleet.cluster.close, 0.0))
        await asyncio.wait([close], timeout=WAIT_S)
        monkeypatch.undo()
        assert close.exception() is None


async def wait_for(event: asyncio.Event) -> None:
    await event.wait()


async def test_an_end_amid_moves_leaves_nothing() -> None:
    """What the fleet checks at its end: no process, no shared memory."""
    async with fleet_of(2) as fleet:
        streams = [fleet.submit(300, 3000, at=i % 2) for i in range(6)]
        await fleet.at_least(1, *streams)
        moves = [asyncio.ensure_future(fleet.cluster.migrate(s.id, 1 - s.where)) for s in streams]
        await fleet.until(lambda: len(fleet.faults.seen) > 20)
        assert fleet.segments()
    for move in moves:
        move.cancel()


async def test_an_end_amid_a_drain_a_restart_and_a_replay_leaves_nothing() -> None:
    async with fleet_of(3) as fleet:
        streams = [fleet.submit(300, 3000, at=i % 3) for i in range(9)]
        await fleet.at_least(1, *streams)
        drain = fleet.cluster.drains.start(0, cause="a test")
        restart = asyncio.ensure_future(fleet.cluster.rollout.run([1], max_surge=1))
        fleet.kill(2)
        await fleet.dead(2)
        fleet.expect_deaths()
    drain.cancel()
    restart.cancel()


# ---------------------------------------------------------------------- the front end is killed

FRONT_END = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from {__name__.rpartition(".")[0]}.test_start_and_end import front_end
front_end()
"""


def front_end() -> None:
    """A front end as a process: says its name and those of its instances, and moves streams until it is killed.

    Prints one JSON object: ``prefix``, ``folder`` and ``pids``.
    """
    asyncio.run(_front_end())


async def _front_end() -> None:
    async with fleet_of(2) as fleet:
        streams = [fleet.submit(400, 3000, at=i % 2) for i in range(4)]
        await fleet.at_least(1, *streams)
        fleet.faults.on_answer = lambda operation, go: go() if operation.op != "detach" else None
        moves = [asyncio.ensure_future(fleet.move(s, 1 - s.where)) for s in streams]
        await fleet.until(lambda: [op for op, _ in fleet.faults.seen].count("detach") == len(streams))  # type: ignore[arg-type]
        pids = [i.pid for i in fleet.cluster.instances]
        print(json.dumps({"prefix": fleet.prefix, "folder": str(fleet.folder), "pids": pids}), flush=True)
        await asyncio.gather(*moves)


@contextlib.contextmanager
def killed_front_end(*, with_instances: bool) -> Iterator[dict[str, Any]]:
    """What a front end left that was killed in the middle of four moves, alone or with its instances."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", FRONT_END], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    with process.stdout:
        said = json.loads(process.stdout.readline())
    try:
        assert all(is_running(pid) for pid in said["pids"])
        for pid in said["pids"] if with_instances else []:
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        yield said
    finally:
        process.kill()
        sweep(said["prefix"])
        shutil.rmtree(said["folder"])


def segments(prefix: str) -> list[str]:
    return sorted(p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(prefix))


async def test_instances_end_by_themselves_when_the_front_end_is_killed() -> None:
    with killed_front_end(with_instances=False) as left:
        wait_until(lambda: not any(is_running(pid) for pid in left["pids"]))
        assert segments(left["prefix"]) == []


async def test_what_all_left_that_were_killed_at_once_is_reclaimed_by_the_next_start() -> None:
    with killed_front_end(with_instances=True) as left:
        wait_until(lambda: not any(is_running(pid) for pid in left["pids"]))
        found = segments(left["prefix"])
        assert len(found) >= 4
        assert sweep(left["prefix"]) == found
        assert segments(left["prefix"]) == []
