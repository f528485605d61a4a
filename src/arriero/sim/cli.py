"""`arriero simulate`: the same scheduling code, in virtual time."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from arriero.core.dispatch import DISPATCH_POLICIES
from arriero.core.errors import ArrieroError, ConfigError
from arriero.observe.events import EventLog
from arriero.sim.network import NetworkConfig
from arriero.sim.profiles import PAPER, load_profile, profile_names
from arriero.sim.report import summarize
from arriero.sim.simulator import Simulator, SimulatorConfig, engine_config, scheduler_config
from arriero.workload.traces import read_trace
from arriero.workload.workload import CLASSES, Workload, make_workload

_LONG = 20_000  # requests in all from which a progress bar is shown


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `simulate` to the sub-commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "simulate", help="run a workload or a trace through the scheduler in virtual time"
    )
    parser.add_argument("trace", nargs="?", type=Path, help="CSV with arrival_s,prompt_tokens,output_tokens")
    parser.add_argument("--workload", choices=list(CLASSES), help="instead of a trace: a class of lengths")
    parser.add_argument("--rate", type=float, help="requests a second of the workload")
    parser.add_argument("--cv", type=float, default=1.0, help="variation of its gaps; 1 is Poisson (default: 1)")
    parser.add_argument("--high-priority", type=float, default=0.0, metavar="SHARE", help="share at priority -1")
    parser.add_argument("--num-requests", type=int, help="requests of the workload (default: 10000) or of the trace")
    parser.add_argument("--instances", type=int, default=16, help="number of instances (default: 16)")
    known = ", ".join([*DISPATCH_POLICIES, "arriero"])
    parser.add_argument("--policy", default="arriero", help=f"one or more of {known}, separated by commas")
    parser.add_argument(
        "--profile", default=PAPER, help=f"model and device, or a file NAME.json (default: {PAPER}; 'list' shows all)"
    )
    parser.add_argument("--host-ms", type=float, help="time of a step outside the model (default: the profile's)")
    parser.add_argument("--kv-tokens", type=int, help="KV memory of an instance (default: the profile's)")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--prefill-first", action="store_true", help="whole prompts in steps of their own: vLLM v0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--events", type=Path, metavar="FILE", help="write the event log; FILE.POLICY for several")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    if args.profile == "list":
        print("\n".join(profile_names()))
        return 0
    try:
        policies = [p.strip() for p in args.policy.split(",")]
        workload, summaries = _workload(args), {}
        configs = {policy: _config(args, policy) for policy in policies}
        with _progress(len(policies) * len(workload.arrivals), shown=not args.json) as advance:
            for number, (policy, config) in enumerate(configs.items()):
                base = number * len(workload.arrivals)
                summaries[policy] = _simulate(args, policy, config, workload, partial(_ahead, advance, base))
    except ConfigError as error:
        sys.stderr.write(f"arriero simulate: {error}\n")
        return 2
    except (ArrieroError, OSError) as error:
        sys.stderr.write(f"arriero simulate: {error}\n")
        return 1
    if args.json:
        print(json.dumps({"workload": workload.name, "rate": workload.rate, "policies": summaries}, indent=2))
    else:
        Console().print(_table(workload, summaries))
    return 0


def _workload(args: argparse.Namespace) -> Workload:
    if (args.trace is None) == (args.workload is None):
        raise ConfigError("give either a trace or --workload CLASS --rate R")
    if args.trace is not None:
        if args.rate is not None:
            raise ConfigError(f"--rate {args.rate} is for --workload: a trace has its own arrival times")
        return read_trace(args.trace, args.num_requests)
    if args.rate is None:
        raise ConfigError(f"--workload {args.workload} needs --rate, in requests a second")
    num_requests = 10_000 if args.num_requests is None else args.num_requests
    priorities = {-1: args.high_priority} if args.high_priority else None
    return make_workload(
        args.workload, num_requests=num_requests, rate=args.rate, cv=args.cv, priorities=priorities, seed=args.seed
    )


def _config(args: argparse.Namespace, policy: str) -> SimulatorConfig:
    profile = load_profile(args.profile, args.host_ms)
    facts: dict[str, Any] = {
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "priority_scheduling": bool(args.high_priority),
    }
    if args.kv_tokens is not None:
        facts["num_blocks"] = args.kv_tokens // profile.block_size
    return SimulatorConfig(
        engine=engine_config(profile, **facts),
        num_instances=args.instances,
        scheduler=scheduler_config(policy, args.seed),
        network=profile.network or NetworkConfig(),
        prefill_first=args.prefill_first,
        sample_s=1.0,
    )


def _simulate(
    args: argparse.Namespace,
    policy: str,
    config: SimulatorConfig,
    workload: Workload,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    started = time.process_time()
    logs: list[EventLog] = []

    def make_events(clock: Callable[[], float]) -> EventLog:
        path: Path = args.events if "," not in args.policy else args.events.with_name(f"{args.events.name}.{policy}")
        path.unlink(missing_ok=True)
        logs.append(EventLog(clock, path, keep=1))
        return logs[0]

    try:
        simulator = Simulator(
            config, workload, make_events=make_events if args.events is not None else None, on_progress=on_progress
        )
        result = simulator.run()
    finally:
        for log in logs:
            log.close()
    simulator.check_integrity()
    return {**summarize(result), "cpu_s": time.process_time() - started}


def _ahead(advance: Callable[[int], None], base: int, num_ended: int) -> None:
    advance(base + num_ended)


@contextlib.contextmanager
def _progress(num_requests: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    if not shown or num_requests < _LONG or not sys.stderr.isatty():
        yield lambda num_ended: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=num_requests)
        yield lambda num_ended: progress.update(task, completed=num_ended)


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "prefill mean s": lambda s: _figure(s["ttft_s"], "mean"),
    "prefill P50 s": lambda s: _figure(s["ttft_s"], "p50"),
    "prefill P99 s": lambda s: _figure(s["ttft_s"], "p99"),
    "decode mean ms": lambda s: _figure(s["tpot_s"], "mean", 1e3),
    "decode P99 ms": lambda s: _figure(s["tpot_s"], "p99", 1e3),
    "request mean s": lambda s: _figure(s["e2e_s"], "mean"),
    "request P99 s": lambda s: _figure(s["e2e_s"], "p99"),
    "preemptions": lambda s: str(s["num_preemptions"]),
    "preemption loss s": lambda s: f"{s['preemption_loss_s']:.3f}",
    "fragmentation %": lambda s: _percent(s["fragmentation"]),
    "memory %": lambda s: _percent(s["memory"]),
    "migrations": lambda s: str(s["num_migrations"]),
    "downtime mean ms": lambda s: _figure(s["downtime_s"], "mean", 1e3),
    "downtime P99 ms": lambda s: _figure(s["downtime_s"], "p99", 1e3),
    "tokens / s": lambda s: f"{s['tokens_per_s']:.0f}",
    "CPU s": lambda s: f"{s['cpu_s']:.2f}",
}


def _figure(spread: dict[str, float] | None, name: str, scale: float = 1.0) -> str:
    return "-" if spread is None else f"{scale * spread[name]:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _table(workload: Workload, summaries: dict[str, dict[str, Any]]) -> Table:
    rejected = next(iter(summaries.values()))["num_rejected"]
    title = f"{workload.name}: {len(workload.arrivals)} requests, {workload.rate:.3g} a second"
    table = Table(title=title + (f", {rejected} rejected" if rejected else ""), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for policy in summaries:
        table.add_column(policy, justify="right", no_wrap=True)
    for name, show in FIGURES.items():
        table.add_row(name, *[show(summary) for summary in summaries.values()])
    return table
