"""Instances that die or hang are replaced; a place that keeps dying is fenced; requests wait for an instance."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from arriero.core.config import RecoveryConfig
from arriero.core.errors import UnavailableError
from arriero.core.types import InstanceId, InstanceState
from arriero.sim.fleet import facts_of
from arriero.sim.wire import SimRequest

from .harness import WAIT_S, Fleet, fleet_of

pytestmark = pytest.mark.asyncio

RECOVERY = RecoveryConfig(backoff_s=0.05, max_backoff_s=0.1, max_deaths=4, retry_s=0.05, no_instance_timeout_s=WAIT_S)
ENGINE = {"time_scale": 0.05}


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with fleet_of(2, engine=ENGINE, recovery=RECOVERY) as started:
        yield started
        await started.assert_clean()


async def test_a_killed_instance_is_replaced_under_a_new_number_and_says_so(fleet: Fleet) -> None:
    streams = [fleet.submit(60, 200, at=i % 2, seed=i) for i in range(6)]
    await fleet.at_least(3, *streams)
    fleet.kill(0)
    await fleet.dead(0)
    await fleet.until(lambda: fleet.ready == [1, 2])
    old, _, new = fleet.cluster.describe_instances()
    assert (old["stage"], old["replaced_by"]) == ("killed by SIGKILL", 2)
    assert (new["replaces"], new["place"]) == (0, old["place"])
    assert fleet.submit(20, 20, at=2).live.route == 2
    await fleet.ended()
    fleet.expect_deaths()


async def test_all_die_and_running_and_new_requests_wait_for_the_replacements(fleet: Fleet) -> None:
    streams = [fleet.submit(60, 200, at=i % 2, seed=i) for i in range(4)]
    await fleet.at_least(3, *streams)
    fleet.kill(0, 1)
    await fleet.dead(0, 1)
    late = fleet.submit(30, 20, seed=9)
    assert late.live.route is None
    await fleet.ended()
    assert {s.where for s in fleet.streams.values()} <= {2, 3}
    fleet.expect_deaths()


async def test_an_instance_that_hangs_is_killed_and_replaced_and_an_idle_one_that_answers_is_not() -> None:
    recovery = RecoveryConfig(hang_timeout_s=2.0, no_instance_timeout_s=WAIT_S, retry_s=0.05)
    async with fleet_of(2, engine=ENGINE, recovery=recovery) as fleet:
        streams = [fleet.submit(60, 300, at=0, seed=i) for i in range(3)]
        await fleet.at_least(3, *streams)
        os.kill(fleet.cluster.instances[0].pid, signal.SIGSTOP)
        await fleet.ended()
        await fleet.until(lambda: fleet.ready == [1, 2])
        assert fleet.cluster.instances[0].stage == "hung: no answer for 2 s"
        fleet.expect_errors("instance 0 is killed: hung", "instance 0 ended unexpectedly (exit code -9)")
        await fleet.assert_clean()


async def test_a_place_that_keeps_dying_is_fenced_and_the_others_serve_on(fleet: Fleet) -> None:
    victim: InstanceId | None = 0
    deaths = 0
    while victim is not None:
        fleet.signal(signal.SIGABRT, victim)
        await fleet.dead(victim)
        deaths += 1
        await fleet.until(lambda v=victim: _settled(fleet, v))
        victim = fleet.cluster.instances[victim].replaced_by
    assert deaths == RECOVERY.max_deaths
    last = fleet.cluster.describe_instances()[-1]
    assert last["stage"].startswith("killed by SIGABRT; fenced: 4 deaths in ")
    await fleet.ended(fleet.submit(20, 20))
    fleet.expect_errors(*["ended unexpectedly (exit code -6)"] * deaths)
    report = await fleet.cluster.rollout.run([last["id"]])
    assert (report.ok, len(fleet.ready)) == (True, 2), "an operator's restart starts it again"


def _settled(fleet: Fleet, dead: InstanceId) -> bool:
    """It is replaced by one that is ready, or will not be."""
    instance = fleet.cluster.instances[dead]
    if instance.replaced_by is None:
        return "fenced" in instance.stage
    return fleet.cluster.instances[instance.replaced_by].state is InstanceState.READY


async def test_a_replacement_that_does_not_start_is_tried_again(fleet: Fleet) -> None:
    fleet.engine_of = {2: {"num_blocks": 0}}
    fleet.kill(0)
    await fleet.until(lambda: fleet.ready == [1, 3])
    assert [i.replaces for i in fleet.cluster.instances] == [None, None, 0, 2]
    fleet.expect_errors("instance 0 ended unexpectedly", "instance 2 ended with exit code 1")


async def test_without_restarts_new_requests_are_refused_when_the_time_is_up() -> None:
    recovery = RecoveryConfig(restart=False, no_instance_timeout_s=0.3)
    async with fleet_of(1, engine=ENGINE, recovery=recovery) as fleet:
        running = fleet.submit(60, 300, at=0, seed=1)
        await fleet.at_least(3, running)
        fleet.kill(0)
        await fleet.dead(0)
        queued = fleet.submit(20, 20)
        requests = [SimRequest(f"late-{n}", [1, 2, 3], 5) for n in range(2)]
        waiting = [asyncio.create_task(fleet.cluster.intake.admit(r, facts_of(r), r.request_id)) for r in requests]
        await asyncio.sleep(0)
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        with pytest.raises(UnavailableError, match="no instance"):
            await waiting[1]
        await fleet.ended(running, queued)
        assert (running.finish, queued.finish) == ("error", "error")
        assert len(fleet.cluster.requests) == 0
        fleet.errors()


async def test_a_stream_outlives_any_number_of_instances_that_somebody_kills() -> None:
    """It is never blamed for that, although it is among the running at every death."""
    recovery = RecoveryConfig(
        backoff_s=0.01, max_backoff_s=0.01, max_deaths=RECOVERY.max_deaths, retry_s=0.05, no_instance_timeout_s=WAIT_S,
        max_replays=1, probation_tokens=1000,
    )  # fmt: skip
    async with fleet_of(1, engine=ENGINE, recovery=recovery) as fleet:
        streams = [fleet.submit(60, 200, seed=i) for i in range(2)]
        for _ in range(RECOVERY.max_deaths + 2):
            await fleet.until(lambda: bool(fleet.ready))
            await fleet.at_least(len(streams[0].tokens) + 5, streams[0])
            (victim,) = fleet.ready
            fleet.kill(victim)
            await fleet.dead(victim)
        await fleet.ended(*streams)
        assert [s.finish for s in streams] == ["length", "length"]
        fleet.expect_deaths()
        await fleet.assert_clean()


# ---------------------------------------------------------------------- poison

POISON = 40_001
"""A token id that kills a simulated engine which computes it."""


async def test_a_poison_request_is_given_up_and_its_neighbours_live() -> None:
    recovery = RecoveryConfig(
        backoff_s=0.05, max_deaths=9, retry_s=0.05, no_instance_timeout_s=WAIT_S, probation_tokens=4
    )
    async with fleet_of(2, engine={**ENGINE, "crash_token_id": POISON}, recovery=recovery) as fleet:
        streams = [fleet.submit(60, 300, at=i % 2, seed=i) for i in range(8)]
        await fleet.at_least(3, *streams)
        poison = fleet.submit_request(SimRequest("poison", [1, 2, POISON, 3], 50))
        await fleet.ended()
        assert poison.finish == "error"
        assert poison.tokens == []
        said = [e for e in fleet.errors() if "ended unexpectedly (exit code 1)" not in e]
        assert len(said) == 1
        assert "request poison is lost: it has killed every instance" in said[0]
        assert len(fleet.events("instance_lost")) == 3, "one, and two replays"
        await fleet.until(lambda: len(fleet.ready) == 2)
        await fleet.assert_clean()


async def test_a_poison_that_strikes_late_is_given_up_too() -> None:
    """It has produced tokens before it kills: they were delivered once, and the client gets an error after them."""
    recovery = RecoveryConfig(backoff_s=0.05, max_deaths=9, retry_s=0.05, no_instance_timeout_s=WAIT_S)
    async with fleet_of(2, engine={**ENGINE, "crash_length": 500}, recovery=recovery) as fleet:
        streams = [fleet.submit(60, 200, at=i % 2, seed=i) for i in range(6)]
        poison = fleet.submit(450, 100, seed=99)
        await fleet.ended()
        assert poison.finish == "error"
        assert 40 <= len(poison.tokens) <= 50
        assert poison.tokens == poison.expected[: len(poison.tokens)]
        assert {s.finish for s in streams} == {"length"}
        fleet.errors()
        await fleet.assert_clean()
