"""`make bench-scheduler`: how long the scheduler takes to decide, by the number of instances.

Each instance runs 100 requests; one in ten is short of memory, so that rounds have something to do. A dispatch is one
``arrived``; snapshots come in between, one instance at a time, as they do in production, and are measured as well. A
round is one ``tick`` with every move that it wants; what it decides is not carried out, so that all rounds are alike.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from arriero.bench.report import Target, print_table, write
from arriero.core.commands import Dispatch, Move
from arriero.core.policies import policy_config
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, Phase, RequestSnapshot

NUM_BLOCKS = 4096
BLOCK_SIZE = 16


def snapshot(instance: InstanceId, rng: random.Random, num_running: int) -> InstanceSnapshot:
    """An instance with ``num_running`` requests; every tenth has hardly any memory left."""
    share = 0.97 if instance % 10 == 0 else rng.uniform(0.4, 0.7)
    sizes = [rng.randint(1, 40) for _ in range(num_running)]
    scale = share * NUM_BLOCKS / sum(sizes)
    requests = []
    for number, size in enumerate(sizes):
        blocks = max(1, round(size * scale))
        requests.append(
            RequestSnapshot(
                request_id=f"{instance}-{number}",
                phase=Phase.RUNNING,
                num_tokens=BLOCK_SIZE * blocks,
                num_blocks=blocks,
            )
        )
    return InstanceSnapshot.of(
        requests,
        instance=instance,
        time_s=0.0,
        num_blocks=NUM_BLOCKS,
        num_free_blocks=max(0, NUM_BLOCKS - sum(r.num_blocks for r in requests)),
        block_size=BLOCK_SIZE,
        max_num_seqs=256,
        step_s=0.03,
    )


def loaded(policy: str, num_instances: int, num_running: int, rng: random.Random) -> GlobalScheduler:
    """A scheduler that has seen such a cluster."""
    scheduler = GlobalScheduler(policy_config(policy))
    for instance in range(num_instances):
        scheduler.instance_joined(instance, 0.0)
        scheduler.snapshot(snapshot(instance, rng, num_running), 0.0)
    return scheduler


def measure(policy: str, num_instances: int, num_running: int, num_dispatches: int, num_rounds: int) -> dict[str, Any]:
    """Percentiles in microseconds (dispatch, snapshot) and milliseconds (round)."""
    rng = random.Random(num_instances)
    scheduler = loaded(policy, num_instances, num_running, rng)
    dispatch_s: list[float] = []
    snapshot_s: list[float] = []
    for number in range(num_dispatches):
        reported = snapshot(rng.randrange(num_instances), rng, num_running)
        snapshot_s.append(_timed(lambda reported=reported, now=float(number): scheduler.snapshot(reported, now)))  # type: ignore[misc]
        request = Dispatchable(request_id=f"new{number}", num_prompt_tokens=rng.randint(1, 2000), max_tokens=500)
        started = time.perf_counter()
        commands = scheduler.arrived(request, float(number))
        dispatch_s.append(time.perf_counter() - started)
        assert len([c for c in commands if isinstance(c, Dispatch)]) == 1, commands
        scheduler.ended(request.request_id, float(number))
    round_s: list[float] = []
    num_moves = 0
    for number in range(num_rounds):
        started = time.perf_counter()
        commands = scheduler.tick(1e6 + number)
        round_s.append(time.perf_counter() - started)
        num_moves += len([c for c in commands if isinstance(c, Move)])
    return {
        "policy": policy,
        "instances": num_instances,
        "requests": num_instances * num_running,
        **_percentiles("dispatch", "us", dispatch_s, 1e6),
        **_percentiles("snapshot", "us", snapshot_s, 1e6),
        **_percentiles("round", "ms", round_s, 1e3),
        "moves_a_round": num_moves / num_rounds,
    }


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _percentiles(name: str, unit: str, seconds: Sequence[float], scale: float) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99])
    return {f"{name}_p50_{unit}": float(p50 * scale), f"{name}_p99_{unit}": float(p99 * scale)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write ``results/scheduler.json``."""
    parser = argparse.ArgumentParser(prog="bench-scheduler", description=__doc__)
    parser.add_argument("--instances", type=int, nargs="+", default=[16, 64, 256, 1000])
    parser.add_argument("--running", type=int, default=100, help="requests on each instance")
    parser.add_argument("--policies", nargs="+", default=["arriero", "llumnix"])
    parser.add_argument("--dispatches", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args(argv)
    rows = [
        measure(policy, num_instances, args.running, args.dispatches, args.rounds)
        for policy in args.policies
        for num_instances in args.instances
    ]
    targets = []
    for row in rows:
        if row["instances"] == max(args.instances):
            name = f"{row['policy']}, {row['instances']} instances"
            for p in ("p50", "p99"):
                targets.append(Target.at_most(f"dispatch {p}, {name}", row[f"dispatch_{p}_us"], 50, "us"))
                targets.append(Target.at_most(f"round {p}, {name}", row[f"round_{p}_ms"], 20, "ms"))
    print_table("Decisions of the scheduler", rows, targets)
    write("scheduler", rows, targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
