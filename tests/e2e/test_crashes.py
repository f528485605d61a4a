"""SIGKILL of an instance, at every point of a move: the streams go on whole, elsewhere, and nothing is left behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from arriero.core.errors import ConflictError, LaunchError, UnavailableError
from arriero.core.messages import Op
from arriero.core.types import InstanceId, InstanceState
from arriero.frontend import cluster as cluster_module

from .harness import LIVE, RECOMPUTE, STOP, Fleet, Operation, Pass, fleet_of

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


@pytest.mark.parametrize("who", VICTIMS)
@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("op", STAGES)
async def test_a_crash_at_every_stage_of_a_move(fleet: Fleet, op: Op, answered: bool, who: str) -> None:
    await crash(fleet, op, who, answered=answered)


@pytest.mark.parametrize("who", VICTIMS)
@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("refused", "op"), [(Op.LOAD, Op.DROP), (Op.COMMIT, Op.RESUME)])
async def test_a_crash_while_a_move_is_called_off(
    fleet: Fleet, refused: Op, op: Op, answered: bool, who: str
) -> None:
    """The destination refuses; then somebody dies before the request goes on at the source, or just after."""
    source, destination, _ = fleet.ready
    victims = {"source": [source], "destination": [destination], "both": [source, destination]}[who]
    stream = fleet.submit(150, 150, at=source, seed=7)
    await fleet.at_least(3, stream)
    killer = Killer(fleet, op, victims, answered=answered)
    kill_answered = fleet.faults.on_answer

    def refuse(operation: Operation, go: Pass) -> None:
        if operation.op is refused and operation.answer is not None:
            fleet.links.call(destination, _drop_of(operation), lambda answer: None)  # it has refused: it holds nothing
            operation.answer = replace(operation.answer, ok=False, reason="no")
        kill_answered(operation, go)

    fleet.faults.on_answer = refuse
    report = await fleet.move(stream, destination)
    await fleet.until(lambda: killer.has_struck)
    await fleet.dead(*victims)
    assert not report.ok
    await fleet.ended()
    fleet.expect_deaths()
