"""arriero beside what people use today, on real engines with little memory: `make bench-race` -> results/race.json.

Lengths of the class M-M (Llumnix, OSDI'24), cut so that small engines hold them, arrive in bursts (Gamma gaps) and open
loop: nobody waits for the server. Every system of `systems.py` answers the same arrivals of each seed, one system at a
time, in an order that turns from round to round; prompts are new to each, so no prefix cache helps. ``--scale`` makes
all lengths and the memory smaller alike, where an engine takes seconds for a prompt of the class. Seeds can be run in
parts: what `results/race.json` holds from earlier calls with the same plan is kept unless ``--fresh``. A run in which
something held up the client is repeated, and so is one for which the machine was slower than for another system
(`inside.py`): a shared machine's speed changes by a third within minutes.

*Silence* is the longest time between two chunks in the stream of one request.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from arriero.bench import race_simulated, report
from arriero.bench.calibration import calibrated, rate_of
from arriero.bench.client import Client
from arriero.bench.inside import EventWatch, SpeedWatch, beside, seen_inside
from arriero.bench.race_report import (
    UNITS,
    Sample,
    common_seeds,
    counted_seeds,
    on_a_slower_machine,
    put,
    summarise,
    table,
    targets_of,
    three,
    title,
)
from arriero.bench.replay import Prompts, at_rate, capped, replay, scaled, spread
from arriero.bench.server import (
    SERVED_NAME,
    add_server_options,
    common_flags,
    ended_by_signals,
    kv_bytes_of,
    model_of,
    say,
    warn_of_autogroups,
)
from arriero.bench.systems import ARRIERO, GROUPS, SYSTEMS, Fleet, Running
from arriero.core.errors import ArrieroError
from arriero.workload.workload import Arrival, Workload, make_workload

MAX_STALLED_S = 1.0  #: for which the client may be held up in a run that counts
MAX_TRIES = 3
SAMPLE = 2000  #: requests that tell how much work one is
RESULT = Path("results") / "race.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one result is about; parts of it can only be merged if all of this is equal."""

    requests: int
    rate: float
    cv: float
    longest: int  #: tokens of a prompt, and of an output; before they are scaled
    scale: float  #: of the lengths
    engines: int
    flags: Sequence[str]
    arriero_flags: Sequence[str]


def workload_of(plan: Plan, seed: int) -> Workload:
    """The arrivals of ``seed``: the plan's rate on average, whatever the draw of gaps comes to."""
    workload = make_workload("M-M", num_requests=plan.requests, rate=plan.rate, cv=plan.cv, seed=seed)
    return at_rate(cut(workload, plan.longest, plan.scale), plan.rate)


def cut(workload: Workload, longest: int, scale: float) -> Workload:
    """For small engines: no prompt and no output longer than ``longest``, then all of them scaled."""
    return scaled(capped(workload, longest, longest), scale)


def rate_by_load(args: argparse.Namespace, flags: Sequence[str]) -> float:
    """The rate that is ``--load`` for this machine. Raises ArrieroError if it cannot be calibrated."""
    profile = calibrated(model_of(args), args.profile, flags, args.engines)
    arrivals = cut(make_workload("M-M", num_requests=SAMPLE, rate=1), args.longest, args.scale).arrivals
    rate = round(rate_of(args.load, arrivals, args.engines, profile.step_time), 2)
    say(f"a load of {args.load:g} is {rate:g} requests a second")
    return rate


# ---------------------------------------------------------------------- measuring


async def measure(running: Running, name: str, arrivals: Sequence[Arrival], prompts: Prompts, scale: float) -> Sample:
    """One run of one system. Raises ArrieroError if an answer is not whole."""
    async with Client(running.url) as client:
        await _warm_up(client, prompts, scale)
        before = running.total("vllm:num_preemptions_total")
        speeds, events = SpeedWatch(), EventWatch(client)
        watching = [speeds.run()]
        if name == ARRIERO:
            await events.begin()
            watching.append(events.run())
        started_s = perf_counter()
        async with beside(*watching):
            seen = await replay(client, SERVED_NAME, arrivals, prompts)
        if name == ARRIERO:
            await events.gather()
        stalled_s = client.stalled_s(started_s)
    last_s = max(s.arrival_s + s.late_s + s.e2e_s for s in seen)
    sample: Sample = {
        "system": name,
        "num_preemptions": running.total("vllm:num_preemptions_total") - before,
        "tokens_per_s": sum(s.output_tokens for s in seen) / last_s,
        "duration_s": last_s,
        "machine_stalled_s": stalled_s,
        "machine_speed": speeds.speed,
        "max_late_s": max(s.late_s for s in seen),
        "requests": [asdict(s) for s in seen],
    }
    if name == ARRIERO:
        sample |= seen_inside(events.events, started_s) | {"num_events_missed": events.num_missed}
    return sample


