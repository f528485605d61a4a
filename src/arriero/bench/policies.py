"""`make bench-policies`: the points of Llumnix (OSDI'24), section 6, for all policies, in virtual time.

16 instances of ``llama-7b_a10``. Our engines (vLLM v1: chunked prefill) sustain more than the paper's (v0), so each of
its rates is scaled to equal utilisation: to where ``infaas`` has the prefill P99 that the paper's INFaaS++ has.
``--find`` searches those rates anew. Runs are independent and go to ``--processes`` at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from arriero.bench.bounds import idle_request_s, least_instance_hours
from arriero.bench.report import Target, print_table, write
from arriero.core.config import CopyConfig, ScalingConfig
from arriero.sim.profiles import PAPER, load_profile
from arriero.sim.report import summarize
from arriero.sim.simulator import CLAIRVOYANT, Simulator, SimulatorConfig, engine_config, scheduler_config
from arriero.workload.workload import Workload, make_workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load. ``paper``: prefill P99 in seconds of INFaaS++ and of Llumnix at ``paper_rate``."""

    name: str
    workload: str
    rate: float  #: requests a second here
    paper_rate: float
    paper: tuple[float, float] | None = None
    cv: float = 1.0
    high_priority: float = 0.0
    ignored: bool = False  #: nobody is told of the priorities
    threshold: float | None = None  #: of scaling: the range begins there, and is as wide as RANGES says


POINTS = [
    Point(name="M-M 7.8", workload="M-M", rate=10.5, paper_rate=7.8, paper=(240, 17.9)),
    Point(name="L-L 3.0", workload="L-L", rate=3.4, paper_rate=3.0, paper=(41.2, 2.75)),
    Point(name="S-L 4.25", workload="S-L", rate=5.2, paper_rate=4.25, paper=(119, 25.7)),
    Point(name="L-S 18", workload="L-S", rate=28.0, paper_rate=18, paper=(206, 73.9)),
    Point(name="S-S 32", workload="S-S", rate=60.0, paper_rate=32, paper=(39.8, 28.0)),
    Point(name="S-S 36", workload="S-S", rate=67.5, paper_rate=36, paper=(71.5, 74.4)),
]
PRIORITIES = [
    Point(name=f"S-S, 10 % high, CV {cv}", workload="S-S", rate=48.75, paper_rate=26, cv=cv, high_priority=0.1)
    for cv in (2, 4, 6, 8)
]
IGNORED = [replace(p, name=f"{p.name}, ignored", ignored=True) for p in PRIORITIES]
SCALING = [
    Point(name=f"L-L, scaling from {t}", workload="L-L", rate=2.25, paper_rate=2.0, threshold=t)
    for t in (-5, 5, 25, 45, 65, 85)
]
RATES = [
    replace(point, name=f"{point.workload} at {rate:g}/s", rate=rate)
    for point, rates in ((POINTS[0], (9.5, 10, 10.5, 11)), (POINTS[1], (3.2, 3.4, 3.6, 3.8, 4)))
    for rate in rates
]
SETS = {"points": POINTS, "priorities": [*PRIORITIES, *IGNORED], "scaling": SCALING, "rates": RATES}
RANGES = {"arriero": 10.0}
"""Width of the range of freeness for scaling. For the others it is 50 and they do not look ahead, as in the paper."""

POLICIES = [
    "round_robin",
    "least_outstanding",
    "power_of_two",
    "vllm_dp",
    "infaas",
    "llumnix",
    "llumnix_artifact",
    "arriero",
    CLAIRVOYANT,
]
MAIN = ["infaas", "llumnix", "arriero"]
NUM_INSTANCES = 16
WHOLE = CopyConfig(stage_bytes=8 << 30)
"""The first stage of a move copies all that is there, as in the paper. With the default of 32 MiB a stage is four
blocks of this model (8 MiB each), and waits for a step at both ends: 50 ms a block instead of 3.5.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation."""

    point: Point
    policy: str
    seed: int
    num_requests: int


