"""What a client sees of a migration: `make bench-migration` -> results/migration.json.

Each sample is a request of its own with a prompt that no prefix cache has seen. It decodes for a while,
moves once, and decodes on. The *gap* is the time between the last chunk of tokens from the source and the
first from the destination; a request that does not move shows an inter-token time there, so the gap is
given as a multiple of it, measured at the destination after the move, in the same run.

*Idle*: nothing else runs. *Loaded*: other requests decode on both instances all the time. Modes and contexts
are interleaved in an order of their own in each repeat, so that slow drifts of the machine fall on all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from time import perf_counter
from typing import Any

from arriero.bench import report
from arriero.bench.client import (
    COMPLETIONS,
    Call,
    Chunk,
    Client,
    chunk_of_token,
    decode_body,
    intervals,
    median,
    percentile,
    poll,
    random_prompt,
)
from arriero.bench.report import Target
from arriero.bench.server import SERVED_NAME, add_server_options, arriero_server, say
from arriero.core.errors import ArrieroError
from arriero.core.types import MigrationMode

LIVE, RECOMPUTE = MigrationMode.LIVE.value, MigrationMode.RECOMPUTE.value
IDLE, LOADED = "idle", "loaded"

MAX_GAP = {IDLE: 1.3, LOADED: 1.5}  #: over the destination's inter-token time
MAX_GAP_GROWTH = 1.1  #: longest context over shortest
MAX_NEIGHBOUR_SLOWDOWN = 1.05

NEIGHBOUR_CONTEXT = 256
NEIGHBOUR_TOKENS = 3000
CLEAR_TIMEOUT_S = 60.0

SHOWN = {
    **{"context": "context", "mode": "mode", "repeats": "n", "destination_itl_ms": "itl", "gap_ms": "gap"},
    **{"gap_max_ms": "max", "ratio": "ratio", "total_ms": "total"},
}
SHOWN_ALSO = {IDLE: {"mebibytes": "MiB"}, LOADED: {"neighbours": "others"}}
TITLE = "ms, medians of n moves; itl: inter-token time at the destination; others: theirs over that before"

Sample = dict[str, Any]


# ---------------------------------------------------------------------- what is run


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run measures."""

    contexts: Sequence[int]
    modes: Sequence[str]
    loads: Sequence[str]
    repeats: int
    recompute_repeats: int
    neighbours: int  #: on each instance
    before_tokens: int
    after_tokens: int
    max_model_len: int
    seed: int

    @property
    def max_tokens(self) -> int:
        """More than a sample needs; it is cancelled when it has that."""
        return self.max_model_len - max(self.contexts)

    def cells(self, repeat: int, rng: random.Random) -> list[tuple[int, str]]:
        """(context, mode) of one repeat, in the order to run them."""
        modes = [m for m in self.modes if m != RECOMPUTE or repeat < self.recompute_repeats]
        cells = [(context, mode) for context in self.contexts for mode in modes]
        rng.shuffle(cells)
        return cells


