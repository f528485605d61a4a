"""Instances as processes: what they say is heard, their end is seen, and none of them outlives its front end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arriero.core.errors import LaunchError
from arriero.core.types import InstanceId
from arriero.launch.child import CORES_ENV, END_SIGNAL, STATUS_FD_ENV, report_stage
from arriero.launch.local import LocalLauncher
from arriero.launch.port import LaunchSpec

FOR_EVER = "signal.pause()"
LONG_S = 60.0
"""Longer than any of this takes; nobody waits for so long unless something is broken."""


class Heard:
    """What the launcher called back with, in order."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, InstanceId, Any]] = asyncio.Queue()

    def on_status(self, instance: InstanceId, stage: str) -> None:
        self.events.put_nowait(("status", instance, stage))

    def on_drain_asked(self, instance: InstanceId) -> None:
        self.events.put_nowait(("drain asked", instance, None))

    def on_exit(self, instance: InstanceId, returncode: int) -> None:
        self.events.put_nowait(("exit", instance, returncode))

    async def next(self) -> tuple[str, InstanceId, Any]:
        return await self.events.get()

    async def stage(self) -> str:
        kind, _, stage = await self.next()
        assert kind == "status"
        return str(stage)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launcher = LocalLauncher()
        self.heard = Heard()

    def spec(self, body: str, **fields: Any) -> LaunchSpec:
        """A child that adopts its parent and then does ``body``."""
        name = f"child_{len(list(self.folder.iterdir()))}"
        source = (
            "import os, signal, subprocess, sys\n"
            "from arriero.launch.child import adopt_parent, report_stage\n"
            "payload = adopt_parent()\n"
        )
        (self.folder / f"{name}.py").write_text(source + body)
        path = os.pathsep.join([str(self.folder), *sys.path])
        env = {"PYTHONPATH": path, **fields.pop("env", {})}
        return LaunchSpec(module=name, payload=fields.pop("payload", b""), env=env, **fields)

    def start(self, body: str, instance: InstanceId = 0, **fields: Any) -> int:
        return self.launcher.start(instance, self.spec(body, **fields), self.heard).pid


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.launcher.stop_all(0.0)


def wait_for_end(pidfd: int) -> bool:
    """Wait until the process is gone; false if it is still there after a long time."""
    try:
        return bool(select.select([pidfd], [], [], LONG_S)[0])
    finally:
        os.close(pidfd)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---------------------------------------------------------------------- start


async def test_an_instance_gets_its_payload_whole_and_is_heard_to_its_end(world: World) -> None:
    payload = bytes(range(256)) * 1000
    world.start(
        "import hashlib\nreport_stage('first')\nreport_stage(hashlib.sha256(payload).hexdigest())\nsys.exit(3)",
        payload=payload,
    )
    assert await world.heard.stage() == "first"
    assert await world.heard.stage() == hashlib.sha256(payload).hexdigest()
    assert await world.heard.next() == ("exit", 0, 3)


async def test_each_of_several_instances_is_heard_under_its_own_number(world: World) -> None:
    pids = {number: world.start("report_stage(str(os.getpid()))", number) for number in (0, 1, 2)}
    heard = [await world.heard.next() for _ in range(6)]
    assert {(i, s) for kind, i, s in heard if kind == "status"} == {(i, str(pid)) for i, pid in pids.items()}
    assert sorted((i, code) for kind, i, code in heard if kind == "exit") == [(0, 0), (1, 0), (2, 0)]


async def test_an_instance_has_the_variables_and_cores_that_were_meant_for_it(world: World) -> None:
    core = min(os.sched_getaffinity(0))
    world.start(
        f"report_stage(os.environ['COLOUR'])\n"
        f"report_stage(str(os.sched_getaffinity(0)))\n"
        f"report_stage(str(os.environ.get('{CORES_ENV}')))",
        env={"COLOUR": "green"},
        cores=frozenset({core}),
    )
    assert [await world.heard.stage() for _ in range(3)] == ["green", str({core}), "None"]


async def test_an_instance_leads_a_process_group_of_its_own(world: World) -> None:
    """So that Ctrl-C in a terminal reaches the front end alone, which then ends its instances in order."""
    pid = world.start("report_stage(str(os.getpgid(0)))")
    assert await world.heard.stage() == str(pid)
    assert pid != os.getpgid(0)