def simulate(run: Run) -> dict[str, Any]:
    """Its figures."""
    point = run.point
    scheduler = scheduler_config(run.policy, run.seed)
    if point.threshold is not None:
        scaling = ScalingConfig(
            low_freeness=point.threshold,
            high_freeness=point.threshold + RANGES.get(run.policy, 50.0),
            max_instances=NUM_INSTANCES,
            looks_ahead=run.policy in RANGES,
        )
        scheduler = replace(scheduler, scaling=scaling)
    workload = make_workload(
        point.workload,
        num_requests=run.num_requests,
        rate=point.rate,
        cv=point.cv,
        priorities={-1: point.high_priority} if point.high_priority else None,
        seed=run.seed,
    )
    told = [replace(a, priority=0) for a in workload.arrivals] if point.ignored else workload.arrivals
    config = SimulatorConfig(
        engine=engine_config(load_profile(PAPER), priority_scheduling=bool(point.high_priority) and not point.ignored),
        num_instances=NUM_INSTANCES if point.threshold is None else 4,
        scheduler=scheduler,
        sample_s=1.0,
        copy=WHOLE,
    )
    simulator = Simulator(config, Workload(workload.name, told))
    result = simulator.run()
    simulator.check_integrity()
    for record, arrival in zip(result.records, workload.arrivals, strict=True):
        record.arrival = arrival  # the figures are by true priority
    summary = summarize(result)
    if point.high_priority:
        urgent = [a for a in workload.arrivals if a.priority < 0]
        summary["idle_request_s"] = idle_request_s(urgent, load_profile(PAPER)) if urgent else None
    if point.threshold is not None:
        summary["least_instance_hours"] = least_instance_hours(workload.arrivals, load_profile(PAPER))
    return {"point": point.name, "policy": run.policy, "seed": run.seed, **summary}


# ---------------------------------------------------------------------- figures


def figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """What is compared, of one run; seconds, unless the name says otherwise."""
    ttft, tpot, e2e = summary["ttft_s"], summary["tpot_s"], summary["e2e_s"]
    return {
        "prefill_mean": ttft["mean"],
        "prefill_P99": ttft["p99"],
        "decode_mean_ms": 1e3 * tpot["mean"],
        "decode_P99_ms": 1e3 * tpot["p99"],
        "request_mean": e2e["mean"],
        "request_P99": e2e["p99"],
        "preemption_loss": summary["preemption_loss_s"],
        "fragmentation_%": 100 * (summary["fragmentation"] or 0.0),
        "migrations": summary["num_migrations"],
        "downtime_ms": 1e3 * (summary["downtime_s"] or {"mean": 0.0})["mean"],
        "instance_hours": summary["instance_hours"],
    }


