"""The chaos figures for the record: `make chaos` -> results/chaos.json.

    storm        faults at every named point of the protocol, on simulated instances in processes of their own
    scoreboard   the same faults for arriero on simulated engines, and for vllm-router before two test servers
    real         SIGKILLs at random moments on two real engines in float32, under every kind of request

Parts (`--parts`), slices of the storm, systems and seeds can be run one by one: their figures add up in the file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arriero.bench import report
from arriero.bench.client import Client, percentile, poll
from arriero.bench.report import Target
from arriero.bench.server import Server, add_server_options, arriero_command, common_flags, log_file, model_of, say
from arriero.bench.soak import IDLE_TIMEOUT_S, leaks_in, percent
from arriero.bench.systems import ARRIERO, ROUTER, ROUTER_BIN
from arriero.chaos.cli import Options, carry_out, first_details, free_ports, routed, running
from arriero.chaos.points import Fault, plan
from arriero.chaos.run import Result
from arriero.chaos.scoreboard import Verdict, upright
from arriero.chaos.script import Script, random_script
from arriero.chaos.slow_pipe import SlowPipe
from arriero.chaos.storm import Outcome, Storm, stormy_fleet
from arriero.core.errors import ArrieroError, ConfigError

SYSTEMS = (ARRIERO, f"{ROUTER}round_robin", f"{ROUTER}cache_aware")
MIN_STRIKES = 500
MIN_KILLS = 10
MAX_DETECTION_S = 0.1
RESULT = Path("results") / "chaos.json"
Part = dict[str, Any]


# ---------------------------------------------------------------------- the storm


def storm(args: argparse.Namespace) -> Part:
    """Strike the protocol at every point; or at every N-th of the planned ones, with the slice I/N."""
    rng = random.Random(args.seed)
    index, num_slices = (int(n) for n in args.slice.split("/"))
    strikes = list(plan(args.strikes, rng))[index - 1 :: num_slices]

    async def run() -> Outcome:
        async with stormy_fleet() as fleet:
            return await Storm(fleet, rng, say).run(strikes)

    outcome = asyncio.run(run())
    found = {
        "slice": args.slice,
        "seed": args.seed,
        "violations": outcome.violations[:100],
        "num_violations": len(outcome.violations),
        "deaths": outcome.num_deaths,
        "streams": outcome.num_streams,
        "tokens": outcome.num_tokens,
        "moves": outcome.moves,
        "seconds": round(outcome.seconds, 1),
        "samples": [record.as_dict() for record in outcome.records],
    }
    return {"runs": [found]}


def summarise_storm(runs: Sequence[dict[str, Any]]) -> Part:
    """All slices together."""
    samples = [sample for run in runs for sample in run["samples"]]
    reached = sum(s["reached"] for s in samples)
    return {
        "runs": list(runs),
        "summary": storm_rows(samples),
        "targets": [
            Target.at_least("storm: faults at points of the protocol", reached, MIN_STRIKES),
            Target.at_most("storm: faults whose point no move came to", len(samples) - reached, 0),
            Target.at_most(
                "storm: tokens or streams lost, doubled or wrong; anything leaked",
                sum(run["num_violations"] for run in runs),
                0,
            ),
        ],
    }


def storm_rows(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each fault."""
    rows = []
    for fault in Fault:
        here = [s for s in samples if s["fault"] == fault and s["reached"]]
        felt = [seconds for s in here for seconds in s["recovery_s"]]
        rows.append(
            {
                "fault": fault.value,
                "strikes": len(here),
                "points": len({(s["op"], s["side"]) for s in here}),
                "streams struck": sum(s["affected"] for s in here),
                "next token after, P50 s": percentile(felt, 50.0),
                "P99 s": percentile(felt, 99.0),
            }
        )
    return [row for row in rows if row["strikes"]]


# ---------------------------------------------------------------------- the scoreboard


def scoreboard(args: argparse.Namespace) -> Part:
    """The same faults for each system."""
    script = random_script(args.faults, duration_s=args.duration, rng=random.Random(args.seed))
    options = Options(seed=args.seed, concurrency=args.concurrency)
    results = [
        arriero_on_sim(args, script, options)
        if system == ARRIERO
        else router(system.removeprefix(ROUTER), args, script, options)
        for system in args.systems
    ]
    return {
        "runs": [{**r.as_dict(), "seed": args.seed, "row": r.row(), "details": first_details(r)} for r in results],
    }


