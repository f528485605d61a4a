"""Moves that cannot be: each is refused for its reason, and the stream runs on where it is."""

from __future__ import annotations

import asyncio
import re

import pytest

from arriero.core.config import MigrationConfig
from arriero.core.errors import ConflictError, NotFoundError, UnmovableError
from arriero.core.messages import Op
from arriero.core.types import InstanceState, MigrationMode
from arriero.sim.wire import SimRequest

from .harness import LIVE, RECOMPUTE, STOP, Fleet, Operation, Pass, fleet_of, prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_what_is_unknown_or_there_already_cannot_move(fleet: Fleet) -> None:
    stream = fleet.submit(at=0, max_tokens=300)
    await fleet.at_least(1, stream)
    cluster = fleet.cluster
    with pytest.raises(NotFoundError, match="request 'nobody' is not running"):
        await cluster.migrate("nobody", 1)
    with pytest.raises(NotFoundError, match="instance 7 is unknown"):
        await cluster.migrate(stream.id, 7)
    with pytest.raises(ConflictError, match=f"request {stream.id} runs on instance 0 already"):
        await cluster.migrate(stream.id, 0)
    await fleet.ended(stream)
    with pytest.raises(NotFoundError, match=f"request '{stream.id}' is not running: it has ended"):
        await cluster.migrate(stream.id, 1)
    assert fleet.faults.seen == []


async def test_a_stream_that_moves_cannot_be_moved_again_until_it_has_arrived(fleet: Fleet) -> None:
    stream = fleet.submit(200, 300, at=0)
    await fleet.at_least(1, stream)
    first = asyncio.ensure_future(fleet.move(stream, 1))
    await fleet.until(lambda: fleet.cluster.migrations.is_moving(stream.id))
    with pytest.raises(ConflictError, match=f"request {stream.id} is moving already"):
        await fleet.move(stream, 1)
    assert (await first).ok
    assert (await fleet.move(stream, 0)).ok


async def test_nothing_moves_to_an_instance_that_is_not_ready(fleet: Fleet) -> None:
    stream = fleet.submit(max_tokens=900, at=0)
    starting = fleet.cluster.instances.launch()
    new = next(i for i in fleet.cluster.instances if i.state is InstanceState.STARTING)
    with pytest.raises(ConflictError, match=f"instance {new.instance_id} is starting, not ready"):
        await fleet.move(stream, new.instance_id)
    await starting
    report = await fleet.move(stream, new.instance_id)
    assert report.ok, report.reason
    fleet.kill(new.instance_id)
    await fleet.dead(new.instance_id)
    fleet.expect_deaths()
    await fleet.until(lambda: stream.where != new.instance_id)
    with pytest.raises(ConflictError, match=f"instance {new.instance_id} is dead, not ready"):
        await fleet.move(stream, new.instance_id)


async def test_a_request_that_cannot_move_says_why(fleet: Fleet) -> None:
    request = SimRequest("fixed@0", prompt(20), 60)
    request.mm_features = ["an image"]
    stream = fleet.submit_request(request)
    with pytest.raises(UnmovableError, match="request fixed@0 cannot move: it has multi-modal input"):
        await fleet.move(stream, 1)


@pytest.mark.parametrize("mode", list(MigrationMode))
async def test_a_destination_without_memory_refuses(mode: MigrationMode) -> None:
    """A recompute takes no memory yet: it queues. The others would have to be preempted at once."""
    async with fleet_of(2, engine_of={1: {"num_blocks": 20, "max_model_len": 160}}) as fleet:
        small = fleet.submit(90, 60, at=1)
        large = fleet.submit(90, 60, at=0, seed=2)
        await fleet.at_least(2, small, large)
        report = await fleet.move(large, 1, mode)
        assert report.ok is (mode is RECOMPUTE)
        if not report.ok:
            assert report.reason.startswith("destination refused: ")
            assert report.reason.endswith("are free")
        await fleet.assert_clean()


async def test_a_destination_that_runs_full_while_blocks_arrive_refuses() -> None:
    """The reservation was granted; it cannot grow. The destination is in a step of seconds and answers meanwhile."""
    engine = {"num_blocks": 60, "max_model_len": 480, "async_scheduling": True, "time_scale": 50}
    async with fleet_of(2, engine_of={1: engine}) as fleet:
        stream = fleet.submit(300, 170, at=0)
        await fleet.at_least(2, stream)
        others: list[asyncio.Task[None]] = []

        async def fill_up(go: Pass) -> None:
            free = (await fleet.links.utility(1, "arriero_check"))["free_blocks"]
            fleet.submit(8 * free - 1, 20, at=1)
            await fleet.at_least(len(stream.tokens) + 24, stream)
            while (await fleet.links.utility(1, "arriero_check"))["free_blocks"]:
                await asyncio.sleep(0.01)
            go()

        def fill_up_before_copy(operation: Operation, go: Pass) -> None:
            if operation.op is Op.COPY and not others:
                others.append(asyncio.get_running_loop().create_task(fill_up(go)))
            else:
                go()

        fleet.faults.on_send = fill_up_before_copy
        report = await fleet.move(stream, 1)
        assert not report.ok
        assert re.fullmatch(r"destination refused: [1-4] more KV blocks are needed, 0 are free", report.reason)
        fleet.abort(*[s for s in fleet.streams.values() if s is not stream])
        await fleet.assert_clean()


@pytest.mark.parametrize("mode", [LIVE, STOP])
async def test_a_destination_whose_batch_is_full_refuses(mode: MigrationMode) -> None:
    async with fleet_of(2, engine_of={1: {"max_num_seqs": 2}}) as fleet:
        running = [fleet.submit(20, 400, at=1) for _ in range(2)]
        stream = fleet.submit(20, 60, at=0)
        await fleet.at_least(2, stream, *running)
        report = await fleet.move(stream, 1, mode)
        assert (report.ok, report.reason) == (False, "destination refused: all 2 places in the batch are taken")
        await fleet.assert_clean()


async def test_a_destination_takes_in_only_so_many_at_a_time() -> None:
    async with fleet_of(2, migration=MigrationConfig(max_incoming=3)) as fleet:
        streams = [fleet.submit(100, 120, at=0, seed=i) for i in range(8)]
        await fleet.at_least(2, *streams)
        reports = await asyncio.gather(*[fleet.move(s, 1) for s in streams])
        refused = [r.reason for r in reports if not r.ok]
        assert 3 <= len(streams) - len(refused) < len(streams)
        assert set(refused) == {"destination refused: 3 migrations are coming in already"}
        await fleet.assert_clean()


async def test_a_request_that_is_too_long_for_the_destination_stays() -> None:
    async with fleet_of(2, engine_of={1: {"max_model_len": 100}}) as fleet:
        stream = fleet.submit(120, 60, at=0)
        await fleet.at_least(2, stream)
        for mode in MigrationMode:
            report = await fleet.move(stream, 1, mode)
            assert not report.ok
            assert "99 are possible here" in report.reason
        await fleet.assert_clean()