def rows_of(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, a row a point and policy."""
    rows = []
    for point, policy in dict.fromkeys((s["point"], s["policy"]) for s in samples):
        found = [figures(s) for s in samples if (s["point"], s["policy"]) == (point, policy)]
        means = {name: fmean(f[name] for f in found) for name in found[0]}
        rows.append({"point": point, "policy": policy, **means})
    return rows


def targets_of(samples: Sequence[Mapping[str, Any]]) -> list[Target]:
    """What is claimed, as far as this run has what it takes."""
    by = {(r["point"], r["policy"]): r for r in rows_of(samples)}
    targets: list[Target] = []
    for point in [p.name for p in POINTS if all((p.name, q) in by for q in MAIN)]:
        infaas, llumnix, arriero = (by[point, q] for q in MAIN)
        if point in ("M-M 7.8", "L-L 3.0"):
            gain = infaas["prefill_P99"] / llumnix["prefill_P99"]
            targets.append(Target.at_least(f"{point}: prefill P99, infaas / llumnix", gain, 5, "x"))
            if (artifact := by.get((point, "llumnix_artifact"))) is not None:
                gain = infaas["prefill_P99"] / artifact["prefill_P99"]
                targets.append(Target.at_least(f"{point}: prefill P99, infaas / llumnix_artifact", gain, 5, "x"))
        for name in ("prefill_P99", "decode_P99_ms", "request_P99"):
            ratio = arriero[name] / llumnix[name]
            limit = 1 + _noise(samples, point, name)
            targets.append(Target.at_most(f"{point}: {name}, arriero / llumnix (1 + seed noise)", ratio, limit, "x"))
        if point == "S-S 36":
            ratio = arriero["prefill_P99"] / llumnix["prefill_P99"]
            targets.append(Target.at_most(f"{point}: prefill P99, arriero / llumnix", ratio, 0.8, "x"))
        loss = arriero["preemption_loss"] / infaas["preemption_loss"] if infaas["preemption_loss"] else 0.0
        targets.append(Target.at_most(f"{point}: preemption loss, arriero / infaas", loss, 0.1, "x"))
    return targets + _of_rates(by) + _of_priorities(samples) + _of_scaling(by, samples)


def _of_rates(by: Mapping[tuple[str, str], Mapping[str, float]]) -> list[Target]:
    """The most that `llumnix` gains over `infaas` at any of the rates."""
    targets = []
    for workload in dict.fromkeys(p.workload for p in RATES):
        gains = [
            (by[p.name, "infaas"]["prefill_P99"] / by[p.name, "llumnix"]["prefill_P99"], p.rate)
            for p in RATES
            if p.workload == workload and all((p.name, q) in by for q in ("infaas", "llumnix"))
        ]
        if gains:
            gain, rate = max(gains)
            name = f"{workload}: prefill P99, infaas / llumnix, at its best rate ({rate:g}/s)"
            targets.append(Target.at_least(name, gain, 5, "x"))
    return targets


def _noise(samples: Sequence[Mapping[str, Any]], point: str, name: str) -> float:
    """Standard error of llumnix's mean over the seeds, relative to it."""
    values = [figures(s)[name] for s in samples if (s["point"], s["policy"]) == (point, "llumnix")]
    mean = fmean(values)
    spread = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values)) ** 0.5
    return float(spread / mean)