def summarise_scoreboard(runs: Sequence[dict[str, Any]]) -> Part:
    """All systems side by side."""
    ours = [s["verdict"] for run in runs if run["system"] == ARRIERO for s in run["streams"]]
    whole = percent(ours.count(Verdict.WHOLE), len(ours))
    return {
        "runs": list(runs),
        "summary": upright([run["row"] for run in sorted(runs, key=lambda run: str(run["system"]))]),
        "targets": [Target.at_least("scoreboard: arriero's streams that came whole and equal, %", whole, 100.0)],
    }


def arriero_on_sim(args: argparse.Namespace, script: Script, options: Options) -> Result:
    """`arriero serve --engine sim`, which writes its event log into a pipe of ours."""
    with tempfile.TemporaryDirectory(prefix="arriero-chaos-") as folder:
        disk, (port,) = SlowPipe(Path(folder) / "events"), free_ports(1)
        flags = ["--engine", "sim", "--event-log", str(disk.path), *common_flags(args)]
        command = arriero_command(model_of(args), port=port, instances=args.instances, flags=flags)

        async def run(url: str) -> Result:
            rng = random.Random(args.seed)
            async with running(url, None, rng, disk=disk) as system:
                return await carry_out(system, script, options, rng)

        try:
            with Server(command, port=port, log=log_file("chaos-sim"), timeout_s=args.start_timeout) as server:
                return asyncio.run(run(server.url))
        finally:
            disk.close()


def router(policy: str, args: argparse.Namespace, script: Script, options: Options) -> Result:
    """vllm-router before test servers; it looks at its workers' health every second, as often as it can."""
    if not ROUTER_BIN.exists():
        raise ConfigError(f"there is no {ROUTER_BIN}: run `make peers` first, it installs vllm-router")
    command = (
        f"{ROUTER_BIN} --worker-urls {{urls}} --host 127.0.0.1 --port {{port}} --prometheus-port {{metrics_port}} "
        f"--policy {policy} --worker-startup-check-interval 1 --health-check-interval-secs 1 "
        "--cb-timeout-duration-secs 1"  # by default a worker that failed is left out for long after it is back
    )

    async def run() -> Result:
        async with routed(command, log_file("chaos").parent) as system:
            return await carry_out(system, script, options, random.Random(args.seed))

    result = asyncio.run(run())
    return Result(f"{ROUTER}{policy}", result.faults, result.outcomes)


# ---------------------------------------------------------------------- real engines


def real(args: argparse.Namespace) -> Part:
    """Kill real engines while every kind of request runs."""
    script = random_script(f"kill={args.kills}", duration_s=args.real_seconds, rng=random.Random(args.seed))
    options = Options(seed=args.seed, concurrency=args.concurrency, num_cases=40, mixed=True, patience_s=180.0)
    flags = [*common_flags(args), "--dtype", "float32"]
    command = arriero_command(model_of(args), port=args.port, instances=args.instances, flags=flags)

    async def run(url: str) -> tuple[Result, list[str]]:
        rng = random.Random(args.seed)
        async with running(url, None, rng) as system:
            result = await carry_out(system, script, options, rng)
            return result, await leaks(system.client)

    with Server(command, port=args.port, log=log_file("chaos-real"), timeout_s=args.start_timeout) as server:
        say(f"ready after {server.ready_s:.0f} s")
        result, left = asyncio.run(run(server.url))
    left += [f"shared memory {name}" for name in server.shared_memory()]
    left += [f"process {name}" for name in server.survivors]
    return {"runs": [{**result.as_dict(), "row": result.row(), "seed": args.seed, "leaks": left}]}


async def leaks(client: Client) -> list[str]:
    """What the server still holds when nobody asks for anything."""

    async def probe() -> list[str]:
        return leaks_in(await client.get("/arriero/check"))

    return await poll(probe, lambda found: not found, timeout_s=IDLE_TIMEOUT_S)