class Bench:
    """Takes the samples from one server with two instances."""

    def __init__(self, client: Client, plan: Plan) -> None:
        self._client = client
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._neighbours: dict[Call, int] = {}  # and the instance where each decodes

    async def run(self) -> list[Sample]:
        """All samples."""
        for mode in self._plan.modes:  # the first migrations map shared memory and take every path once
            await self._take(IDLE, min(self._plan.contexts), mode)
        samples = []
        for repeat, load in itertools.product(range(self._plan.repeats), self._plan.loads):
            try:
                for context, mode in self._plan.cells(repeat, self._rng):
                    sample = await self._client.undisturbed(partial(self._take, load, context, mode))
                    samples.append({"load": load, "context": context, "mode": mode, "repeat": repeat, **sample})
                    say(describe(samples[-1]))
            finally:
                await self._stop_neighbours()
        return samples

    async def _take(self, load: str, context: int, mode: str) -> Sample:
        await self._prepare(load)
        call = self._start(context, self._plan.max_tokens)
        try:
            return await self._move(call, mode)
        finally:
            await call.cancel()

    async def _move(self, call: Call, mode: str) -> Sample:
        plan, reply = self._plan, call.reply
        if not await call.wait_for_tokens(plan.before_tokens):
            return {"ok": False, "reason": f"ended early: {reply.error}"}
        source = (await self._find(call))["instance"]
        started_s = perf_counter()
        _, answer = await self._client.migrate(reply.request_id, 1 - source, mode)
        ended_s = perf_counter()
        if not answer.get("ok"):
            return {"ok": False, "reason": str(answer.get("migrations", [answer])[0].get("reason", answer))}
        moved = answer["migrations"][0]
        if not await call.wait_for_tokens(moved["num_tokens"] + plan.after_tokens):
            return {"ok": False, "reason": f"ended early: {reply.error}"}
        first = chunk_of_token(reply.chunks, moved["num_tokens"])
        assert first is not None
        # A recomputation works after its hand-over, the others before.
        until_s = reply.chunks[first].time_s if mode == RECOMPUTE else ended_s
        return {
            "ok": True,
            "source": source,
            "ttft_ms": _ms(reply.ttft_s),
            **seen_by_client(reply.chunks, first, started_s),
            "server_gap_ms": (await self._find(call))["paused_ms"],
            "total_ms": _ms(moved["total_s"]),
            "detach_to_commit_ms": _ms(moved["detach_to_commit_s"]),
            "num_bytes": moved["num_bytes"],
            "stages": moved["stages"],
            "neighbours": {
                side: [
                    round(value, 4)
                    for neighbour, place in self._neighbours.items()
                    if place == instance
                    for value in slowdowns(neighbour.reply.chunks, reply.chunks[0].time_s, started_s, until_s)
                ]
                for side, instance in (("source", source), ("destination", 1 - source))
            },
        }

    def _start(self, context: int, max_tokens: int) -> Call:
        prompt = random_prompt(self._rng, context)
        return self._client.start(COMPLETIONS, decode_body(SERVED_NAME, prompt, max_tokens))

    async def _find(self, call: Call) -> dict[str, Any]:
        """The request as the admin API shows it."""
        rows = await self._client.get("/requests")
        found: dict[str, Any] = next(row for row in rows if row["client_id"].startswith(call.reply.request_id))
        return found

    # ------------------------------------------------------------------ neighbours

    async def _prepare(self, load: str) -> None:
        """Wait until the last sample is cleared away; loaded: see that all neighbours decode."""
        if load == LOADED and not (self._neighbours and all(n.is_running for n in self._neighbours)):
            await self._stop_neighbours()
            await self._start_neighbours()
        await self._wait_until_alone()

    async def _start_neighbours(self) -> None:
        calls = [self._start(NEIGHBOUR_CONTEXT, NEIGHBOUR_TOKENS) for _ in range(2 * self._plan.neighbours)]
        self._neighbours = dict.fromkeys(calls, 0)
        for call in calls:
            if not await call.wait_for_tokens(2):
                raise ArrieroError(f"a neighbour ended early: {call.reply.error}")
        places = {call: (await self._find(call))["instance"] for call in calls}
        for call, to in surplus(places, self._plan.neighbours):
            _, answer = await self._client.migrate(call.reply.request_id, to)
            if not answer.get("ok"):
                raise ArrieroError(f"a neighbour could not be moved: {answer}")
            places[call] = to
        self._neighbours = places

    async def _stop_neighbours(self) -> None:
        for call in self._neighbours:
            await call.cancel()
        self._neighbours = {}
        await self._wait_until_alone()

    async def _wait_until_alone(self) -> None:
        """Until nothing but the neighbours is on the server."""
        wanted = len(self._neighbours)
        rows = await poll(lambda: self._client.get("/requests"), lambda rows: len(rows) == wanted, CLEAR_TIMEOUT_S)
        if len(rows) != wanted:
            raise ArrieroError(f"{len(rows)} requests run, {wanted} should: {rows}")


# ---------------------------------------------------------------------- pure parts


def surplus(places: dict[Call, int], quota: int) -> list[tuple[Call, int]]:
    """Which calls must move, and where to, so that each of two instances has ``quota``."""
    by_instance = {i: [c for c, place in places.items() if place == i] for i in (0, 1)}
    return [(call, 1 - i) for i, calls in by_instance.items() for call in calls[quota:]]


def seen_by_client(chunks: Sequence[Chunk], first: int, started_s: float) -> dict[str, float]:
    """The gap before chunk ``first``, the first from the destination, beside the inter-token times of both sides."""
    gap_s = chunks[first].time_s - chunks[first - 1].time_s
    after = intervals(chunks[first:])
    return {
        "source_itl_ms": _ms(median(intervals(chunks, until_s=started_s))),
        "destination_itl_ms": _ms(median(after)),
        "destination_itl_p90_ms": _ms(percentile(after, 90)),  # how noisy the machine was
        "gap_ms": _ms(gap_s),
        "ratio": round(gap_s / median(after), 4),
    }


def slowdowns(chunks: Sequence[Chunk], since_s: float, started_s: float, ended_s: float) -> list[float]:
    """A neighbour's inter-token times in ``(started_s, ended_s]``, each over its median in ``(since_s, started_s]``."""
    before_s = median(intervals(chunks, since_s, started_s))
    if before_s == 0:  # more than half of its tokens came in bursts: the machine was not ours
        return []
    return [interval / before_s for interval in intervals(chunks, started_s, ended_s)]