def _of_priorities(samples: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Against the same policy, requests and arrivals if nobody is told of the priorities."""
    targets = []
    for point in [p.name for p in PRIORITIES]:
        with_, without = (
            [s for s in samples if s["point"] == name and s["policy"] == "arriero"]
            for name in (point, f"{point}, ignored")
        )
        if with_ and without:
            high, normal = (
                fmean(s["by_priority"][p]["e2e_s"]["mean"] for s in with_)
                / fmean(s["by_priority"][p]["e2e_s"]["mean"] for s in without)
                for p in ("-1", "0")
            )
            idle = fmean(s["by_priority"]["-1"]["e2e_s"]["mean"] / s["idle_request_s"] for s in without)
            name = f"{point}: speed-up of their request mean (with an idle instance for each: {idle:.2f})"
            targets.append(Target.at_least(name, 1 / high, 1.5, "x"))
            targets.append(Target.at_most(f"{point}: request mean of the others", normal, 1.05, "x"))
    return targets


def _of_scaling(
    by: Mapping[tuple[str, str], Mapping[str, float]], samples: Sequence[Mapping[str, Any]]
) -> list[Target]:
    """Instance-hours of arriero at the prefill P99 of each point of infaas, along arriero's curve."""
    curves = {
        policy: front(
            (by[p.name, policy]["instance_hours"], by[p.name, policy]["prefill_P99"])
            for p in SCALING
            if (p.name, policy) in by
        )
        for policy in ("infaas", "arriero")
    }
    if not all(curves.values()):
        return []
    savings = [
        (100 * (1 - reached / hours), p99, hours)
        for hours, p99 in curves["infaas"]
        if (reached := hours_at(curves["arriero"], p99)) is not None
    ]
    saved, p99, hours = max(savings, default=(0.0, math.inf, math.inf))
    least = fmean(s["least_instance_hours"] for s in samples if "least_instance_hours" in s)
    name = (
        f"scaling: most instance-hours saved at equal prefill P99 (at {p99:.3g} s; "
        f"if memory were always full: {100 * (1 - least / hours):.0f})"
    )
    return [Target.at_least(name, saved, 40, "%")]


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of the points (cost, P99) those that no cheaper one betters, by cost."""
    found: list[tuple[float, float]] = []
    for cost, p99 in sorted(points):
        if not found or p99 < found[-1][1]:
            found.append((cost, p99))
    return found


def hours_at(curve: Sequence[tuple[float, float]], p99: float) -> float | None:
    """The cost at which a front has this P99, by interpolation over its logarithm; the cheapest point's if that is
    better still; None if none is so good.
    """
    if p99 >= curve[0][1]:
        return curve[0][0]
    for (cheap, worse), (dear, better) in itertools.pairwise(curve):
        if p99 >= better:
            return cheap + (dear - cheap) * math.log(worse / p99) / math.log(worse / better)
    return None


# ---------------------------------------------------------------------- the command


def find_rate(point: Point, seeds: Sequence[int], num_requests: int, pool: ProcessPoolExecutor) -> float:
    """The rate at which infaas has the prefill P99 of the paper's INFaaS++, by bisection of the mean over the seeds."""
    assert point.paper is not None
    low, high = point.paper_rate, 3 * point.paper_rate
    for _ in range(6):
        rate = (low + high) / 2
        runs = [Run(replace(point, rate=rate), "infaas", seed, num_requests) for seed in seeds]
        p99 = fmean(figures(s)["prefill_P99"] for s in pool.map(simulate, runs))
        print(f"{point.name}: at {rate:.2f} requests a second infaas has a prefill P99 of {p99:.1f} s", flush=True)
        low, high = (rate, high) if p99 < point.paper[0] else (low, rate)
    return (low + high) / 2


def runs_of(args: argparse.Namespace) -> list[Run]:
    """All that is to be simulated."""
    runs = []
    for name in args.sets:
        for point in SETS[name]:
            policies = args.policies if name == "points" else [p for p in MAIN if p in args.policies]
            if name == "rates":
                policies = [p for p in policies if p != "arriero"]
            elif name == "priorities":
                policies = [p for p in policies if p == "arriero"]
            for policy in policies:
                runs += [Run(point, policy, seed, args.requests) for seed in args.seeds]
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print, write ``results/policies.json``."""
    parser = argparse.ArgumentParser(prog="bench-policies", description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--append", action="store_true", help="keep the other runs that results/policies.json has")
    parser.add_argument("--find", action="store_true", help="search the rates of equal utilisation, and end")
    args = parser.parse_args(argv)
    with ProcessPoolExecutor(args.processes) as pool:
        if args.find:
            for point in POINTS:
                print(f"{point.name}: {find_rate(point, args.seeds, args.requests, pool):.2f}")
            return 0
        runs = runs_of(args)
        samples = list(_told(pool.map(simulate, runs), len(runs)))
    if args.append:
        samples = _merged(samples)
    rows, targets = rows_of(samples), targets_of(samples)
    for point in dict.fromkeys(row["point"] for row in rows):
        print_table(point, [{k: v for k, v in row.items() if k != "point"} for row in rows if row["point"] == point])
    print_table("Targets", [], targets)
    write("policies", samples, targets, rows=rows, points=[asdict(p) for points in SETS.values() for p in points])
    return 0


def _merged(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With those of the file that were not run again, in the order of the points and policies."""
    path = Path("results") / "policies.json"
    before = json.loads(path.read_text(encoding="utf-8"))["samples"] if path.exists() else []
    by_key = {(s["point"], s["policy"], s["seed"]): s for s in [*before, *samples]}
    points = [p.name for points in SETS.values() for p in points]
    return sorted(by_key.values(), key=lambda s: (points.index(s["point"]), POLICIES.index(s["policy"]), s["seed"]))


def _told(samples: Iterable[dict[str, Any]], total: int) -> Iterable[dict[str, Any]]:
    for number, sample in enumerate(samples, start=1):
        print(
            f"{number}/{total} {sample['point']} {sample['policy']} seed {sample['seed']}", file=sys.stderr, flush=True
        )
        yield sample


if __name__ == "__main__":
    sys.exit(main())