def summarise_real(runs: Sequence[dict[str, Any]]) -> Part:
    """All runs, of whatever seeds, together."""
    verdicts = Counter(s["verdict"] for run in runs for s in run["streams"])
    kinds = sorted({s["kind"] for run in runs for s in run["streams"]})
    rows = []
    for kind in kinds:
        here = [s for run in runs for s in run["streams"] if s["kind"] == kind]
        whole = [s for s in here if s["verdict"] == Verdict.WHOLE]
        silences = [s["longest_silence_s"] for s in whole]
        rows.append(
            {
                "kind": kind,
                "streams": len(here),
                "whole": len(whole),
                "longest silence P50 s": percentile(silences, 50.0),
                "longest silence max s": max(silences, default=float("nan")),
            }
        )
    num_streams = sum(verdicts.values())
    num_kills = sum(f["skipped"] is None and f["action"] == "kill" for run in runs for f in run["faults"])
    num_leaks = sum(len(run["leaks"]) for run in runs)
    detections = [f["detection_s"] for run in runs for f in run["faults"] if "detection_s" in f]
    return {
        "runs": list(runs),
        "summary": rows,
        "kills": kill_rows(runs),
        "targets": [
            Target.at_least("real: SIGKILLs of engines", num_kills, MIN_KILLS),
            Target.at_least(
                "real: streams whole and token-equal, %", percent(verdicts[Verdict.WHOLE], num_streams), 100.0
            ),
            Target.at_most("real: blocks, routes, reservations, files and processes left", num_leaks, 0),
            *(
                [Target.at_most("real: from SIGKILL until it is known, max", max(detections), MAX_DETECTION_S, "s")]
                if detections
                else []
            ),
        ],
    }


def kill_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How soon kills were known and how long they were felt, by how many instances were left."""
    kills = [f for run in runs for f in run["faults"] if f["action"] == "kill" and "felt_s" in f]
    rows = []
    for num_up in sorted({f["num_up"] for f in kills}, reverse=True):
        here = [f for f in kills if f["num_up"] == num_up]
        known = [f["detection_s"] for f in here if "detection_s" in f]
        felt = [f["felt_s"] for f in here]
        rows.append(
            {
                "instances left": num_up - 1,
                "kills": len(here),
                "known after, max s": max(known, default=float("nan")),
                "felt P50 s": percentile(felt, 50.0),
                "felt max s": max(felt),
            }
        )
    return rows


# ---------------------------------------------------------------------- the record

PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {"storm": storm, "scoreboard": scoreboard, "real": real}
TITLES = {
    "storm": "chaos, storm: faults at every point of the protocol, simulated engines",
    "scoreboard": "chaos, scoreboard: the same faults for each",
    "real": "chaos, real engines in float32: SIGKILL at random moments",
}


def earlier_parts() -> dict[str, Part]:
    """What the file holds from earlier runs."""
    try:
        return dict(json.loads(RESULT.read_text())["parts"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


SUMMARIES: dict[str, Callable[[Sequence[dict[str, Any]]], Part]] = {
    "storm": summarise_storm,
    "scoreboard": summarise_scoreboard,
    "real": summarise_real,
}
"""Runs add up, one for each seed, slice and system."""


def merge(name: str, runs: Sequence[dict[str, Any]], earlier: Part | None) -> Part:
    """New runs with those that the file holds, but for the ones that they replace."""
    new = {_key(run) for run in runs}
    kept = [run for run in (earlier or {}).get("runs", []) if _key(run) not in new]
    return SUMMARIES[name]([*kept, *runs])


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["seed"], run.get("slice"), run.get("system")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--slice", default="1/1", metavar="I/N", help="of the storm: every N-th strike, from the I-th on"
    )
    parser.add_argument("--strikes", type=int, default=600, help="of the storm (default: %(default)s)")
    parser.add_argument(
        "--duration", type=float, default=60.0, help="s of the scoreboard's load (default: %(default)s)"
    )
    parser.add_argument(
        "--faults", default="kill=6,stop=3,cut=2,corrupt=2,slow_disk=1", help="of the scoreboard (%(default)s)"
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="of the scoreboard")
    parser.add_argument("--kills", type=int, default=MIN_KILLS, help="of real engines (default: %(default)s)")
    parser.add_argument("--real-seconds", type=float, default=420.0, help="of load on real engines (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--instances", type=int, default=2, help="(default: %(default)s)")
    add_server_options(parser, port=8140, kv_bytes=1 << 29)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run and write; 0 whether the targets are met or not."""
    args = _parser().parse_args(argv)
    parts = earlier_parts()
    try:
        for name in args.parts:
            say(f"chaos: {name}")
            part = merge(name, PARTS[name](args)["runs"], parts.get(name))
            command = " ".join(["make chaos", f'ARGS="{" ".join(argv if argv is not None else sys.argv[1:])}"'])
            parts[name] = {**part, "command": command, **report.environment()}
            if part.get("kills"):
                report.print_table(f"{TITLES[name]}: the kills", part["kills"])
            report.print_table(TITLES[name], part["summary"], part["targets"])
            targets = [t for p in parts.values() for t in p["targets"]]
            report.write("chaos", [], targets, parts=parts)
    except ArrieroError as error:
        sys.stderr.write(f"make chaos: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    sys.exit(main())
