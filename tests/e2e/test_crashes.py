"""SIGKILL of an instance, at every point of a move: the streams go on whole, elsewhere, and nothing is left behind."""

from __future__ import annotations

import time
from functools import partial

import pytest

from arriero.core.config import MigrationConfig, RecoveryConfig
from arriero.core.errors import ConflictError, LaunchError
from arriero.core.messages import Drop, Op
from arriero.core.types import InstanceId, InstanceState, MigrationMode

from .harness import LIVE, RECOMPUTE, STOP, Fleet, Operation, Pass, fleet_of, is_running

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLEET = {"num_instances": 3, "engine": {"time_scale": 0.05}}

STAGES = [Op.LOCATE, Op.RESERVE, Op.COPY, Op.LOAD, Op.DETACH, Op.COMMIT, Op.RELEASE]
VICTIMS = ["source", "destination", "both"]


def states(fleet: Fleet) -> dict[InstanceId, str]:
    return {i["id"]: i["state"] for i in fleet.cluster.describe_instances()}


class Killer:
    """Kills instances at the first ``op`` of a move: instead of sending it, or when it has been answered, unheard."""

    def __init__(self, fleet: Fleet, op: Op, victims: list[InstanceId], *, answered: bool) -> None:
        self._fleet, self._op, self._victims = fleet, op, victims
        self.has_struck = False
        if answered:
            fleet.faults.on_answer = self._strike
        else:
            fleet.faults.on_send = self._strike

    def _strike(self, operation: Operation, go: Pass) -> None:
        if operation.op is not self._op or self.has_struck:
            go()
            return
        self.has_struck = True
        self._fleet.kill(*self._victims)


async def crash(fleet: Fleet, op: Op, who: str, *, answered: bool) -> None:
    """A move from one instance to another, both busy, and a crash in it."""
    source, destination, third = fleet.ready
    victims = {"source": [source], "destination": [destination], "both": [source, destination]}[who]
    stream = fleet.submit(150, 150, at=source, seed=7)
    others = [fleet.submit(30, 150, at=i, seed=i) for i in fleet.ready]
    await fleet.at_least(3, stream, *others)
    killer = Killer(fleet, op, victims, answered=answered)
    report = await fleet.move(stream, destination)
    await fleet.dead(*victims)
    assert killer.has_struck
    assert all(states(fleet)[i] == "dead" for i in victims)
    assert fleet.ready == [i for i in (source, destination, third) if i not in victims]
    if not report.ok:
        assert "lost" in report.reason or "is gone" in report.reason
    await fleet.ledger_agrees()
    await fleet.ended()
    fleet.expect_deaths()


@pytest.mark.parametrize("who", ["source", "destination"])
@pytest.mark.parametrize("op", STAGES)
async def test_a_crash_before_every_stage_of_a_move(fleet: Fleet, op: Op, who: str) -> None:
    """The operation reaches nobody."""
    await crash(fleet, op, who, answered=False)


@pytest.mark.parametrize("who", VICTIMS)
@pytest.mark.parametrize("op", STAGES)
async def test_a_crash_after_every_stage_of_a_move(fleet: Fleet, op: Op, who: str) -> None:
    """The operation was carried out, but nobody hears of it."""
    await crash(fleet, op, who, answered=True)


@pytest.mark.parametrize("who", VICTIMS)
@pytest.mark.parametrize(("refused", "op"), [(Op.LOAD, Op.DROP), (Op.COMMIT, Op.RESUME)])
async def test_a_crash_while_a_move_is_called_off(fleet: Fleet, refused: Op, op: Op, who: str) -> None:
    """The destination has lost the reservation and refuses; somebody dies as the request is to go on at the source."""
    source, destination, _ = fleet.ready
    victims = {"source": [source], "destination": [destination], "both": [source, destination]}[who]
    stream = fleet.submit(150, 150, at=source, seed=7)
    others = [fleet.submit(30, 150, at=i, seed=i) for i in fleet.ready]
    await fleet.at_least(3, stream, *others)
    killer = Killer(fleet, op, victims, answered=False)
    strike = fleet.faults.on_send

    def drop_before(operation: Operation, go: Pass) -> None:
        if operation.op is refused and not killer.has_struck:  # the replay, to whomever, is to succeed
            message = operation.message
            fleet.faults.send(destination, Drop(migration_id=message.migration_id, request_id=message.request_id))
        strike(operation, go)

    fleet.faults.on_send = drop_before
    report = await fleet.move(stream, destination)
    await fleet.until(lambda: killer.has_struck)
    await fleet.dead(*victims)
    assert (report.ok, report.reason) == (False, "destination refused: dropped")
    await fleet.ledger_agrees()
    await fleet.ended()
    fleet.expect_deaths()


