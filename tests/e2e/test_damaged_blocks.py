"""KV blocks that arrive damaged: the move fails, the stream runs on where it is, and its text is right."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arriero.core.messages import Op
from arriero.core.types import MigrationMode
from arriero.transport.shm import HEADER_BYTES

from .harness import LIVE, STOP, Fleet, Operation, Pass

pytestmark = pytest.mark.asyncio(loop_scope="module")


def damage(ticket: dict[str, Any], chance: random.Random) -> None:
    """Flip one bit of what is staged."""
    with (Path("/dev/shm") / ticket["name"]).open("r+b") as staged:
        place = HEADER_BYTES + chance.randrange(ticket["num_bytes"])
        staged.seek(place)
        (byte,) = staged.read(1)
        staged.seek(place)
        staged.write(bytes([byte ^ (1 << chance.randrange(8))]))


def damage_exports(fleet: Fleet, op: Op, chance: random.Random) -> None:
    """Whatever is exported from now on by this operation arrives with a wrong bit."""

    def on_answer(operation: Operation, go: Pass) -> None:
        assert operation.answer is not None
        if operation.op is op and operation.answer.ticket is not None:
            damage(operation.answer.ticket, chance)
        go()

    fleet.faults.on_answer = on_answer


@pytest.mark.parametrize(
    ("mode", "op"),
    [(LIVE, Op.COPY), (LIVE, Op.DETACH), (STOP, Op.DETACH)],
)
async def test_a_damaged_block_is_never_decoded_from(fleet: Fleet, mode: MigrationMode, op: Op) -> None:
    """The simulated engine's tokens come from the contents of its blocks: a damaged one would show in the text."""
    streams = [fleet.submit(150, 400, at=0, seed=s) for s in range(3)]
    await fleet.at_least(5, *streams)
    damage_exports(fleet, op, random.Random(f"{mode} {op}"))
    for stream in streams:
        report = await fleet.move(stream, 1, mode)
        assert not report.ok
        assert "damaged" in report.reason
        assert stream.where == 0
    fleet.faults.reset()
    for stream in streams:  # nothing is left of the failed move that would keep the next one from working
        assert (await fleet.move(stream, 1, mode)).ok


@pytest.mark.parametrize("change", [{"num_bytes": 100}, {"num_bytes": 1 << 40}, {"staging": 10**9}, {"name": "gone"}])
async def test_a_ticket_that_names_other_bytes_fails_the_move(fleet: Fleet, change: dict[str, Any]) -> None:
    """Cut short, longer than the memory, staged at another time, or by nobody."""
    stream = fleet.submit(150, 200, at=0)
    await fleet.at_least(5, stream)

    def on_answer(operation: Operation, go: Pass) -> None:
        assert operation.answer is not None
        if operation.answer.ticket is not None:
            operation.answer = replace(operation.answer, ticket={**operation.answer.ticket, **change})
        go()

    fleet.faults.on_answer = on_answer
    report = await fleet.move(stream, 1)
    assert not report.ok
    assert report.reason.startswith("destination refused")
    assert stream.where == 0