async def _warm_up(client: Client, prompts: Prompts, scale: float) -> None:
    """Long prompts and a batch before it counts."""
    arrivals = [Arrival(0.1 * i, round(scale * (900 if i % 4 == 1 else 60)), 24) for i in range(8)]
    await replay(client, SERVED_NAME, arrivals, prompts)


def run(
    plan: Plan, fleet: Fleet, rounds: Sequence[Sequence[int]], systems: Sequence[str], kept: list[Sample]
) -> list[Sample]:
    """Take what is asked for; written after each sample, so that a run that is cut short has been of use.

    ``rounds``: seeds that a system answers before the next one is started.
    """
    samples = list(kept)
    for number, seeds in enumerate(rounds):
        wanted = {name: list(seeds) for name in systems}
        for attempt in range(MAX_TRIES):
            samples = _round(plan, fleet, seeds[0] + number, wanted, samples, is_repeat=attempt > 0)
            slower = on_a_slower_machine([s for s in samples if s["seed"] in seeds])
            wanted = {name: slower[name] for name in systems if name in slower}
            if not wanted:
                break
            runs = "; ".join(f"{name}: seed {', '.join(map(str, of))}" for name, of in wanted.items())
            then = "once more" if attempt + 1 < MAX_TRIES else "such seeds do not count"
            say(f"the machine was slower than for others ({runs}): {then}")
    return samples


def _round(
    plan: Plan, fleet: Fleet, turn: int, wanted: Mapping[str, Sequence[int]], samples: list[Sample], *, is_repeat: bool
) -> list[Sample]:
    """Each system's seeds; of a repeated run what is kept is that on the faster machine."""
    groups = list(GROUPS.items())
    first = turn % len(groups)
    for group, (start, members) in groups[first:] + groups[:first]:
        here = [name for name in members if name in wanted]
        if not here:
            continue
        seeds = sorted({seed for name in here for seed in wanted[name]})
        say(f"seeds {', '.join(map(str, seeds))}: starting {group}")
        with start(fleet, f"race-{seeds[0]}") as runs:
            for name in here if seeds[0] % 2 else here[::-1]:
                with runs[name]() as running:
                    for seed in wanted[name]:
                        sample = _take(plan, fleet.model, running, name, seed)
                        samples = put(samples, sample, only_if_faster=is_repeat)
                        write(plan, samples)
    return samples


def _take(plan: Plan, model: str, running: Running, name: str, seed: int) -> Sample:
    arrivals = workload_of(plan, seed).arrivals

    def once(number: int) -> Sample:
        prompts = Prompts(model, random.Random(f"{seed} {name} {number}"))
        sample = asyncio.run(measure(running, name, arrivals, prompts, plan.scale))
        say(f"seed {seed}, {name}: {_brief_line(sample)}")
        return sample

    sample = least_stalled(once)
    return sample | {"seed": seed, "commit": report.environment()["commit"], "run": running.describe()}


def least_stalled(once: Callable[[int], Sample]) -> Sample:
    """The first run, of a few, in which nothing held up the client; else the one with the least of it.

    A client that sends late and reads late measures itself. ``once`` is given the number of the try.
    """
    tried: list[Sample] = []
    for number in range(MAX_TRIES):
        tried.append(once(number))
        stalled_s = tried[-1]["machine_stalled_s"]
        if stalled_s <= MAX_STALLED_S:
            break
        then = "once more" if len(tried) < MAX_TRIES else "the run with the least of it is taken"
        say(f"the client was held up for {stalled_s:.1f} s: {then}")
    return min(tried, key=lambda s: s["machine_stalled_s"]) | {"tries": len(tried)}


def _brief_line(sample: Sample) -> str:
    ttft, silence = (spread(r[key] for r in sample["requests"]) for key in ("ttft_s", "silence_s"))
    return (
        f"TTFT {ttft['p50']:.2f} / {ttft['p99']:.2f} s, silence {silence['p50']:.2f} / {silence['p99']:.2f} s (P50 / "
        f"P99), {sample['num_preemptions']:.0f} preemptions, {sample['tokens_per_s']:.1f} tokens/s"
        + (f", {sample['num_moves']} moves" if "num_moves" in sample else "")
    )


