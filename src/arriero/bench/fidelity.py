"""Does the simulator say what real engines do? `make bench-fidelity` -> results/fidelity.json.

A trace is replayed open loop on two real instances, and its arrivals are simulated with the same policy. The model of a
step is `arriero calibrate`'s of one engine alone, plus what the running server adds to it (`served.py`), measured right
before and right after the replay; a replay between which the two differ by more than 5 % is thrown away, and so is one
in a quarter of which the machine was that much faster or slower than while they were measured (`inside.py`).

Both instances, the front end and the client share the machine's cores. The simulator knows no such contention beyond
those two constants, which are measured with all instances loaded alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from arriero.bench import report, served
from arriero.bench.calibration import calibrated, rate_of
from arriero.bench.client import Client
from arriero.bench.inside import SpeedWatch, beside
from arriero.bench.replay import Prompts, Seen, at_rate, capped, replay, spread
from arriero.bench.report import Target
from arriero.bench.server import (
    SERVED_NAME,
    Server,
    add_server_options,
    arriero_command,
    common_flags,
    ended_by_signals,
    kv_bytes_of,
    log_file,
    model_of,
    say,
    warn_of_autogroups,
)
from arriero.core.config import StepConfig
from arriero.core.errors import ArrieroError
from arriero.sim.network import NetworkConfig
from arriero.sim.profiles import Profile
from arriero.sim.report import latencies
from arriero.sim.simulator import Simulator, SimulatorConfig, engine_config, scheduler_config
from arriero.sim.step_time import StepTimeModel
from arriero.workload.traces import read_trace
from arriero.workload.workload import Workload

MAX_DRIFT = 0.05
SPEED_PARTS = 4  #: of the replay, in each of which the machine should be as fast as in the calibrations
MAX_ERROR = 0.10
MAX_MAPE = 0.15
FIGURES = ("ttft_s", "tpot_s", "e2e_s")
TRACE = Path(__file__).parents[1] / "data" / "azure2023_conv_200.csv"
RESULT = Path("results") / "fidelity.json"
TITLE = "the simulator beside two real instances (s; TPOT in ms)"

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one result is about."""

    trace: str
    requests: int
    load: float
    longest_prompt: int
    longest_output: int
    instances: int
    max_num_seqs: int
    max_num_batched_tokens: int
    itl_target_s: float
    kv_cache_memory_bytes: int
    flags: Sequence[str]

    def workload(self, model: StepTimeModel) -> Workload:
        """The excerpt, cut and stretched to the load: one engine works so long for each of its requests."""
        path = TRACE.parent / self.trace  # a path of one's own is kept as it is
        workload = capped(read_trace(path, self.requests), self.longest_prompt, self.longest_output)
        return at_rate(workload, rate_of(self.load, workload.arrivals, self.instances, model))


# ---------------------------------------------------------------------- the real side


async def measure(url: str, model: str, plan: Plan, step_time: StepTimeModel, seed: int) -> Sample:
    """Calibrate, replay, calibrate. Raises ArrieroError if an answer is not whole."""
    prompts = Prompts(model, random.Random(seed))
    workload = plan.workload(step_time)
    async with Client(url) as client:
        await served.measure(client, SERVED_NAME, prompts, plan.instances)  # warms up, counts for nothing
        network = await served.copy_costs(client, SERVED_NAME, prompts)
        around, during = SpeedWatch(), SpeedWatch()
        async with beside(around.run()):
            before = await served.measure(client, SERVED_NAME, prompts, plan.instances)
        async with beside(during.run()):
            seen = await replay(client, SERVED_NAME, workload.arrivals, prompts)
        events = await client.get("/events", limit=1000)
        async with beside(around.run()):
            after = await served.measure(client, SERVED_NAME, prompts, plan.instances)
        stalled_s = client.stalled_s()
    return {
        "network": network,
        "before": before,
        "after": after,
        "drift": before.drift(after, step_time),
        "speed_drift": max(abs(speed / around.speed - 1) for speed in during.speeds(SPEED_PARTS)),
        "machine_stalled_s": stalled_s,
        "seen": seen,
        "events": [e for e in events if e["event"] in ("dispatch", "migration")],
    }


# ---------------------------------------------------------------------- the simulated side


