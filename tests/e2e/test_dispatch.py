"""Where new requests go, by each policy, on instances that report their load themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from arriero.core.config import SchedulerConfig
from arriero.core.dispatch import ClusterView
from arriero.core.errors import ConfigError
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceId

from .harness import PLACED, Fleet, fleet_of

pytestmark = pytest.mark.asyncio


class Fickle:
    """A user's own policy that wants an instance which is not there."""

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """Not one of the candidates."""
        return max(view.candidates) + 1


def placed(fleet: Fleet, count: int, num_prompt_tokens: Callable[[int], int] = lambda i: 40) -> list[InstanceId]:
    """Where a burst of requests goes; nothing is heard of an instance meanwhile."""
    return [fleet.submit(num_prompt_tokens(i), 60).where for i in range(count)]


async def test_round_robin_goes_in_turn_and_skips_the_dead() -> None:
    async with fleet_of(3, policy="round_robin") as fleet:
        assert placed(fleet, 7) == [0, 1, 2, 0, 1, 2, 0]
        fleet.kill(1)
        await fleet.dead(1)
        fleet.expect_deaths()
        await fleet.ledger_agrees()
        assert Counter(placed(fleet, 6)) == {0: 3, 2: 3}
        await fleet.launch()
        assert Counter(placed(fleet, 6)) == {0: 2, 2: 2, 3: 2}
        await fleet.assert_clean()


async def test_least_outstanding_counts_what_was_sent_what_ended_and_what_moved() -> None:
    async with fleet_of(3, policy="least_outstanding") as fleet:
        streams = [fleet.submit(40, 3000) for _ in range(7)]
        assert [s.where for s in streams] == [0, 1, 2, 0, 1, 2, 0]
        await fleet.at_least(1, *streams)
        assert (await fleet.move(streams[0], 2)).ok
        fleet.abort(streams[1])
        assert placed(fleet, 3) == [1, 0, 1], "counts were 2, 1, 3"
        fleet.abort(*streams)
        await fleet.assert_clean()


async def test_a_burst_between_two_snapshots_spreads_evenly_by_freeness() -> None:
    """The ledger counts what no snapshot shows yet."""
    async with fleet_of(3, policy="freeness") as fleet:
        snapshots = len(fleet.snapshots)
        assert Counter(placed(fleet, 30)) == {0: 10, 1: 10, 2: 10}
        assert len(fleet.snapshots) == snapshots
        await fleet.assert_clean()


async def test_freeness_prefers_the_instance_with_more_free_blocks_a_request() -> None:
    """A long prompt at one counts for more than one request: fewer of the short ones go there."""
    async with fleet_of(3, policy="freeness") as fleet:
        longest, *others = [fleet.submit(n, 900) for n in (8 * 96, *[8 * 16 - 1] * 12)]
        counts = Counter(s.where for s in others)
        assert all(counts[longest.where] < counts[i] for i in {0, 1, 2} - {longest.where})
        fleet.abort(*fleet.streams.values())
        await fleet.assert_clean()


async def test_freeness_knows_sizes_of_instances() -> None:
    async with fleet_of(2, policy="freeness", engine_of={1: {"num_blocks": 128}}) as fleet:
        assert Counter(placed(fleet, 20, lambda i: 8 * 16 - 1)) == {0: 16, 1: 4}, "in proportion to 512 and 128 blocks"
        await fleet.assert_clean()


async def test_a_policy_of_the_users_own_decides() -> None:
    async with fleet_of(3, policy=PLACED) as fleet:
        assert [fleet.submit(at=i % 3).where for i in (2, 1, 0, 2)] == [2, 1, 0, 2]
        await fleet.assert_clean()


async def test_where_a_policy_breaks_its_promise_the_default_serves_and_the_failure_is_counted() -> None:
    async with fleet_of(2, policy=f"{__name__}.{Fickle.__name__}") as fleet:
        streams = [fleet.submit(), fleet.submit()]
        assert {s.where for s in streams} == {0, 1}
        (metric,) = fleet.cluster.metrics.policy_failures.collect()
        assert [s.value for s in metric.samples if s.name.endswith("_total")] == [2]
        await fleet.ended(*streams)
        await fleet.assert_clean()


@pytest.mark.parametrize("name", ["nonsense", "no.such.module", f"{__name__}.NoSuchClass", "os.path"])
async def test_a_policy_that_cannot_be_had_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        GlobalScheduler(SchedulerConfig(dispatch_policy=name))
