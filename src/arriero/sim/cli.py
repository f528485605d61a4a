"""`arriero simulate`: the same scheduling code, in virtual time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from arriero.core.config import EventLogConfig, LogLevel
from arriero.core.errors import ArrieroError, ConfigError
from arriero.observe.events import EventLog
from arriero.sim.kills import parse_kills
from arriero.sim.options import (
    add_cluster_options,
    add_workload_options,
    class_at,
    cluster_config,
    policies_of,
    read_requests,
    require_one_source,
)
from arriero.sim.plots import check_plot_file, plot_results
from arriero.sim.profiles import profile_names
from arriero.sim.progress import progress_bar
from arriero.sim.report import summarize
from arriero.sim.simulator import SimulationResult, Simulator, SimulatorConfig
from arriero.tables import print_table
from arriero.workload.workload import Workload


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `simulate` to the sub-commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "simulate", help="run a workload or a trace through the scheduler in virtual time"
    )
    add_workload_options(parser)
    parser.add_argument("--rate", type=float, help="requests a second of the workload")
    parser.add_argument("--instances", type=int, default=16, help="number of instances (default: 16)")
    add_cluster_options(parser)
    parser.add_argument(
        "--kill",
        action="append",
        default=[],
        metavar="TIME_S:INSTANCE",
        help="an instance dies at that time, and a new one is started; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--events", type=Path, metavar="FILE", help="write the event log; FILE.POLICY for several")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture: FILE.png or FILE.html")
    parser.add_argument(
        "--event-log-level",
        choices=[level.value for level in LogLevel],
        default=LogLevel.EVENTS.value,
        help="full: the event log also has all that `arriero replay` needs (default: %(default)s)",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    if args.profile == "list":
        print("\n".join(profile_names()))
        return 0
    try:
        if args.plot is not None:
            check_plot_file(args.plot)
        policies, workload = policies_of(args), _workload(args)
        # The pictures need samples even of a run of seconds; a run of hours is sampled once a second.
        span_s = workload.arrivals[-1].arrival_s if workload.arrivals else 0.0
        sample_s = min(1.0, span_s / 200) or 1.0
        kills = parse_kills(args.kill)
        configs = {
            p: cluster_config(args, p, workload, args.instances, sample_s=sample_s, kills=kills) for p in policies
        }
        results, summaries = {}, {}
        with progress_bar("simulating", len(policies) * len(workload.arrivals), shown=not args.json) as advance:
            for number, (policy, config) in enumerate(configs.items()):
                base = number * len(workload.arrivals)
                result, cpu_s = _simulate(args, policy, config, workload, partial(_ahead, advance, base))
                summaries[policy] = {**summarize(result), "cpu_s": cpu_s}
                if args.plot is not None:
                    results[policy] = result
        if args.plot is not None:
            plot_results(args.plot, _title(args, workload), results)
    except ConfigError as error:
        sys.stderr.write(f"arriero simulate: {error}\n")
        return 2
    except (ArrieroError, OSError) as error:
        sys.stderr.write(f"arriero simulate: {error}\n")
        return 1
    if args.json:
        print(json.dumps({"workload": workload.name, "rate": workload.rate, "policies": summaries}, indent=2))
    else:
        _print_table(workload, summaries)
    return 0


def _workload(args: argparse.Namespace) -> Workload:
    require_one_source(args)
    if args.trace is not None:
        if args.rate is not None:
            raise ConfigError(f"--rate {args.rate} is for --workload: a trace has its own arrival times")
        return read_requests(args.trace, args.num_requests)
    if args.rate is None:
        raise ConfigError(f"--workload {args.workload} needs --rate, in requests a second")
    return class_at(args, args.rate)


def _title(args: argparse.Namespace, workload: Workload) -> str:
    profile = Path(args.profile).stem if args.profile.endswith(".json") else args.profile
    return f"{_headline(workload)}, on {args.instances} x {profile}"


def _headline(workload: Workload) -> str:
    return f"{workload.name}: {len(workload.arrivals)} requests, {workload.rate:.3g} a second"


def _simulate(
    args: argparse.Namespace,
    policy: str,
    config: SimulatorConfig,
    workload: Workload,
    on_progress: Callable[[int], None],
) -> tuple[SimulationResult, float]:
    started = time.process_time()
    logs: list[EventLog] = []

    def make_events(clock: Callable[[], float]) -> EventLog:
        several = len(policies_of(args)) > 1
        path: Path = args.events.with_name(f"{args.events.name}.{policy}") if several else args.events
        path.unlink(missing_ok=True)
        logs.append(EventLog(clock, path, keep=1, config=EventLogConfig(level=LogLevel(args.event_log_level))))
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
    return result, time.process_time() - started


def _ahead(advance: Callable[[int], None], base: int, num_ended: int) -> None:
    advance(base + num_ended)


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
    "prefix hits %": lambda s: _percent(s["prefix_hit"]),
    "TTFT targets met %": lambda s: _percent(s["ttft_targets_met"]),
    "memory %": lambda s: _percent(s["memory"]),
    "migrations": lambda s: str(s["num_migrations"]),
    "lost instances": lambda s: str(s["num_lost_instances"] or "-"),
    "replays": lambda s: str(s["num_replays"]) if s["num_lost_instances"] else "-",
    "downtime mean ms": lambda s: _figure(s["downtime_s"], "mean", 1e3),
    "downtime P99 ms": lambda s: _figure(s["downtime_s"], "p99", 1e3),
    "tokens / s": lambda s: f"{s['tokens_per_s']:.0f}",
    "CPU s": lambda s: f"{s['cpu_s']:.2f}",
}


def _figure(spread: dict[str, float] | None, name: str, scale: float = 1.0) -> str:
    return "-" if spread is None else f"{scale * spread[name]:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _print_table(workload: Workload, summaries: dict[str, dict[str, Any]]) -> None:
    rejected = next(iter(summaries.values()))["num_rejected"]
    title = _headline(workload) + (f", {rejected} rejected" if rejected else "")
    rows = [(name, *(show(summary) for summary in summaries.values())) for name, show in FIGURES.items()]
    print_table(title, ["", *summaries], [row for row in rows if any(text != "-" for text in row[1:])])