async def test_more_streams_than_one_may_take_in_at_a_time_all_go_on(fleet: Fleet) -> None:
    """Two of three instances die at once; some replays must ask again, and none runs twice."""
    first, second, survivor = fleet.ready
    streams = [fleet.submit(20 + i, 60, at=(first, second)[i % 2], seed=i) for i in range(40)]
    await fleet.at_least(3, *streams)
    fleet.kill(first, second)
    await fleet.dead(first, second)
    await fleet.ledger_agrees()
    assert {s.where for s in streams if s.finish is None} <= {survivor}
    await fleet.ended()
    fleet.expect_deaths()
    replayed = [e["request_id"] for e in fleet.events("migration") if e["ok"] and e["source"] is None]
    assert len(replayed) == len(set(replayed))


async def test_two_that_die_at_once_take_no_replay_from_each_other(fleet: Fleet) -> None:
    """The front end learns of both deaths in one turn of its loop: between them, the second still looks alive."""
    first, second, survivor = fleet.ready
    streams = [fleet.submit(40, 200, at=at, seed=i) for i, at in enumerate((first, second) * 2)]
    await fleet.at_least(3, *streams)
    for stream, to in zip(streams, (second, first) * 2, strict=True):
        assert (await fleet.move(stream, to)).ok  # each wants to be where the other is, once that dies
    pids = [fleet.cluster.instances[i].pid for i in (first, second)]
    fleet.kill(first, second)
    while any(is_running(pid) for pid in pids):
        time.sleep(0.001)  # noqa: ASYNC251  # the loop is to see both at once
    await fleet.dead(first, second)
    await fleet.ledger_agrees()
    assert {s.where for s in streams} == {survivor}
    await fleet.ended()
    fleet.expect_deaths()


async def test_a_crash_of_whom_the_streams_fled_to(fleet: Fleet) -> None:
    """An instance dies; where its streams are taken in, the next one dies: as the reservation is answered, or later."""
    first, *others = fleet.ready
    streams = [fleet.submit(40, 200, at=first, seed=i) for i in range(6)]
    await fleet.at_least(3, *streams)
    killed: list[InstanceId] = []

    def strike(operation: Operation, go: Pass) -> None:
        if operation.op is Op.RESERVE and not killed:
            killed.append(operation.instance)
            fleet.kill(operation.instance)
        go()

    fleet.faults.on_answer = strike
    fleet.kill(first)
    await fleet.until(lambda: killed)
    await fleet.dead(first, *killed)
    await fleet.ledger_agrees()
    assert {s.where for s in streams} == set(others) - set(killed)
    await fleet.ended()
    fleet.expect_deaths()


async def test_an_instance_that_is_launched_later_serves_like_any_other(fleet: Fleet) -> None:
    first, second, third = fleet.ready
    stream = fleet.submit(60, 3000, at=first, seed=5)
    await fleet.at_least(3, stream)
    fleet.kill(second, third)
    await fleet.dead(second, third)
    (late,) = await fleet.launch()
    assert states(fleet) == {**states(fleet), first: "ready", second: "dead", third: "dead", late.instance_id: "ready"}
    assert (await fleet.move(stream, late.instance_id)).ok
    fleet.kill(first)
    await fleet.dead(first)
    assert fleet.submit(20, 20).where == late.instance_id
    await fleet.ended()
    fleet.expect_deaths()


async def test_an_instance_that_dies_at_its_start_harms_nobody(fleet: Fleet) -> None:
    stream = fleet.submit(60, 100, seed=5)
    future = fleet.cluster.instances.launch()
    started = next(i for i in fleet.cluster.instances if i.state is InstanceState.STARTING)
    fleet.kill(started.instance_id)
    with pytest.raises(LaunchError, match=f"instance {started.instance_id} ended with exit code -9"):
        await future
    assert states(fleet)[started.instance_id] == "dead"
    assert stream.where in fleet.ready


# ---------------------------------------------------------------------- nobody is left


async def alone(fleet: Fleet) -> InstanceId:
    """The one instance that is left."""
    first, *others = fleet.ready
    fleet.kill(*others)
    await fleet.dead(*others)
    return first


