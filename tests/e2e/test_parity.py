"""The full event log of a front end with real processes behind it: the scheduler, told of it again, decides alike."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from arriero.core.config import EventLogConfig, LogLevel, RebalancingConfig
from arriero.observe.events import EventLog
from arriero.observe.parity import replay

from .harness import fleet_of

pytestmark = pytest.mark.asyncio


async def test_moves_priorities_a_crash_and_a_drain_are_decided_alike_when_replayed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = EventLog(time.monotonic, path, wait=False, config=EventLogConfig(level=LogLevel.FULL))
    rebalancing = RebalancingConfig(interval_s=0.01, low_freeness=60, high_freeness=60, cooldown_s=0)
    engine = {"num_blocks": 256, "time_scale": 0.3, "max_num_seqs": 12}
    async with fleet_of(3, engine=engine, rebalancing=rebalancing, events=events) as fleet:
        streams = [fleet.submit(40 + i, 150, at=0, seed=i, priority=i % 3 - 1) for i in range(9)]
        await fleet.until(lambda: len([e for e in fleet.events("migration") if e["ok"]]) >= 2)
        fleet.kill(1)
        await fleet.dead(1)
        fleet.expect_deaths()
        await fleet.launch()
        fleet.abort(streams[8])
        fleet.cluster.scheduler.instance_draining(0, fleet.cluster.clock())
        await fleet.ended(*[s for s in streams if not s.aborted])
        await fleet.assert_clean()
    result = replay(path)
    assert result.difference is None, str(result)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    decisions = [line for line in lines if line.get("event") == "decision"]
    assert len(decisions) == result.num_events
    told = Counter(d["on"] for d in decisions)
    assert told["instance_joined"] == 4
    assert told["instance_lost"] == told["instance_draining"] == 1
    assert told["arrived"] >= 9
    assert told["migration_started"] == told["migration_ended"] >= 2
    assert {d["given"]["request"]["priority"] for d in decisions if d["on"] == "arrived"} == {-1, 0, 1}
    assert Counter(line.get("event") for line in lines)["dispatch"] == told["arrived"]


async def test_a_disk_that_stands_still_holds_up_no_stream(tmp_path: Path) -> None:
    """What it does not take is left out and counted. A pipe that nobody reads is such a disk."""
    path, left_out = tmp_path / "events.jsonl", list[int]()
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    config = EventLogConfig(level=LogLevel.FULL, max_pending_bytes=1000)
    events = EventLog(time.monotonic, path, wait=False, config=config, on_left_out=left_out.append)
    async with fleet_of(2, events=events) as fleet:
        while not left_out:
            fleet.submit(40, 60)
            await fleet.assert_clean()
        os.close(reader)  # the writer's thread ends
