"""The global queue and scaling, on instances in processes of their own; `assert_clean` checks every token."""

from __future__ import annotations

import pytest

from arriero.core.config import QueueingConfig, RebalancingConfig, ScalingConfig
from arriero.core.types import InstanceState

from .harness import fleet_of

pytestmark = pytest.mark.asyncio

SMALL = {"num_blocks": 96, "max_num_seqs": 4}
QUEUEING = QueueingConfig(reserve_tokens_per_running=16)


async def test_more_than_fits_waits_globally_and_every_stream_is_whole() -> None:
    """Large and small prompts, several times what two instances hold; the default's rules."""
    async with fleet_of(
        2, policy="freeness", engine=SMALL, queueing=QUEUEING, rebalancing=RebalancingConfig(interval_s=0.05)
    ) as fleet:
        streams = [fleet.submit(600 if n % 5 == 0 else 40, 60, seed=n) for n in range(20)]
        assert fleet.cluster.scheduler.num_queued > 0
        waiting = [s for s in streams if s.live.route is None]
        assert {"queued"} == {r["state"] for r in fleet.cluster.describe_requests() if r["id"] == waiting[0].id}
        await fleet.ended(*streams)
        await fleet.assert_clean()


async def test_the_urgent_start_first_and_who_gives_up_in_the_queue_takes_nothing_along() -> None:
    async with fleet_of(1, policy="freeness", engine={**SMALL, "max_num_seqs": 1}, queueing=QUEUEING) as fleet:
        first = fleet.submit(40, 200)
        normal, gone, urgent = fleet.submit(40, 10), fleet.submit(40, 10), fleet.submit(40, 10, priority=-1)
        assert fleet.cluster.scheduler.num_queued == 3
        fleet.abort(gone)
        assert fleet.cluster.scheduler.num_queued == 2
        await fleet.ended(first, urgent)
        assert not normal.finish
        await fleet.ended(normal)
        order = [e["request"] for e in fleet.events("dispatch")]
        assert order == [first.id, urgent.id, normal.id]
        await fleet.assert_clean()


async def test_instances_come_with_the_load_and_go_with_it() -> None:
    scaling = ScalingConfig(
        low_freeness=20, high_freeness=60, min_instances=1, max_instances=2, period_s=0.1, cooldown_s=0.2
    )
    async with fleet_of(1, policy="freeness", engine={**SMALL, "time_scale": 0.3}, scaling=scaling) as fleet:
        streams = [fleet.submit(100, 150) for _ in range(3)]
        await fleet.until(lambda: len(fleet.ready) == 2)
        await fleet.ended(*streams)
        await fleet.until(lambda: len(fleet.ready) == 1)
        await fleet.until(lambda: sum(i.state is not InstanceState.DEAD for i in fleet.cluster.instances) == 1)
        last = fleet.submit(40, 10)
        await fleet.ended(last)
        assert len(last.tokens) == 10
