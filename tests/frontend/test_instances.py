"""Instances from launch to loss: who serves when, and who hears of a death."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import pytest

from arriero.core.errors import LaunchError, NotFoundError
from arriero.core.types import InstanceId, InstanceState
from arriero.frontend.instances import MAX_DEAD, Instance, Instances
from arriero.launch.port import Launched, LaunchEvents, LaunchSpec


@dataclass
class StubLauncher:
    """Remembers what it should start and stop; raises ``error`` if there is one."""

    started: list[tuple[InstanceId, LaunchSpec, LaunchEvents]] = field(default_factory=list)
    ended: list[InstanceId] = field(default_factory=list)
    killed: list[InstanceId] = field(default_factory=list)
    stopped_after_s: list[float] = field(default_factory=list)
    error: LaunchError | None = None

    def start(self, instance: InstanceId, spec: LaunchSpec, events: LaunchEvents) -> Launched:
        if self.error is not None:
            raise self.error
        self.started.append((instance, spec, events))
        return Launched(pid=1000 + instance, host="here")

    def end(self, instance: InstanceId) -> None:
        self.ended.append(instance)

    def kill(self, instance: InstanceId) -> None:
        self.killed.append(instance)

    def stop(self, instance: InstanceId, timeout_s: float) -> None:
        raise NotImplementedError

    def stop_all(self, timeout_s: float) -> None:
        self.stopped_after_s.append(timeout_s)


class World:
    """Instances over a stub launcher; keeps what it is told."""

    def __init__(self) -> None:
        self.launcher = StubLauncher()
        self.joined: list[Instance] = []
        self.lost: list[tuple[Instance, int]] = []
        self.left: list[Instance] = []
        self.asked: list[InstanceId] = []
        self.lines: list[str] = []
        self.memory_ran_out = False
        self.instances = Instances(
            self.launcher,
            lambda instance, place: LaunchSpec(module="some.module", payload=f"{instance} at {place}".encode()),
            on_left=self.left.append,
            on_drain_asked=self.asked.append,
            on_joined=self.joined.append,
            on_lost=lambda instance, returncode: self.lost.append((instance, returncode)),
            progress=self.lines.append,
            memory_ran_out=lambda: self.memory_ran_out,
        )

    def launch(self) -> asyncio.Future[Instance]:
        return self.instances.launch()

    async def ready(self) -> Instance:
        future = self.launch()
        instance = self.launcher.started[-1][0]
        self.instances.on_ready(instance, b"payload")
        self.instances.on_snapshot(instance)
        return await future


@pytest.fixture
def world() -> World:
    return World()


async def test_instances_are_numbered_and_each_gets_its_own_specification(world: World) -> None:
    for _ in range(2):
        world.launch()
    assert [(i, s.payload, e) for i, s, e in world.launcher.started] == [
        (0, b"0 at 0", world.instances),
        (1, b"1 at 1", world.instances),
    ]
    assert [(i.instance_id, i.pid, i.host, i.state) for i in world.instances] == [
        (0, 1000, "here", InstanceState.STARTING),
        (1, 1001, "here", InstanceState.STARTING),
    ]
    assert world.lines == ["instance 0: starting (pid 1000)", "instance 1: starting (pid 1001)"]


async def test_an_instance_serves_from_its_first_snapshot_after_it_has_connected(world: World) -> None:
    future = world.launch()
    world.instances.on_snapshot(0)
    assert world.instances.ready_ids() == [], "it has not said yet how it is configured"
    world.instances.on_ready(0, b"payload")
    assert world.instances.ready_ids() == [], "nobody knows its load yet"
    assert not future.done()
    world.instances.on_snapshot(0)
    assert world.instances.ready_ids() == [0]
    instance = await future
    assert instance is world.instances[0]
    assert world.joined == [instance]
    assert (instance.state, instance.stage, instance.ready_payload) == (InstanceState.READY, "ready", b"payload")


async def test_later_snapshots_do_not_make_it_join_again(world: World) -> None:
    instance = await world.ready()
    world.instances.on_snapshot(0)
    assert world.joined == [instance]


async def test_progress_of_a_start_up_is_passed_on_and_kept(world: World) -> None:
    world.launch()
    world.instances.on_status(0, "loading the model")
    assert world.instances[0].stage == "loading the model"
    assert world.lines[-1].startswith("instance 0: loading the model (")


async def test_an_instance_is_not_ready_because_it_says_so_and_says_nothing_more_once_it_is(world: World) -> None:
    """Its last words of the start-up may come after its first snapshot: they travel on another way."""
    world.launch()
    world.instances.on_status(0, "ready")
    assert world.instances[0].stage == "starting"
    world.instances.on_ready(0, b"payload")
    world.instances.on_snapshot(0)
    num_lines = len(world.lines)
    world.instances.on_status(0, "warming up")
    assert world.instances[0].stage == "ready"
    assert len(world.lines) == num_lines


async def test_a_failed_start_up_says_at_which_stage_it_ended(world: World) -> None:
    future = world.launch()
    world.instances.on_status(0, "loading the model")
    world.instances.on_exit(0, 3)
    with pytest.raises(LaunchError, match="instance 0 ended with exit code 3 while loading the model"):
        await future
    assert world.instances[0].state is InstanceState.DEAD
    assert world.lost == [], "nothing ran there"


async def test_a_start_up_that_nobody_waits_for_any_more_may_succeed_or_fail(world: World) -> None:
    for future in (world.launch(), world.launch()):
        future.cancel()
    world.instances.on_exit(0, 1)
    world.instances.on_ready(1, b"payload")
    world.instances.on_snapshot(1)
    assert world.instances.ready_ids() == [1]


async def test_the_death_of_an_instance_that_served_is_reported_once_and_loudly(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    instance = await world.ready()
    world.instances.on_exit(0, -9)
    assert world.lost == [(instance, -9)]
    assert world.instances.ready_ids() == []
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.ERROR, "instance 0 ended unexpectedly (exit code -9)")
    ]


async def test_a_dead_instance_does_not_come_back_by_a_late_message(world: World) -> None:
    await world.ready()
    world.instances.on_exit(0, -9)
    world.instances.on_ready(0, b"late")
    world.instances.on_snapshot(0)
    assert world.instances[0].state is InstanceState.DEAD
    assert len(world.joined) == 1


async def test_messages_of_an_instance_that_nobody_started_are_ignored(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.instances.on_ready(7, b"payload")
    world.instances.on_snapshot(7)
    assert list(world.instances) == []
    assert "unknown instance 7" in caplog.text


async def test_a_number_is_not_used_again_after_a_death_or_a_failed_launch(world: World) -> None:
    await world.ready()
    world.instances.on_exit(0, 1)
    world.launcher.error = LaunchError("no such program")
    with pytest.raises(LaunchError, match="no such program"):
        world.launch()
    assert [i.instance_id for i in world.instances] == [0], "what was not started is not listed"
    world.launcher.error = None
    assert (await world.ready()).instance_id == 2


async def test_exits_on_the_way_down_alarm_nobody(world: World, caplog: pytest.LogCaptureFixture) -> None:
    await world.ready()
    starting = world.launch()
    world.instances.close(2.5)
    assert world.launcher.stopped_after_s == [2.5]
    for instance in (0, 1):
        world.instances.on_exit(instance, -15)
    assert world.lost == []
    assert caplog.records == []
    assert not starting.done()
    assert [i.state for i in world.instances] == [InstanceState.DEAD] * 2


async def test_an_unknown_instance_is_said_with_those_that_there_are(world: World) -> None:
    with pytest.raises(NotFoundError, match="instance 5 is unknown: there is none"):
        world.instances[5]
    for _ in range(2):
        world.launch()
    with pytest.raises(NotFoundError, match="instance 5 is unknown: there is 0, 1"):
        world.instances[5]


# ---------------------------------------------------------------------- places, replacements, ends


async def test_a_replacement_takes_the_place_of_the_dead_and_each_knows_of_the_other(world: World) -> None:
    for _ in range(2):
        await world.ready()
    world.instances.on_exit(0, -9)
    future = world.instances.launch(place=0, replaces=0)
    assert world.lines[-1] == "instance 2: starting (pid 1002, in place of instance 0)"
    dead, new = world.instances[0], world.instances[2]
    assert (dead.replaced_by, dead.stage) == (2, "killed by SIGKILL")
    assert (new.replaces, new.place) == (0, 0)
    assert world.instances.replacement_of(dead) is new
    assert world.instances.replacement_of(new) is new
    assert not future.done()


async def test_without_a_place_of_its_own_it_gets_the_first_that_is_free(world: World) -> None:
    for _ in range(3):
        await world.ready()
    world.instances.on_exit(1, 0)
    world.launch()
    world.launch()
    assert [world.instances.place_of(i) for i in (3, 4, 99)] == [1, 3, 0]


async def test_an_end_on_our_order_is_no_loss(world: World) -> None:
    await world.ready()
    world.instances.drain(0)
    assert (world.instances.ready_ids(), world.instances[0].serves) == ([], True)
    ended = world.instances.end(0)
    assert world.launcher.ended == [0]
    world.instances.on_exit(0, 0)
    assert await ended == 0
    assert (world.lost, [i.instance_id for i in world.left]) == ([], [0])
    assert (world.instances[0].stage, world.instances[0].serves) == ("drained", False)


async def test_a_killed_instance_keeps_the_reason_and_is_lost(world: World, caplog: pytest.LogCaptureFixture) -> None:
    await world.ready()
    world.instances.kill(0, "hung: no answer for 9 s")
    assert world.launcher.killed == [0]
    world.instances.on_exit(0, -9)
    assert [(i.instance_id, i.stage) for i, _ in world.lost] == [(0, "hung: no answer for 9 s")]
    assert "instance 0 is killed: hung: no answer for 9 s" in caplog.text


async def test_who_asks_for_a_drain_is_heard_until_the_end_begins(world: World) -> None:
    await world.ready()
    world.instances.on_drain_asked(0)
    world.instances.close(0.0)
    world.instances.on_drain_asked(0)
    assert world.asked == [0]
    with pytest.raises(LaunchError, match="the server ends"):
        world.instances.launch()


async def test_only_the_last_dead_are_remembered(world: World) -> None:
    for n in range(MAX_DEAD + 3):
        await world.ready()
        world.instances.on_exit(n, 0)
    world.launch()
    remembered = [i.instance_id for i in world.instances]
    assert remembered == [*range(3, MAX_DEAD + 3), MAX_DEAD + 3]
    assert world.instances.is_dead(0)
    assert not world.instances.is_dead(MAX_DEAD + 3)


# ---------------------------------------------------------------------- refused


@pytest.mark.asyncio
async def test_an_instance_that_may_not_join_is_killed_and_whoever_started_it_is_told_why(world: World) -> None:
    world.instances._refusal = lambda payload: "it is a camel"
    future = world.launch()
    (instance,) = (i for i, _, _ in world.launcher.started)
    world.instances.on_ready(instance, b"payload")
    world.instances.on_snapshot(instance)
    assert world.launcher.killed == [instance]
    assert world.joined == []
    with pytest.raises(LaunchError, match=f"instance {instance} may not join: it is a camel"):
        await future
    world.instances.on_exit(instance, -9)
    assert world.instances[instance].stage == "may not join: it is a camel"
    assert world.lost == []


@pytest.mark.asyncio
async def test_an_instance_that_serves_cannot_be_made_another_by_a_second_first_message(world: World) -> None:
    record = await world.ready()
    world.instances._refusal = lambda payload: "it is a camel"
    world.instances.on_ready(record.instance_id, b"another payload")
    assert record.ready_payload == b"payload"
    assert world.launcher.killed == []


async def test_one_that_is_told_to_end_and_has_to_be_killed_has_ended_all_the_same(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.ready()
    ended = world.instances.end(0)
    world.instances.kill(0, "it is empty")
    world.instances.on_exit(0, -9)
    assert await ended == -9
    assert ([i.instance_id for i in world.left], world.lost, caplog.text) == ([0], [], "")
    assert "instance 0: killed: it is empty" in world.lines


@pytest.mark.parametrize(
    ("returncode", "by_us", "memory_ran_out", "from_outside"),
    [(-9, False, False, True), (-9, True, False, False), (-9, False, True, False), (1, False, False, False)],
)
async def test_a_kill_from_outside_is_told_from_other_deaths(
    world: World, returncode: int, by_us: bool, memory_ran_out: bool, from_outside: bool
) -> None:
    world.memory_ran_out = memory_ran_out
    instance = await world.ready()
    if by_us:
        world.instances.kill(0, "hung")
    world.instances.on_exit(0, returncode)
    assert instance.died_from_outside is from_outside