async def test_streams_wait_for_an_instance_when_the_only_one_dies(fleet: Fleet) -> None:
    """Meanwhile new ones wait too, nothing can be moved, and clients may leave; then a new instance takes over."""
    only = await alone(fleet)
    stays, leaves = (fleet.submit(60, 200, at=only, seed=i) for i in range(2))
    await fleet.at_least(5, stays, leaves)
    fleet.kill(only)
    await fleet.dead(only)
    waits = fleet.submit(seed=3)
    assert waits.live.route is None
    with pytest.raises(ConflictError, match=f"instance {only} is dead"):
        await fleet.move(stays, only)
    fleet.abort(leaves)
    (new,) = await fleet.launch()
    await fleet.at_least(len(stays.tokens) + 1, stays)
    assert stays.where == waits.where == new.instance_id
    await fleet.ended()
    fleet.expect_deaths()


async def test_a_stream_that_waits_for_its_replay_cannot_be_moved(fleet: Fleet) -> None:
    """Its source is dead: a move would wait for an answer that never comes, and the replay for the move."""
    only = await alone(fleet)
    stream = fleet.submit(60, 200, at=only, seed=1)
    await fleet.at_least(5, stream)
    fleet.kill(only)
    await fleet.dead(only)
    (new,) = await fleet.launch()
    with pytest.raises(ConflictError):
        await fleet.move(stream, new.instance_id)
    await fleet.ended()
    fleet.expect_deaths()


async def test_streams_end_with_an_error_if_nobody_comes() -> None:
    recovery = RecoveryConfig(restart=False, no_instance_timeout_s=0.3)
    async with fleet_of(1, recovery=recovery) as fleet:
        streams = [fleet.submit(60, 200, at=0, seed=i) for i in range(3)]
        await fleet.at_least(5, *streams)
        fleet.kill(0)
        await fleet.ended()
        assert [s.finish for s in streams] == ["error"] * 3
        assert all(s.tokens == s.expected[: len(s.tokens)] for s in streams)
        fleet.expect_errors("ended unexpectedly", *["is lost: no instance"] * 3)
        assert [e["how"] for e in fleet.events("finish")][-3:] == ["lost"] * 3


# ---------------------------------------------------------------------- answers are lost, nobody dies


@pytest.mark.parametrize("mode", [LIVE, STOP, RECOMPUTE])
@pytest.mark.parametrize("op", [Op.COMMIT, Op.RELEASE])
async def test_what_was_decided_is_asked_again_until_it_is_known(fleet: Fleet, op: Op, mode: MigrationMode) -> None:
    """Two questions and two answers are lost; the stream runs on at the destination meanwhile, and only there."""
    source, destination, _ = fleet.ready
    stream = fleet.submit(150, 150, at=source, seed=7)
    await fleet.at_least(3, stream)
    lost = {"sent": 0, "answered": 0}

    def lose(what: str, operation: Operation, go: Pass) -> None:
        if operation.op is op and lost[what] < 2:
            lost[what] += 1
        else:
            go()

    fleet.faults.on_send = partial(lose, "sent")
    fleet.faults.on_answer = partial(lose, "answered")
    report = await fleet.move(stream, destination, mode)
    assert (report.ok, stream.where) == (True, destination)
    await fleet.ended()
    await fleet.until(lambda: not fleet.cluster.migrations.open_migrations())
    assert lost == {"sent": 2, "answered": 2}


@pytest.mark.parametrize("mode", [LIVE, STOP, RECOMPUTE])
async def test_operations_that_arrive_twice_are_carried_out_once(fleet: Fleet, mode: MigrationMode) -> None:
    source, destination, _ = fleet.ready
    stream = fleet.submit(150, 150, at=source, seed=7)
    await fleet.at_least(3, stream)

    def twice(operation: Operation, go: Pass) -> None:
        go()
        go()

    fleet.faults.on_send = twice
    fleet.faults.on_answer = twice
    report = await fleet.move(stream, destination, mode)
    assert (report.ok, stream.where) == (True, destination)


@pytest.mark.parametrize("op", [Op.LOCATE, Op.RESERVE, Op.COPY, Op.LOAD, Op.DETACH])
async def test_a_stage_without_an_answer_is_given_up_and_the_stream_stays(op: Op) -> None:
    """What is lost before COMMIT is not asked for again."""
    migration = MigrationConfig(stage_timeout_s=0.2, lease_s=0.5, retry_s=0.2)
    async with fleet_of(2, migration=migration) as hasty:
        stream = hasty.submit(150, 400, at=0, seed=7)
        await hasty.at_least(3, stream)

        def lose(operation: Operation, go: Pass) -> None:
            if operation.op is not op:
                go()

        hasty.faults.on_answer = lose
        report = await hasty.move(stream, 1)
        states = {"locate": "locating", "reserve": "reserving", "copy": "copying", "load": "loading"}
        assert (report.ok, report.reason) == (False, f"{states.get(op, 'detaching')} timeout")
        assert stream.where == 0
        await hasty.assert_clean()
