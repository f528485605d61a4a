"""`arriero sweep`: the rate that a cluster sustains under latency targets, or the fewest instances for a load."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from arriero.core.errors import ArrieroError, ConfigError
from arriero.sim.options import (
    add_cluster_options,
    add_workload_options,
    class_at,
    cluster_config,
    policies_of,
    read_requests,
    require_one_source,
)
from arriero.sim.plots import check_plot_file
from arriero.sim.simulator import Simulator
from arriero.sim.sweep import Point, Sweep, Targets, as_json, fewest_instances, highest_rate, judge
from arriero.sim.sweep_plot import plot_sweeps
from arriero.tables import print_table
from arriero.workload.workload import Workload


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `sweep` to the sub-commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sweep",
        help="find the rate that a cluster sustains under TTFT / TPOT targets, or the fewest instances for a load",
        description="With --workload and --instances: the highest rate. With a trace, or --workload and --rate: the "
        "fewest instances.",
    )
    add_workload_options(parser)
    parser.add_argument("--rate", type=float, help="requests a second of the workload: look for the fewest instances")
    parser.add_argument("--instances", type=int, help="number of instances: look for the highest rate")
    parser.add_argument("--ttft", type=float, metavar="S", help="target: seconds to the first token")
    parser.add_argument("--tpot", type=float, metavar="S", help="target: seconds for each token after the first")
    parser.add_argument("--percentile", type=float, default=99.0, help="of the requests, held to them (default: 99)")
    parser.add_argument("--precision", type=float, default=0.02, help="of the rate, as a share (default: 0.02)")
    parser.add_argument("--max-instances", type=int, default=1024, help="tried at most (default: 1024)")
    add_cluster_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, with every point, instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture: FILE.png or FILE.html")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry it out; the exit code: 1 also if a policy meets the targets nowhere."""
    try:
        if args.plot is not None:
            check_plot_file(args.plot)
        targets = Targets(ttft_s=args.ttft, tpot_s=args.tpot, percentile=args.percentile)
        by_rate, search = _question(args, targets)
        sweeps = {}
        with _told(shown=not args.json) as tell:
            for policy in policies_of(args):
                sweeps[policy] = search(policy, tell)
        if args.plot is not None:
            plot_sweeps(args.plot, _title(args, by_rate), sweeps, targets, by_rate=by_rate)
    except ConfigError as error:
        sys.stderr.write(f"arriero sweep: {error}\n")
        return 2
    except (ArrieroError, OSError) as error:
        sys.stderr.write(f"arriero sweep: {error}\n")
        return 1
    if args.json:
        print(json.dumps({"policies": {policy: as_json(sweep) for policy, sweep in sweeps.items()}}, indent=2))
    else:
        _print_table(args, sweeps, targets, by_rate=by_rate)
    return 0 if all(sweep.best for sweep in sweeps.values()) else 1


Tell = Callable[[str], None]
Search = Callable[[str, Tell], Sweep]


def _question(args: argparse.Namespace, targets: Targets) -> tuple[bool, Search]:
    """Whether the rate is looked for (otherwise the number of instances), and the search for one policy."""
    require_one_source(args)
    if args.trace is None and (args.rate is None) == (args.instances is None):
        raise ConfigError("give either --instances, to look for the highest rate, or --rate, for the fewest instances")
    if args.trace is not None and not args.rate is args.instances is None:
        raise ConfigError("--rate and --instances are for --workload: of a trace, the fewest instances are looked for")
    if args.instances is not None and not 0 < args.precision < 1:
        raise ConfigError(f"--precision {args.precision} is invalid: it must be in (0, 1)")
    if args.max_instances < 1:
        raise ConfigError(f"--max-instances {args.max_instances} is invalid: it must be 1 or more")
    if args.instances is not None:

        def rates(policy: str, tell: Tell) -> Sweep:
            def measure(rate: float) -> Point:
                return _measure(args, policy, class_at(args, rate), args.instances, targets, tell, rate)

            return highest_rate(measure, float(args.instances), args.precision)

        return True, rates
    workload = read_requests(args.trace, args.num_requests) if args.trace is not None else class_at(args, args.rate)

    def numbers(policy: str, tell: Tell) -> Sweep:
        def measure(num_instances: int) -> Point:
            return _measure(args, policy, workload, num_instances, targets, tell, workload.rate)

        return fewest_instances(measure, args.max_instances)

    return False, numbers


def _measure(
    args: argparse.Namespace,
    policy: str,
    workload: Workload,
    num_instances: int,
    targets: Targets,
    tell: Tell,
    rate: float,
) -> Point:
    tell(f"{policy}: {rate:.4g} requests a second on {num_instances} instances")
    simulator = Simulator(cluster_config(args, policy, workload, num_instances), workload)
    return judge(simulator.run(), rate, targets)


class _told:
    """On a terminal, says what is being tried."""

    def __init__(self, *, shown: bool) -> None:
        self._status = Console(stderr=True).status("sweep") if shown and sys.stderr.isatty() else None

    def __enter__(self) -> Tell:
        if self._status is None:
            return lambda text: None
        self._status.start()
        return self._status.update

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()


def _title(args: argparse.Namespace, by_rate: bool) -> str:
    what = args.workload if args.workload is not None else args.trace.name
    if by_rate:
        return f"{what} on {args.instances} x {args.profile}: the highest rate"
    at = f" at {args.rate:g} requests a second" if args.rate is not None else ""
    return f"{what}{at} on {args.profile}: the fewest instances"


def _print_table(args: argparse.Namespace, sweeps: Mapping[str, Sweep], targets: Targets, *, by_rate: bool) -> None:
    bounds = [f"{n} <= {b:g} s" for n, b in (("TTFT", targets.ttft_s), ("TPOT", targets.tpot_s)) if b is not None]
    level = f"P{targets.percentile:g}"
    headings = ("policy", "requests / s" if by_rate else "instances", f"{level} TTFT s", f"{level} TPOT s", "tried")
    rows = []
    for policy, sweep in sweeps.items():
        shown = sweep.best or sweep.points[-1]
        found = f"{shown.rate:.4g}" if by_rate else str(shown.num_instances)
        found = found if sweep.best else f"none; at {found}:"
        rows.append((policy, found, f"{shown.ttft_s:.4g}", f"{shown.tpot_s:.4g}", str(len(sweep.points))))
    title = f"{_title(args, by_rate)} with {level} {', '.join(bounds)}"
    print_table(title, headings, rows)
