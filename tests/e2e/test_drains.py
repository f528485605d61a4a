"""Draining: everything leaves by live migration, nobody notices, and the instance ends. Rolling restarts of them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from arriero.core.config import DrainConfig, RecoveryConfig
from arriero.core.errors import ConflictError, LaunchError, NotFoundError
from arriero.core.types import InstanceId, InstanceState
from arriero.launch.port import LaunchSpec
from arriero.sim.wire import SimRequest

from .harness import RECOMPUTE, WAIT_S, Fleet, Stream, fleet_of, prompt

pytestmark = pytest.mark.asyncio

RECOVERY = RecoveryConfig(backoff_s=0.05, retry_s=0.05, no_instance_timeout_s=WAIT_S)
ENGINE = {"time_scale": 0.05, "num_blocks": 2048}
LONG = 4000
"""Tokens: far more than are produced while anything here lasts."""


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with fleet_of(3, engine=ENGINE, recovery=RECOVERY) as started:
        yield started
        await started.assert_clean()


def unmovable(fleet: Fleet, max_tokens: int, *, at: InstanceId, seed: int) -> Stream:
    request = SimRequest(f"unmovable-{seed}@{at}", prompt(20, seed), max_tokens, seed)
    request.resumable = True
    return fleet.submit_request(request)


def moves(fleet: Fleet, *, ok: bool = True) -> list[dict[str, object]]:
    return [e for e in fleet.events("migration") if e["ok"] is ok and e["source"] is not None]


async def drained(fleet: Fleet, instance: InstanceId, *, force: bool = False) -> dict[str, object]:
    async with asyncio.timeout(WAIT_S):
        return (await fleet.cluster.drains.start(instance, cause="a test", force=force)).as_dict()


async def test_everything_leaves_by_live_migration_and_the_instance_ends(fleet: Fleet) -> None:
    """However much is still to come; waiting requests too; new ones go elsewhere at once."""
    streams = [fleet.submit(30 + i, LONG, at=0, seed=i) for i in range(70)]  # more than its batch holds
    others = [fleet.submit(30, 300, at=i, seed=i) for i in (1, 2)]
    await fleet.at_least(3, *streams[:20], *others)
    drain = asyncio.ensure_future(drained(fleet, 0))
    await fleet.until(lambda: fleet.ready == [1, 2])
    assert fleet.submit(20, 20, at=0).where in (1, 2)
    report = await drain
    assert (report["ok"], report["num_requests"]) == (True, 70)
    assert fleet.cluster.instances[0].state is InstanceState.DEAD
    assert fleet.cluster.instances[0].stage == "drained"
    assert {s.where for s in streams} <= {1, 2}
    assert all(s.is_running for s in streams), "it did not wait for anybody's end"
    assert fleet.segments() == [] or all("-i0-" not in name for name in fleet.segments())
    assert not fleet.events("instance_lost")
    fleet.abort(*streams)


async def test_streams_are_exact_over_one_drain_after_the_other(fleet: Fleet) -> None:
    streams = [fleet.submit(40, 500, at=i % 3, seed=i) for i in range(12)]
    await fleet.at_least(3, *streams)
    assert (await drained(fleet, 0))["ok"]
    assert (await drained(fleet, 1))["ok"]
    assert {s.where for s in streams} == {2}


async def test_draining_twice_is_the_same_drain_and_what_does_not_serve_is_refused(fleet: Fleet) -> None:
    stream = fleet.submit(40, 400, at=0)
    await fleet.at_least(1, stream)
    first, second = await asyncio.gather(drained(fleet, 0), drained(fleet, 0))
    assert first == second
    with pytest.raises(ConflictError, match="instance 0 is dead: only one that is ready can be drained"):
        await drained(fleet, 0)
    with pytest.raises(NotFoundError, match="instance 9 is unknown"):
        await drained(fleet, 9)


async def test_the_last_instance_is_drained_only_by_force_and_what_runs_there_ends_first(fleet: Fleet) -> None:
    for instance in (0, 1):
        await drained(fleet, instance)
    stream = fleet.submit(40, 100, seed=1)
    await fleet.at_least(1, stream)
    with pytest.raises(ConflictError, match="instance 2 is the last one that takes requests"):
        await drained(fleet, 2)
    assert fleet.ready == [2]
    report = await drained(fleet, 2, force=True)
    assert report["ok"]
    assert stream.finish == "length"
    waits = fleet.submit(20, 20)
    assert waits.live.route is None
    await fleet.launch()


async def test_an_operators_sigterm_drains_and_the_instance_is_not_replaced(fleet: Fleet) -> None:
    streams = [fleet.submit(40, 600, at=0, seed=i) for i in range(4)]
    await fleet.at_least(3, *streams)
    os.kill(fleet.cluster.instances[0].pid, signal.SIGTERM)
    await fleet.dead(0)
    await fleet.until(lambda: fleet.events("drain_ended"))
    assert fleet.events("drain_ended")[0]["cause"] == "SIGTERM"
    assert len(moves(fleet)) == 4
    assert len(list(fleet.cluster.instances)) == 3


async def test_sigterm_to_the_last_one_is_answered_in_the_log_and_it_serves_on(fleet: Fleet) -> None:
    for instance in (0, 1):
        await drained(fleet, instance)
    os.kill(fleet.cluster.instances[2].pid, signal.SIGTERM)
    await fleet.until(lambda: fleet._errors.messages)
    fleet.expect_errors("instance 2 was told to end, and is not drained: instance 2 is the last one")
    await fleet.ended(fleet.submit(20, 20))


async def test_an_instance_that_dies_in_its_drain_is_not_replaced_and_its_streams_go_on(fleet: Fleet) -> None:
    streams = [fleet.submit(200, 300, at=0, seed=i) for i in range(20)]
    await fleet.at_least(3, *streams)
    drain = asyncio.ensure_future(drained(fleet, 0))
    await fleet.until(lambda: len(fleet.faults.seen) > 10)
    fleet.kill(0)
    report = await drain
    await fleet.ended()
    assert not report["ok"]
    assert len(list(fleet.cluster.instances)) == 3
    fleet.expect_deaths()


async def test_a_destination_that_dies_in_a_drain_is_replaced_and_the_drain_goes_on(fleet: Fleet) -> None:
    streams = [fleet.submit(200, 300, at=0, seed=i) for i in range(20)]
    await fleet.at_least(3, *streams)
    drain = asyncio.ensure_future(drained(fleet, 0))
    await fleet.until(lambda: len(fleet.faults.seen) > 10)
    fleet.kill(1)
    assert (await drain)["ok"]
    await fleet.ended()
    await fleet.until(lambda: fleet.ready == [2, 3])
    fleet.expect_deaths()


async def test_what_finds_no_room_moves_without_its_cache_and_waits_there() -> None:
    """Two full instances: the drain does not wait for the end of anybody."""
    drain = DrainConfig(patience_s=0.0)
    engine = {"time_scale": 1.0, "num_blocks": 40, "max_model_len": 320}
    async with fleet_of(2, engine=engine, recovery=RECOVERY, drain=drain) as fleet:
        streams = [fleet.submit(200, 100, at=i, seed=i) for i in range(2)]
        await fleet.at_least(3, *streams)
        report = await drained(fleet, 0)
        assert report["ok"]
        assert [m["mode"] for m in moves(fleet)] == [RECOMPUTE]
        await fleet.assert_clean()


async def test_what_cannot_move_ends_there_or_is_cut_when_the_time_is_up() -> None:
    drain = DrainConfig(timeout_s=1.0)
    async with fleet_of(2, engine=ENGINE, recovery=RECOVERY, drain=drain) as fleet:
        short = unmovable(fleet, 20, at=0, seed=1)
        await fleet.at_least(1, short)
        report = await drained(fleet, 0)
        assert (report["ok"], short.finish, short.where) == (True, "length", 0)
        await fleet.launch()
        endless = unmovable(fleet, 6000, at=1, seed=2)
        movable = fleet.submit(20, 600, at=1, seed=3)
        await fleet.at_least(1, endless, movable)
        report = await drained(fleet, 1)
        assert not report["ok"]
        await fleet.ended(endless)
        assert endless.finish == "error"
        errors = " ".join(fleet.errors())
        assert "drain timed out after 1 s with 1 request(s) left" in errors
        assert "it cannot go on elsewhere" in errors
        await fleet.ended()
        fleet.errors()
        await fleet.assert_clean()


async def test_an_unmovable_request_that_has_said_nothing_yet_starts_anew_elsewhere(fleet: Fleet) -> None:
    """After a crash: nothing of it was delivered."""
    queue = [fleet.submit(20, 600, at=0, seed=i) for i in range(64)]
    await fleet.at_least(1, *queue)
    stuck = unmovable(fleet, 20, at=0, seed=99)
    fleet.kill(0)
    await fleet.ended(stuck)
    assert stuck.finish == "length"
    fleet.abort(*queue)
    fleet.expect_deaths()


# ---------------------------------------------------------------------- rolling restarts


@pytest.mark.parametrize("max_surge", [0, 1, 2])
async def test_all_instances_are_replaced_under_load_and_no_stream_notices(fleet: Fleet, max_surge: int) -> None:
    streams = [fleet.submit(40, 900, at=i % 3, seed=i) for i in range(9)]
    await fleet.at_least(3, *streams)
    report = await fleet.cluster.rollout.run(None, max_surge=max_surge)
    assert (report.ok, report.replaced) == (True, {0: 3, 1: 4, 2: 5})
    assert fleet.ready == [3, 4, 5]
    assert [i.place for i in fleet.cluster.instances] == [0, 1, 2] * 2
    assert [i["replaced_by"] for i in fleet.cluster.describe_instances()] == [3, 4, 5, None, None, None]
    assert not fleet.events("instance_lost")
    await fleet.ended()


async def test_who_dies_before_its_turn_is_replaced_once(fleet: Fleet) -> None:
    rolling = asyncio.ensure_future(fleet.cluster.rollout.run(None, max_surge=1))
    await fleet.until(lambda: len(list(fleet.cluster.instances)) == 4)
    fleet.kill(1, 2)
    report = await rolling
    assert report.ok
    await fleet.until(lambda: len(fleet.ready) == 3)
    assert sorted(i.place for i in fleet.cluster.instances if i.state is InstanceState.READY) == [0, 1, 2]
    fleet.expect_deaths()


async def test_new_flags_hold_for_all_that_start_from_then_on(fleet: Fleet) -> None:
    def wider(instance: InstanceId, place: int) -> LaunchSpec:
        fleet.engine_of[instance] = {"num_blocks": 1024}
        return fleet.spec(instance)

    report = await fleet.cluster.rollout.run([1], make_spec=wider, flags=["--num-blocks", "1024"])
    assert (report.ok, report.replaced, report.flags) == (True, {1: 3}, ["--num-blocks", "1024"])
    fleet.kill(3)
    await fleet.until(lambda: fleet.ready == [0, 2, 4])
    sizes = {i["id"]: i["blocks_total"] for i in fleet.cluster.describe_instances() if i["state"] == "ready"}
    assert sizes == {0: 2048, 2: 2048, 4: 1024}
    fleet.expect_deaths()


async def test_a_rollout_ends_with_the_first_replacement_that_does_not_start(fleet: Fleet) -> None:
    streams = [fleet.submit(40, 300, at=i % 3, seed=i) for i in range(6)]
    await fleet.at_least(3, *streams)

    def broken(instance: InstanceId, place: int) -> LaunchSpec:
        fleet.engine_of[instance] = {"num_blocks": 0}
        return fleet.spec(instance)

    report = await fleet.cluster.rollout.run(None, max_surge=1, make_spec=broken)
    assert not report.ok
    assert "instance 3 ended with exit code 1" in report.reason
    assert fleet.ready == [0, 1, 2]
    fleet.expect_errors("the rolling restart ends: instance 3 ended with exit code 1")
    await fleet.launch()
    assert len(fleet.ready) == 4, "the flags that did not work are forgotten"


async def test_one_rollout_at_a_time_and_none_that_would_leave_nobody(fleet: Fleet) -> None:
    running = asyncio.ensure_future(fleet.cluster.rollout.run([0], max_surge=1))
    await fleet.until(lambda: len(list(fleet.cluster.instances)) == 4)
    with pytest.raises(ConflictError, match="a restart is under way"):
        await fleet.cluster.rollout.run(None)
    with pytest.raises(ConflictError, match="instance 3 is starting: it cannot be restarted now"):
        fleet.cluster.rollout.choose([3])
    assert (await running).ok
    for instance in (1, 2):
        await drained(fleet, instance)
    with pytest.raises(ConflictError, match="restart with --max-surge 1"):
        await fleet.cluster.rollout.run(None, max_surge=0)
    with pytest.raises(NotFoundError):
        await fleet.cluster.rollout.run([77])


async def test_nothing_is_started_once_the_end_has_begun() -> None:
    async with fleet_of(1, engine=ENGINE, recovery=RECOVERY) as fleet:
        fleet.cluster.close(WAIT_S)
        with pytest.raises(LaunchError, match="the server ends"):
            await fleet.cluster.instances.launch()