def simulate(
    profile: Profile, plan: Plan, workload: Workload, policy: str, request_ms: float
) -> list[dict[str, float]]:
    """Latencies of each request of the workload, as a client would see them."""
    config = SimulatorConfig(
        engine=engine_config(
            profile,
            num_blocks=plan.kv_cache_memory_bytes // (profile.block_size * profile.kv_bytes_per_token) - 1,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            itl_target_s=plan.itl_target_s,
        ),
        num_instances=plan.instances,
        scheduler=scheduler_config(policy),
        network=profile.network or NetworkConfig(),
    )
    result = Simulator(config, workload).run()
    return [_seen_by_client(latencies(record), request_ms / 1e3) for record in result.records]


def _seen_by_client(values: dict[str, float], request_s: float) -> dict[str, float]:
    return {name: value + (request_s if name != "tpot_s" else 0.0) for name, value in values.items()}


def as_served(profile: Profile, sample: Sample) -> tuple[Profile, float]:
    """The profile with the front end in the loop, and ``request_ms``; from both calibrations of a sample."""
    step_time, request_ms = served.in_service(profile.step_time, [sample["before"], sample["after"]])
    return replace(profile, step_time=step_time, network=sample["network"]), request_ms


# ---------------------------------------------------------------------- side by side


def compare(seen: Sequence[Seen], simulated: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Spreads of both and their relative errors, and the mean absolute percentage error of each request's E2E."""
    result: dict[str, Any] = {}
    for figure in FIGURES:
        pairs = [(getattr(s, figure), v[figure]) for s, v in zip(seen, simulated, strict=True) if figure in v]
        real, ours = spread(r for r, _ in pairs), spread(o for _, o in pairs)
        result[figure] = {
            "real": real,
            "simulated": ours,
            "error": {q: ours[q] / real[q] - 1 for q in ("mean", "p50", "p99")},
        }
    errors = [abs(v["e2e_s"] / s.e2e_s - 1) for s, v in zip(seen, simulated, strict=True)]
    return {**result, "mape": float(np.mean(errors))}


def targets_of(samples: Sequence[Sample]) -> list[Target]:
    """What the issue asks, for each policy."""
    targets = []
    for sample in samples:
        policy, compared = sample["policy"], sample["compared"]
        targets.append(Target.at_most(f"{policy}: drift between calibrations", sample["drift"], MAX_DRIFT))
        name = f"{policy}: the machine's speed in the replay off that in the calibrations"
        targets.append(Target.at_most(name, sample["speed_drift"], MAX_DRIFT))
        for figure in FIGURES:
            for q in ("mean", "p50"):
                error = abs(compared[figure]["error"][q])
                targets.append(Target.at_most(f"{policy}: error of {figure[:-2].upper()} {q}", error, MAX_ERROR))
        targets.append(Target.at_most(f"{policy}: MAPE of a request's E2E", compared["mape"], MAX_MAPE))
    return targets


def table(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """What is printed."""
    rows = []
    for sample in samples:
        for figure in FIGURES:
            found, scale = sample["compared"][figure], 1e3 if figure == "tpot_s" else 1.0
            row: dict[str, Any] = {"policy": sample["policy"], "figure": figure[:-2].upper()}
            for q in ("mean", "p50", "p99"):
                row[f"real_{q}"], row[f"sim_{q}"] = scale * found["real"][q], scale * found["simulated"][q]
                row[f"{q}_%"] = 100 * found["error"][q]
            rows.append(row)
    return rows


# ---------------------------------------------------------------------- the command


def run(policy: str, profile: Profile, plan: Plan, args: argparse.Namespace) -> Sample:
    """One policy on both sides. If the machine did not hold still in any try, the last one is taken, and says so."""
    model, flags = model_of(args), [*plan.flags, *policy_flags(policy)]
    command = arriero_command(model, port=args.port, instances=plan.instances, flags=flags)
    workload = plan.workload(profile.step_time)
    say(f"{policy}: starting {plan.instances} instances, for {workload.rate:.3f} requests a second")
    with Server(command, port=args.port, log=log_file(f"fidelity-{policy}"), timeout_s=args.start_timeout) as server:
        for number in range(args.tries):
            with cores_shared(server.pid):
                sample = asyncio.run(measure(server.url, model, plan, profile.step_time, args.seed + number))
            if held_still(sample):
                break
            say(
                f"{policy}: calibrations differ by {100 * sample['drift']:.1f} %, the machine's speed in the replay "
                f"by {100 * sample['speed_drift']:.1f} %; the client was held up {sample['machine_stalled_s']:.1f} s"
            )
    profile, request_ms = as_served(profile, sample)
    simulated = simulate(profile, plan, workload, policy, request_ms)
    return {
        "policy": policy,
        "rate": workload.rate,
        "discarded": number,
        **sample,
        "profile": profile,
        "request_ms": request_ms,
        "simulated": simulated,
        "compared": compare(sample["seen"], simulated),
        "commit": report.environment()["commit"],
    }


def held_still(sample: Sample) -> bool:
    """Whether the machine was as fast all the time, and let the client run."""
    return max(sample["drift"], sample["speed_drift"]) <= MAX_DRIFT and not sample["machine_stalled_s"]


@contextlib.contextmanager
def cores_shared(front_end: int) -> Iterator[None]:
    """Put front end and client on a core each, as far as there are two; the client for as long as this lasts.

    Engines have theirs. Left to the kernel, both may stay beside the same engine for seconds, which then runs at two
    thirds of the other's speed; the simulator knows one speed.
    """
    before = os.sched_getaffinity(0)  # what later children get
    cores = sorted(before)
    _pin(front_end, {cores[0]})
    _pin(os.getpid(), {cores[-1]})
    try:
        yield
    finally:
        _pin(os.getpid(), before)


def _pin(pid: int, cores: Iterable[int]) -> None:
    for thread in psutil.Process(pid).threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cores)


def policy_flags(policy: str) -> list[str]:
    """Of `arriero serve` for the policy that the simulator knows under this name."""
    return ["--policy", policy]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--policies", nargs="+", default=["round_robin", "arriero"], help="(default: %(default)s)")
    parser.add_argument("--trace", type=Path, default=TRACE, help="(default: the excerpt of the Azure trace)")
    parser.add_argument("--requests", type=int, default=60, help="first ones of the trace (default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.55, help="of what the engines can do (default: %(default)s)")
    parser.add_argument("--longest-prompt", type=int, default=768, help="(default: %(default)s)")
    parser.add_argument("--longest-output", type=int, default=320, help="(default: %(default)s)")
    parser.add_argument("--instances", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--itl-target-ms", type=float, default=1e3 * StepConfig().itl_target_s, help="0: none")
    parser.add_argument("--profile", type=Path, default=Path("results") / "profile.json", help="measured if absent")
    parser.add_argument("--tries", type=int, default=2, help="if the machine drifts (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="drop what results/fidelity.json holds")
    parser.add_argument("--seed", type=int, default=0)
    add_server_options(parser, port=8160, kv_bytes=94_371_840, max_model_len=3072)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 0 whether the targets are met or not."""
    args = _parser().parse_args(argv)
    flags = [*common_flags(args), "--max-num-seqs", str(args.max_num_seqs)]
    flags += ["--max-num-batched-tokens", str(args.max_num_batched_tokens)]
    flags += ["--itl-target-ms", str(args.itl_target_ms)]
    plan = Plan(
        trace=TRACE.name if args.trace == TRACE else str(args.trace.absolute()),
        requests=args.requests,
        load=args.load,
        longest_prompt=args.longest_prompt,
        longest_output=args.longest_output,
        instances=args.instances,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        itl_target_s=args.itl_target_ms / 1e3,
        kv_cache_memory_bytes=kv_bytes_of(args),
        flags=flags,
    )
    try:
        samples = [] if args.fresh else report.kept_samples(RESULT, plan, "speed_drift")
        warn_of_autogroups()
        with ended_by_signals():
            profile = calibrated(model_of(args), args.profile, flags, args.instances)
            for policy in args.policies:
                sample = run(policy, profile, plan, args)
                samples = [s for s in samples if s["policy"] != policy] + [sample]
                report.write("fidelity", samples, targets_of(samples), plan=asdict(plan))
    except ArrieroError as error:
        say(f"bench-fidelity: {error}")
        return 1
    report.print_table(TITLE, table(samples), targets_of(samples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