async def test_what_an_instance_writes_that_is_no_status_line_is_ignored(world: World) -> None:
    world.start(
        f"fd = int(os.environ['{STATUS_FD_ENV}'])\n"
        "os.write(fd, b'no json\\n[1]\\n5\\n{\"other\": 1}\\n\\xff\\xfe\\n\\n')\n"
        'os.write(fd, b\'{"stage": "in t\')\n'
        'os.write(fd, b\'wo parts"}\\n{"stage": 7}\\n{"stage": "cut\')'
    )
    assert [await world.heard.stage() for _ in range(2)] == ["in two parts", "7"]
    assert await world.heard.next() == ("exit", 0, 0)


async def test_an_instance_that_closes_its_status_line_is_still_watched(world: World) -> None:
    world.start(f"report_stage('bye')\nos.close(int(os.environ['{STATUS_FD_ENV}']))\n{FOR_EVER}")
    assert await world.heard.stage() == "bye"
    world.launcher.stop(0, LONG_S)
    assert await world.heard.next() == ("exit", 0, -END_SIGNAL)


async def test_a_process_that_cannot_be_started_is_a_launch_error_and_leaves_no_open_file(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = world.spec("")
    before = num_open_files()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(LaunchError, match=r"instance 4 could not be started: .*/no/such/python"):
        world.launcher.start(4, spec, world.heard)
    assert num_open_files() == before
    world.launcher.stop(4, LONG_S)


# ---------------------------------------------------------------------- end


async def test_an_end_by_a_signal_is_seen_with_its_number(world: World) -> None:
    world.start("os.kill(os.getpid(), signal.SIGKILL)")
    assert await world.heard.next() == ("exit", 0, -signal.SIGKILL)


async def test_stop_asks_first_so_that_an_instance_can_clean_up(world: World) -> None:
    world.start(
        "def clean_up(*_):\n"
        "    report_stage('cleaned up')\n"
        "    sys.exit(7)\n"
        f"signal.signal({END_SIGNAL}, clean_up)\n"
        f"report_stage('up')\n{FOR_EVER}"
    )
    assert await world.heard.stage() == "up"
    world.launcher.stop(0, LONG_S)
    assert await world.heard.stage() == "cleaned up"
    assert await world.heard.next() == ("exit", 0, 7)


async def test_stop_kills_what_does_not_end_in_time(world: World) -> None:
    world.start(f"signal.signal({END_SIGNAL}, signal.SIG_IGN)\nreport_stage('up')\nwhile True: {FOR_EVER}")
    assert await world.heard.stage() == "up"
    world.launcher.stop(0, 0.05)
    assert await world.heard.next() == ("exit", 0, -signal.SIGKILL)


ENDS_WITH_7 = (
    "from arriero.launch.child import end_on_signals\n"
    "end_on_signals(lambda: os._exit(7))\n"
    f"report_stage('up')\nwhile True: {FOR_EVER}"
)


async def test_an_order_to_end_is_given_and_not_waited_for(world: World) -> None:
    world.start(ENDS_WITH_7)
    assert await world.heard.stage() == "up"
    for instance in (0, 0, 5):
        world.launcher.end(instance)
    assert await world.heard.next() == ("exit", 0, 7)
    world.launcher.end(0)


async def test_an_operators_sigterm_asks_for_a_drain_and_the_second_one_ends_it(world: World) -> None:
    pid = world.start(ENDS_WITH_7)
    assert await world.heard.stage() == "up"
    os.kill(pid, signal.SIGTERM)
    assert await world.heard.next() == ("drain asked", 0, None)
    os.kill(pid, signal.SIGTERM)
    assert await world.heard.next() == ("exit", 0, 7)


async def test_kill_ends_a_stopped_instance_and_takes_its_shared_memory(
    world: World, segment: Callable[[str], Path]
) -> None:
    queue = segment("message-queue")
    pid = world.start(MAPS_AND_STAYS, payload=str(queue).encode())
    assert await world.heard.stage() == "mapped"
    os.kill(pid, signal.SIGSTOP)
    world.launcher.kill(0)
    world.launcher.kill(5)
    assert await world.heard.next() == ("exit", 0, -signal.SIGKILL)
    await until_gone(queue)


STUBBORN = (
    "stubborn = subprocess.Popen([sys.executable, '-c', '''import signal\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    'print("deaf", flush=True)\n'
    "while True: signal.pause()'''], stdout=subprocess.PIPE)\n"
    "stubborn.stdout.readline()\n"
    "report_stage(str(stubborn.pid))\n"
)
"""Starts a worker that ignores SIGTERM, and tells its process id once it is deaf."""


async def test_stop_takes_the_whole_group_even_a_worker_that_ignores_to_be_asked(world: World) -> None:
    world.start(STUBBORN + FOR_EVER)
    worker = os.pidfd_open(int(await world.heard.stage()))
    world.launcher.stop(0, LONG_S)
    assert wait_for_end(worker)
    assert await world.heard.next() == ("exit", 0, -END_SIGNAL)


async def test_an_instance_that_dies_leaves_no_worker_behind(world: World) -> None:
    pid = world.start("signal.signal(signal.SIGHUP, lambda *_: os._exit(9))\n" + STUBBORN + FOR_EVER)
    worker = os.pidfd_open(int(await world.heard.stage()))
    os.kill(pid, signal.SIGHUP)
    assert await world.heard.next() == ("exit", 0, 9)
    assert wait_for_end(worker)


@pytest.fixture
def segment() -> Iterator[Callable[[str], Path]]:
    """Makes names of files in shared memory that are of this test alone; none of them is left."""
    made: list[Path] = []

    def name(end: str) -> Path:
        made.append(Path(f"/dev/shm/arriero-test.{os.getpid()}-{end}"))
        return made[-1]

    yield name
    for path in made:
        path.unlink(missing_ok=True)


MAPS_AND_STAYS = (
    "import mmap, pathlib\n"
    f"signal.signal({END_SIGNAL}, signal.SIG_IGN)\n"
    "maps = []\n"
    "for name in payload.decode().split():\n"
    "    path = pathlib.Path(name.replace('OWN', str(os.getpid())))\n"
    "    path.touch()\n"
    "    os.truncate(path, 4096)\n"
    "    maps.append(mmap.mmap(os.open(path, os.O_RDWR), 4096))\n"
    f"report_stage('mapped')\nwhile True: {FOR_EVER}"
)


async def test_a_killed_instance_leaves_no_shared_memory_behind(world: World, segment: Callable[[str], Path]) -> None:
    """vLLM's message queues, whose names say nothing; and its own segments of the block transport."""
    queue = segment("message-queue")
    pid = world.start(MAPS_AND_STAYS, payload=f"{queue} {segment('OWN-0')}".encode())
    own = segment(f"{pid}-0")
    assert await world.heard.stage() == "mapped"
    assert queue.exists()
    assert own.exists()
    world.launcher.stop(0, 0.05)
    assert not queue.exists()
    assert not own.exists()


async def until_gone(path: Path) -> None:
    """The end of an instance is told before it is over."""
    async with asyncio.timeout(LONG_S):
        while os.access(path, os.F_OK):
            await asyncio.sleep(0.01)


async def test_nor_does_one_whose_whole_group_is_killed_from_outside(
    world: World, segment: Callable[[str], Path]
) -> None:
    queue = segment("message-queue")
    pid = world.start(MAPS_AND_STAYS, payload=str(queue).encode())
    assert await world.heard.stage() == "mapped"
    assert queue.exists()
    os.killpg(pid, signal.SIGKILL)
    assert await world.heard.next() == ("exit", 0, -signal.SIGKILL)
    await until_gone(queue)


async def test_nor_a_semaphore_which_is_mapped_under_a_name_that_is_no_more(world: World) -> None:
    pid = world.start(
        "import multiprocessing\n"
        "held = multiprocessing.get_context('spawn').Semaphore()\n"
        f"report_stage(held._semlock.name)\nwhile True: {FOR_EVER}"
    )
    semaphore = f"/dev/shm/sem.{(await world.heard.stage()).removeprefix('/')}"
    assert os.access(semaphore, os.F_OK)
    os.killpg(pid, signal.SIGKILL)
    try:
        await until_gone(Path(semaphore))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(semaphore)


async def test_shared_memory_that_a_peer_owns_outlives_the_instance_that_reads_it(
    world: World, segment: Callable[[str], Path]
) -> None:
    peers, unmapped = segment(f"{os.getpid()}-0"), segment("unmapped")
    unmapped.touch()
    world.start(MAPS_AND_STAYS, payload=str(peers).encode())
    assert await world.heard.stage() == "mapped"
    world.launcher.stop(0, 0.05)
    assert peers.exists()
    assert unmapped.exists()


async def test_stop_all_ends_all_from_another_thread_and_every_end_is_seen(world: World) -> None:
    for number in range(3):
        world.start(f"report_stage('up')\n{FOR_EVER}", number)
    assert [await world.heard.stage() for _ in range(3)] == ["up"] * 3
    await asyncio.to_thread(world.launcher.stop_all, LONG_S)
    ends = sorted([await world.heard.next() for _ in range(3)])
    assert ends == [("exit", number, -END_SIGNAL) for number in range(3)]


async def test_stopping_twice_or_what_never_was_is_harmless(world: World) -> None:
    world.launcher.stop(5, LONG_S)
    world.launcher.stop_all(LONG_S)
    world.start(f"report_stage('up')\n{FOR_EVER}")
    assert await world.heard.stage() == "up"
    for _ in range(2):
        world.launcher.stop(0, LONG_S)
    assert await world.heard.next() == ("exit", 0, -END_SIGNAL)
    world.launcher.stop(0, LONG_S)
    world.launcher.stop_all(LONG_S)
    assert world.heard.events.empty()


async def test_a_number_may_be_started_again_after_its_end(world: World) -> None:
    for _ in range(2):
        world.start("sys.exit(1)")
        assert await world.heard.next() == ("exit", 0, 1)


async def test_nothing_stays_open_after_the_end(world: World) -> None:
    before = num_open_files()
    for number in range(3):
        world.start("report_stage('up')", number)
    heard = [await world.heard.next() for _ in range(6)]
    assert [kind for kind, _, _ in heard].count("exit") == 3
    assert num_open_files() == before


# ---------------------------------------------------------------------- the front end dies

FRONT_END = """
import asyncio, sys
from arriero.launch.local import LocalLauncher
from arriero.launch.port import LaunchSpec

class Events:
    def on_status(self, instance, stage):
        print(stage, flush=True)
    def on_drain_asked(self, instance):
        print("drain asked", flush=True)
    def on_exit(self, instance, returncode):
        print("exit", returncode, flush=True)

async def main():
    spec = LaunchSpec(module=sys.argv[1], payload=b"", env={"PYTHONPATH": sys.argv[2]})
    LocalLauncher().start(0, spec, Events())
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_front_end_that_is_killed_takes_its_instances_with_it(world: World, how: signal.Signals) -> None:
    spec = world.spec(f"report_stage(str(os.getpid()))\n{FOR_EVER}")
    command = [sys.executable, "-c", FRONT_END, spec.module, spec.env["PYTHONPATH"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as front_end:
        assert front_end.stdout is not None
        instance = os.pidfd_open(int(front_end.stdout.readline()))
        assert select.select([instance], [], [], 0) == ([], [], []), "it lives as long as its front end"
        front_end.send_signal(how)
        assert wait_for_end(instance)
    assert front_end.returncode == -how


def test_an_instance_that_is_stuck_when_its_front_end_dies_is_killed_with_its_workers(world: World) -> None:
    """It ignores every signal that it can, and so does its worker."""
    deaf = "import arriero.launch.child as c\nc.ORPHAN_GRACE_S = 0\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    spec = world.spec(deaf + STUBBORN + f"report_stage(str(os.getpid()))\nwhile True: {FOR_EVER}")
    command = [sys.executable, "-c", FRONT_END, spec.module, spec.env["PYTHONPATH"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as front_end:
        assert front_end.stdout is not None
        processes = [os.pidfd_open(int(front_end.stdout.readline())) for _ in range(2)]
        front_end.kill()
        assert all([wait_for_end(process) for process in processes])


def test_an_instance_whose_front_end_ended_before_it_could_tie_itself_to_it_ends_too() -> None:
    code = (
        "import os\n"
        "parents = iter([100, 1])\n"
        "os.getppid = lambda: next(parents)\n"
        "from arriero.launch.child import adopt_parent\n"
        "adopt_parent()\n"
        "print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "the front end ended during start-up\n"
    assert done.stdout == ""


@pytest.mark.parametrize("fd", [None, "", "nonsense", "999999"])
def test_an_instance_to_which_nobody_listens_starts_all_the_same(
    monkeypatch: pytest.MonkeyPatch, fd: str | None
) -> None:
    if fd is None:
        monkeypatch.delenv(STATUS_FD_ENV, raising=False)
    else:
        monkeypatch.setenv(STATUS_FD_ENV, fd)
    report_stage("loading")
