"""What a front end logs is a workload for `arriero simulate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.observe.events import EventLog
from arriero.workload.recorded import read_log

from .harness import fleet_of

pytestmark = pytest.mark.asyncio


async def test_the_log_of_a_front_end_has_every_request_that_ended_as_it_was(tmp_path: Path) -> None:
    """Also one that moved, one that was aborted, and none that still runs."""
    path = tmp_path / "events.jsonl"
    async with fleet_of(2, policy="round_robin") as fleet:
        fleet.cluster.events = EventLog(fleet.cluster.clock, path)
        streams = [fleet.submit(40 + i, 20 + i) for i in range(4)]
        await fleet.at_least(1, streams[0])
        await fleet.move(streams[0], 1)
        await fleet.ended(*streams)
        endless = [fleet.submit(60, 3000), fleet.submit(70, 3000)]
        await fleet.at_least(3, *endless)
        fleet.abort(endless[0])
        workload = read_log(path)
        fleet.abort(endless[1])
        fleet.cluster.events.close()
        await fleet.assert_clean()
    assert [a.prompt_tokens for a in workload.arrivals] == [40, 41, 42, 43, 60]
    assert [a.output_tokens for a in workload.arrivals[:4]] == [20, 21, 22, 23]
    assert workload.arrivals[4].output_tokens >= 3
    assert [a.max_tokens for a in workload.arrivals] == [20, 21, 22, 23, 3000]
    assert workload.arrivals[0].arrival_s == 0.0