# ---------------------------------------------------------------------- the command


def write(plan: Plan, samples: Sequence[Sample]) -> None:
    """The result as it stands."""
    summary = summarise(samples)
    seeds = {"seeds": sorted(common_seeds(samples)), "counted_seeds": sorted(counted_seeds(samples))}
    report.write("race", samples, targets_of(samples), summary=summary, plan=asdict(plan), **seeds)


def foretell(plan: Plan, args: argparse.Namespace, flags: Sequence[str]) -> int:
    """`--simulate`: the table of `race_simulated.py`, also written to results/race_simulated.json."""
    profile = calibrated(model_of(args), args.profile, flags, args.engines)
    num_blocks = kv_bytes_of(args) // (profile.block_size * profile.kv_bytes_per_token) - 1  # one is vLLM's null block
    if num_blocks < 1:
        raise ArrieroError(f"--kv-cache-memory-bytes {args.kv_cache_memory_bytes}: too few for a block of the profile")
    workloads = {seed: workload_of(plan, seed) for seed in args.seeds}
    rows = race_simulated.simulate(workloads, profile, num_blocks=num_blocks, engines=args.engines)
    report.write("race_simulated", rows, [], plan=asdict(plan), seeds=args.seeds, num_blocks=num_blocks)
    report.print_table(f"simulated; {UNITS}", [_foretold(row) for row in rows])
    return 0


def _foretold(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "system": row["system"],
        "ITL_target": row["itl_target_s"] or None,
        "memory": f"{row['memory']} x",
        "n": row["requests"],
        "TTFT": three(row["ttft_s"]),
        "TPOT": three(row["tpot_s"], 1e3),
        "preempted": row["num_preemptions"],
        "loss_s": three(row["preemption_loss_s"]),
        "moves": row["num_moves"],
        "tokens_/s": row["tokens_per_s"],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(default: 1 to 5)")
    parser.add_argument("--per-start", type=int, default=1, help="seeds between two starts (default: %(default)s)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="(default: all)")
    parser.add_argument("--requests", type=int, default=120, help="of a seed (default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.9, help="of what the engines can do (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="requests a second (default: by --load)")
    parser.add_argument("--profile", type=Path, default=Path("results") / "profile.json", help="measured if absent")
    parser.add_argument("--cv", type=float, default=4.0, help="of the gaps (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=1200, help="prompt, and output (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of lengths and memory (default: %(default)s)")
    parser.add_argument("--engines", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="drop what results/race.json holds")
    parser.add_argument("--simulate", action="store_true", help="starts no server: shows what the simulator foretells")
    parser.add_argument("--arriero-flag", action="append", default=[], metavar="FLAG", help="for `arriero serve` alone")
    add_server_options(parser, port=8140, kv_bytes=94_371_840, max_model_len=3072)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 0 whether the targets are met or not."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not 0.1 <= args.scale <= 1:
        parser.error(f"--scale {args.scale:g}: it must be between 0.1 (shorter prompts say nothing) and 1")
    args.max_model_len = round(args.scale * args.max_model_len)
    args.kv_cache_memory_bytes = round(args.scale * args.kv_cache_memory_bytes)
    flags = common_flags(args)
    try:
        plan = Plan(
            requests=args.requests,
            rate=args.rate or rate_by_load(args, flags),
            cv=args.cv,
            longest=args.longest,
            scale=args.scale,
            engines=args.engines,
            flags=flags,
            arriero_flags=args.arriero_flag,
        )
        if args.simulate:
            return foretell(plan, args, flags)
        warn_of_autogroups()
        fleet = Fleet(
            model=model_of(args),
            flags=flags,
            num_engines=args.engines,
            port=args.port,
            start_timeout_s=args.start_timeout,
            arriero_flags=args.arriero_flag,
        )
        kept = [] if args.fresh else report.kept_samples(RESULT, plan, "machine_speed")
        with ended_by_signals():
            rounds = [args.seeds[i : i + args.per_start] for i in range(0, len(args.seeds), args.per_start)]
            samples = run(plan, fleet, rounds, args.systems, kept)
    except ArrieroError as error:
        say(f"bench-race: {error}")
        return 1
    report.print_table(title(samples), table(summarise(samples)), targets_of(samples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