def summarise(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row for each load, context and mode: medians over the repeats."""
    cells = sorted({(s["load"], s["context"], s["mode"]) for s in samples})
    return [
        {"load": load, "context": context, "mode": mode, **_summary(samples, (load, context, mode))}
        for load, context, mode in cells
    ]


def _summary(samples: Sequence[Sample], cell: tuple[str, int, str]) -> dict[str, Any]:
    all_here = [s for s in samples if (s["load"], s["context"], s["mode"]) == cell]
    good = [s for s in all_here if s["ok"]]
    beside = [value for s in good for side in s["neighbours"].values() for value in side]
    return {
        "repeats": len(good),
        "failed": len(all_here) - len(good),
        "source_itl_ms": median(s["source_itl_ms"] for s in good),
        "destination_itl_ms": median(s["destination_itl_ms"] for s in good),
        "gap_ms": median(s["gap_ms"] for s in good),
        "gap_max_ms": max((s["gap_ms"] for s in good), default=float("nan")),
        "ratio": median(s["ratio"] for s in good),
        "ratio_max": max((s["ratio"] for s in good), default=float("nan")),
        "total_ms": median(s["total_ms"] for s in good),
        "mebibytes": median(s["num_bytes"] / 2**20 for s in good),
        "stages": median(len(s["stages"]) for s in good),
        "neighbours": median(beside),
        "neighbours_mean": sum(beside) / len(beside) if beside else float("nan"),
        "neighbour_tokens": len(beside),
    }


def targets_of(summary: Sequence[dict[str, Any]]) -> list[Target]:
    """What the issue asks of live migrations; only of what was measured."""
    live = {(row["load"], row["context"]): row for row in summary if row["mode"] == LIVE}
    targets = [
        Target.at_most(f"gap over inter-token time, {load}, context {context}", row["ratio"], MAX_GAP[load])
        for (load, context), row in live.items()
    ]
    idle = {context: row["ratio"] for (load, context), row in live.items() if load == IDLE}
    if len(idle) > 1:
        short, long = min(idle), max(idle)
        name = f"gap at {long} over gap at {short}, each over its own inter-token time"
        targets.append(Target.at_most(name, idle[long] / idle[short], MAX_GAP_GROWTH))
    targets += [
        Target.at_most(f"neighbours' inter-token time, context {context}", row["neighbours"], MAX_NEIGHBOUR_SLOWDOWN)
        for (load, context), row in live.items()
        if load == LOADED and row["neighbour_tokens"]
    ]
    return [*targets, Target.at_most("migrations that failed", sum(row["failed"] for row in summary), 0)]


def describe(sample: Sample) -> str:
    """One line of progress."""
    where = f"repeat {sample['repeat']}, {sample['load']}, context {sample['context']}, {sample['mode']}"
    if not sample["ok"]:
        return f"{where}: failed: {sample['reason']}"
    return f"{where}: gap {sample['gap_ms']:.1f} ms = {sample['ratio']:.2f} x {sample['destination_itl_ms']:.1f} ms"


def _ms(seconds: float | None) -> float:
    return round(1e3 * (seconds or 0.0), 3)


def _rounded(value: Any) -> Any:
    return round(value) if isinstance(value, float) and value >= 100 else value


# ---------------------------------------------------------------------- the command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    modes = [m.value for m in MigrationMode]
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 7500])
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--loads", nargs="+", choices=(IDLE, LOADED), default=[IDLE, LOADED])
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--recompute-repeats", type=int, default=3, help="of that mode (default: %(default)s)")
    parser.add_argument("--neighbours", type=int, default=8, help="on each instance (default: %(default)s)")
    parser.add_argument("--before-tokens", type=int, default=40, help="decoded before the move (default: %(default)s)")
    parser.add_argument("--after-tokens", type=int, default=40, help="decoded after it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="migration", help="results/RESULT.json is written (default: %(default)s)")
    add_server_options(parser, port=8110, kv_bytes=1 << 30)
    return parser


async def _run(url: str, plan: Plan) -> list[Sample]:
    async with Client(url) as client:
        return await Bench(client, plan).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 0 whether the targets are met or not."""
    args = _parser().parse_args(argv)
    plan = Plan(**{f.name: getattr(args, f.name) for f in fields(Plan)})
    with arriero_server(args, "migration", instances=2) as server:
        samples = asyncio.run(_run(server.url, plan))
    summary = summarise(samples)
    targets = targets_of(summary)
    report.write(args.result, samples, targets, summary=summary, plan=asdict(plan), command=server.command)
    for load in plan.loads:
        shown = {**SHOWN, **SHOWN_ALSO[load]}
        rows = [{name: _rounded(row[key]) for key, name in shown.items()} for row in summary if row["load"] == load]
        report.print_table(f"{load} ({TITLE})", rows, targets if load == plan.loads[-1] else ())
    return 0


if __name__ == "__main__":
    sys.exit(main())
