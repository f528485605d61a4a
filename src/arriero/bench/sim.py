"""`make bench-sim`: is the simulator right, how fast is it, and how does it grow?

    race     vidur's own run of 10,000 requests over 16 instances (in the package's data), with its latencies: TTFT and
             E2E must agree within 5 %, in a twentieth of the CPU time of its event loop.
    scale    10**4 to 10**6 requests over 64 instances: CPU time must grow linearly, memory stays below 4 GiB.
    looking  the same with policies that look at load: for each decision, snapshots have to be made.

CPU time is that of `Simulator(...).run()`, in one process. Each point of scale has a process of its own, for its peak
memory.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from arriero.bench.report import Target, print_table, write
from arriero.sim.profiles import load_profile
from arriero.sim.report import latencies, summarize
from arriero.sim.simulator import SimulationResult, Simulator, SimulatorConfig, engine_config, scheduler_config
from arriero.workload.traces import read_columns, read_trace
from arriero.workload.workload import Workload, make_workload

RACE = Path(str(files("arriero") / "data" / "vidur_race_10k.csv.gz"))
VIDUR_CPU_S = 19.07
"""CPU seconds of vidur's event loop on this race, predictions cached, on a like core (microsoft/vidur at 7d47513)."""

PROFILE = "llama2-7b_a100"
NUM_INSTANCES = 64
SCALE_RATE = 400.0  # S-S, requests a second: busy, and far from full
LOOKING = {"arriero": 100.0}
"""Policies that look at load, and the rate of M-M requests."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0 whether the targets are met or not."""
    parser = argparse.ArgumentParser(prog="bench-sim", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", default="10000,100000,1000000", help="numbers of requests, by rising size")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the race; the median counts")
    parser.add_argument("--looking-requests", type=int, default=20_000)
    parser.add_argument("--one", nargs=3, metavar=("POLICY", "CLASS:RATE", "REQUESTS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(args.one[0], args.one[1], int(args.one[2]))))
        return 0
    raced = [race() for _ in range(args.repeats)]
    sizes = [int(size) for size in args.sizes.split(",")]
    scaled = [_in_a_process("round_robin", f"S-S:{SCALE_RATE}", size) for size in sizes]
    looked = [_in_a_process(p, f"M-M:{rate}", args.looking_requests) for p, rate in LOOKING.items()]
    looked += [_in_a_process("round_robin", f"M-M:{rate}", args.looking_requests) for rate in set(LOOKING.values())]
    targets = [*_race_targets(raced), *_scale_targets(scaled)]
    _print(raced, scaled, looked, targets)
    path = write("sim", [{"race": raced, "scale": scaled, "looking": looked}], targets, vidur_cpu_s=VIDUR_CPU_S)
    print(f"written to {path}")
    return 0


# ---------------------------------------------------------------------- the race


def race() -> dict[str, Any]:
    """One run of vidur's race: its figures and ours.

    vidur's replica scheduler `vllm` is that of vLLM v0 (whole prompts first), its times are those of GPU kernels alone.
    """
    workload, theirs = read_trace(RACE), read_columns(RACE, ["round_robin_ttft_s", "round_robin_e2e_s"])
    config = SimulatorConfig(
        engine=engine_config(load_profile(PROFILE, host_ms=0.0)),
        num_instances=16,
        scheduler=scheduler_config("round_robin"),
        prefill_first=True,
    )
    result, cpu_s = _timed(config, workload)
    ours = [latencies(record) for record in result.records]
    sample: dict[str, Any] = {"cpu_s": cpu_s, "num_steps": result.num_steps}
    for name in ("ttft_s", "e2e_s"):
        found, wanted = np.array([o[name] for o in ours]), np.array(theirs[f"round_robin_{name}"])
        sample[name] = {
            "ours": _figures(found),
            "vidur": _figures(wanted),
            "mape_percent": float(100 * np.mean(np.abs(found - wanted) / wanted)),
        }
    return sample


def _figures(values: Any) -> dict[str, float]:
    return {"mean": float(values.mean()), "p50": float(np.median(values)), "p99": float(np.percentile(values, 99))}


def _timed(config: SimulatorConfig, workload: Workload) -> tuple[SimulationResult, float]:
    simulator = Simulator(config, workload)
    started = time.process_time()
    result = simulator.run()
    cpu_s = time.process_time() - started
    simulator.check_integrity()
    return result, cpu_s


def _race_targets(raced: list[dict[str, Any]]) -> list[Target]:
    first = raced[0]  # all runs give the same latencies
    targets = []
    for name in ("ttft_s", "e2e_s"):
        for figure in ("mean", "p99"):
            off = 100 * abs(first[name]["ours"][figure] / first[name]["vidur"][figure] - 1)
            targets.append(Target.at_most(f"race: {name[:-2]} {figure} off vidur's", off, 5.0, "%"))
    cpu_s = statistics.median(r["cpu_s"] for r in raced)
    return [*targets, Target.at_least("race: times faster than vidur's event loop", VIDUR_CPU_S / cpu_s, 20.0, "x")]


# ---------------------------------------------------------------------- growth


def one(policy: str, class_at_rate: str, num_requests: int) -> dict[str, Any]:
    """One point of growth, in this process."""
    name, _, rate = class_at_rate.partition(":")
    workload = make_workload(name, num_requests=num_requests, rate=float(rate), seed=0)
    config = SimulatorConfig(
        engine=engine_config(load_profile(PROFILE)), num_instances=NUM_INSTANCES, scheduler=scheduler_config(policy)
    )
    result, cpu_s = _timed(config, workload)
    summary = summarize(result)
    return {
        "policy": policy,
        "workload": class_at_rate,
        "num_requests": num_requests,
        "cpu_s": cpu_s,
        "us_a_request": 1e6 * cpu_s / num_requests,
        "num_steps": result.num_steps,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "virtual_s": result.end_s,
        "num_migrations": summary["num_migrations"],
        "ttft_p99_s": summary["ttft_s"]["p99"],
    }


def _in_a_process(policy: str, class_at_rate: str, num_requests: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "arriero.bench.sim", "--one", policy, class_at_rate, str(num_requests)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    point: dict[str, Any] = json.loads(done.stdout)
    return point


def _scale_targets(scaled: list[dict[str, Any]]) -> list[Target]:
    first, last = scaled[0], scaled[-1]
    peak = max(point["peak_gib"] for point in scaled)
    targets = [Target.at_most(f"scale: peak memory at {last['num_requests']} requests", peak, 4.0, "GiB")]
    if last["num_requests"] > first["num_requests"]:
        growth = math.log(last["cpu_s"] / first["cpu_s"]) / math.log(last["num_requests"] / first["num_requests"])
        targets.append(Target.at_most("scale: exponent of CPU time in requests (1 is linear)", growth, 1.1))
    return targets


def _print(
    raced: list[dict[str, Any]], scaled: list[dict[str, Any]], looked: list[dict[str, Any]], targets: list[Target]
) -> None:
    rows = [
        {"latency": name[:-2], "figure": figure, "vidur_s": of["vidur"][figure], "ours_s": of["ours"][figure]}
        for name in ("ttft_s", "e2e_s")
        for of in [raced[0][name]]
        for figure in of["ours"]
    ]
    print_table("The race against vidur", rows)
    columns = ("policy", "workload", "num_requests", "cpu_s", "us_a_request", "peak_gib", "num_migrations")
    points = [{c: point[c] for c in columns} for point in [*scaled, *looked]]
    print_table(f"{NUM_INSTANCES} instances", points, targets)


if __name__ == "__main__":
    sys.exit(main())
