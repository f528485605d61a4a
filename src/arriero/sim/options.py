"""What `arriero simulate` and `arriero sweep` ask for alike: a workload, and a cluster to put it on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero.core.errors import ConfigError
from arriero.core.policies import POLICIES
from arriero.sim.kills import Kill
from arriero.sim.network import NetworkConfig
from arriero.sim.profiles import PAPER, load_profile
from arriero.sim.settings import HORIZON_S
from arriero.sim.simulator import CLAIRVOYANT, SimulatorConfig, engine_config, scheduler_config
from arriero.workload.recorded import is_log, read_log
from arriero.workload.traces import read_trace
from arriero.workload.workload import CLASSES, Workload, make_workload

NUM_REQUESTS = 10_000


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """A trace or a recorded log, or a class of lengths."""
    parser.add_argument(
        "trace",
        nargs="?",
        type=Path,
        help="CSV with arrival_s,prompt_tokens,output_tokens[,priority][,hash_ids][,ttft_target_s], or an event "
        "log of `arriero serve`",
    )
    parser.add_argument("--workload", choices=list(CLASSES), help="instead of a trace: a class of lengths")
    parser.add_argument("--cv", type=float, help="variation of the workload's gaps; 1 is Poisson (default: 1)")
    parser.add_argument("--high-priority", type=float, metavar="SHARE", help="share of the workload at priority -1")
    parser.add_argument(
        "--num-requests", type=int, help=f"requests of the workload (default: {NUM_REQUESTS}) or of the trace"
    )
    parser.add_argument("--seed", type=int, default=0)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Engines, their profile, and the policies."""
    known = ", ".join([*POLICIES, CLAIRVOYANT])
    parser.add_argument("--policy", default="arriero", help=f"one or more of {known}, separated by commas")
    parser.add_argument(
        "--horizon",
        type=float,
        metavar="S",
        help=f"how far --policy {CLAIRVOYANT} knows the arrivals, in seconds; 0: not (default: {HORIZON_S:g})",
    )
    parser.add_argument(
        "--profile", default=PAPER, help=f"model and device, or a file NAME.json (default: {PAPER}; 'list' shows all)"
    )
    parser.add_argument("--host-ms", type=float, help="time of a step outside the model (default: the profile's)")
    parser.add_argument("--kv-tokens", type=int, help="KV memory of an instance (default: the profile's)")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument(
        "--itl-target-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="compute prompts in parts that fit into so much between two tokens of a stream, as `arriero serve` does "
        "(default: 0, steps as vLLM's)",
    )
    parser.add_argument("--prefill-first", action="store_true", help="whole prompts in steps of their own: vLLM v0")
    parser.add_argument(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="compute equal prefixes once (default: if the trace has hash_ids)",
    )


def policies_of(args: argparse.Namespace) -> list[str]:
    """Each once, in the order given. Raises ConfigError."""
    policies = list(dict.fromkeys(policy.strip() for policy in args.policy.split(",")))
    if args.horizon is not None and CLAIRVOYANT not in policies:
        raise ConfigError(f"--horizon {args.horizon:g} is for --policy {CLAIRVOYANT}: no other policy knows the future")
    return policies


def require_one_source(args: argparse.Namespace) -> None:
    """Raises ConfigError unless there is either a trace or a class."""
    if (args.trace is None) == (args.workload is None):
        raise ConfigError("give either a trace or --workload CLASS")
    if args.trace is not None:
        if str(args.trace) in CLASSES and not args.trace.exists():
            raise ConfigError(f"there is no file {args.trace}: for the class of that name say --workload {args.trace}")
        for name in ("cv", "high_priority"):
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {getattr(args, name)} is for --workload: a trace has its own requests")


def read_requests(path: Path, limit: int | None) -> Workload:
    """A trace or a log. Raises ConfigError."""
    return read_log(path, limit) if is_log(path) else read_trace(path, limit)


def class_at(args: argparse.Namespace, rate: float) -> Workload:
    """The class of ``--workload`` at ``rate`` requests a second. Raises ConfigError."""
    return make_workload(
        args.workload,
        num_requests=NUM_REQUESTS if args.num_requests is None else args.num_requests,
        rate=rate,
        cv=1.0 if args.cv is None else args.cv,
        priorities={-1: args.high_priority} if args.high_priority else None,
        seed=args.seed,
    )


def cluster_config(
    args: argparse.Namespace,
    policy: str,
    workload: Workload,
    num_instances: int,
    *,
    sample_s: float = 0.0,
    kills: tuple[Kill, ...] = (),
) -> SimulatorConfig:
    """Equal instances under ``policy``, ready for what the workload has. Raises ConfigError."""
    if args.prefill_first and args.itl_target_ms:
        raise ConfigError(
            f"--itl-target-ms {args.itl_target_ms:g}: --prefill-first computes prompts whole; give one of the two"
        )
    profile = load_profile(args.profile, args.host_ms)
    facts: dict[str, Any] = {
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "itl_target_s": args.itl_target_ms / 1e3,
        "priority_scheduling": _has_priorities(workload),
        "prefix_caching": workload.has_prefixes if args.prefix_caching is None else args.prefix_caching,
    }
    if args.kv_tokens is not None:
        facts["num_blocks"] = args.kv_tokens // profile.block_size
    return SimulatorConfig(
        engine=engine_config(profile, **facts),
        num_instances=num_instances,
        scheduler=scheduler_config(policy, args.seed, HORIZON_S if args.horizon is None else args.horizon),
        network=profile.network or NetworkConfig(),
        prefill_first=args.prefill_first,
        sample_s=sample_s,
        kills=kills,
    )


def _has_priorities(workload: Workload) -> bool:
    arrivals: Sequence[Any] = workload.arrivals
    return any(a.priority != arrivals[0].priority for a in arrivals)
