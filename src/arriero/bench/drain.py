"""Draining and rolling restarts under load: `make bench-drain` -> results/drain.json.

*Drain*: all requests run on one instance of two, each with so many tokens to go; the time from ``POST
/instances/{id}/drain`` until the instance is empty (and until its process is gone) must not depend on how many. Then
the instance is started again, for the next length.

*Rolling restart*: streams run one after the other all the time, and ``POST /restart`` replaces every instance. None of
them may fail, and the longest gap between two tokens is noted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from arriero.bench import report
from arriero.bench.client import (
    COMPLETIONS,
    Call,
    Client,
    Reply,
    decode_body,
    intervals,
    percentile,
    poll,
    random_prompt,
)
from arriero.bench.report import Target
from arriero.bench.server import SERVED_NAME, add_server_options, arriero_server, say

MIN_TOKENS = 5
"""Each stream shows so many before the drain begins, and so many more after it."""

START_TIMEOUT_S = 300.0


# ---------------------------------------------------------------------- pure parts


def targets_of(drains: Sequence[dict[str, Any]], rollouts: Sequence[dict[str, Any]]) -> list[Target]:
    """The claims, for each engine that was measured."""
    targets = []
    for engine in dict.fromkeys(sample["engine"] for sample in (*drains, *rollouts)):
        mine = [d for d in drains if d["engine"] == engine]
        lengths = sorted({d["to_go"] for d in mine})
        by_length = {n: percentile([d["emptied_s"] for d in mine if d["to_go"] == n], 50) for n in lengths}
        if mine:
            targets.append(Target.at_most(f"{engine}: drain, slowest", max(d["total_s"] for d in mine), 5.0, "s"))
            ratio = by_length[lengths[-1]] / by_length[lengths[0]]
            name = f"{engine}: time to empty, {lengths[-1]} tokens to go over {lengths[0]}"
            targets.append(Target.at_most(name, ratio, 1.5))
        failed = sum(s["failed"] for s in (*drains, *rollouts) if s["engine"] == engine)
        targets.append(Target.at_most(f"{engine}: failed requests", failed, 0))
    return targets


def row_of(sample: dict[str, Any]) -> dict[str, Any]:
    """One sample's line in the table."""
    shown = (
        "engine",
        "what",
        "to_go",
        "requests",
        "emptied_s",
        "total_s",
        "recomputed",
        "itl_ms",
        "max_gap_ms",
        "failed",
    )
    return {key: sample.get(key) for key in shown}


def gaps_of(reply: Reply) -> list[float]:
    """Seconds between two chunks."""
    return intervals(reply.chunks)


# ---------------------------------------------------------------------- running


@dataclass(slots=True)
class Bench:
    """One server that is up."""

    client: Client
    engine: str
    args: argparse.Namespace
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    async def drain(self, to_go: int) -> dict[str, Any]:
        """One drain of an instance that runs everything."""
        victim = (await self._ready())[0]
        calls = [self._start(to_go + 2 * MIN_TOKENS) for _ in range(self.args.requests)]
        await asyncio.gather(*[c.wait_for_tokens(1) for c in calls])
        await self._gather_at(victim)
        await asyncio.gather(*[c.wait_for_tokens(MIN_TOKENS) for c in calls])
        _, answer = await self.client.post(f"/instances/{victim}/drain", {})
        drained_s = perf_counter()
        shown = [c.reply.num_tokens for c in calls]
        alive = await asyncio.gather(*[c.wait_for_tokens(n + MIN_TOKENS) for c, n in zip(calls, shown, strict=True)])
        gaps = [gap for c in calls for gap in gaps_of(c.reply)]
        for call in calls:
            await call.cancel()
        events = (await self.client.get("/events", limit=1000))[-1000:]
        moves = [e for e in events if e["event"] == "migration" and e["source"] == victim]
        sample = {
            "engine": self.engine,
            "what": "drain",
            "to_go": to_go,
            "requests": self.args.requests,
            "emptied_s": answer.get("emptied_s"),
            "total_s": answer.get("total_s"),
            "recomputed": sum(m["ok"] and m["mode"] == "recompute" for m in moves),
            "moves_given_up": sum(not m["ok"] for m in moves),
            "itl_ms": 1e3 * percentile(gaps, 50),
            "max_gap_ms": 1e3 * max(gaps, default=0.0),
            "went_on_after_s": perf_counter() - drained_s,
            "failed": sum(not ok for ok in alive) + (not answer.get("ok", False)),
        }
        await self._revive(victim)
        return sample

    async def roll(self) -> dict[str, Any]:
        """Replace all instances while streams run."""
        done: list[Reply] = []
        stop = asyncio.Event()

        async def stream() -> None:
            while not stop.is_set():
                done.append(await self._start(self.args.stream_tokens).finish())

        streams = [asyncio.create_task(stream()) for _ in range(self.args.streams)]
        await asyncio.sleep(1.0)
        _, answer = await self.client.post("/restart", {"max_surge": self.args.max_surge})
        stop.set()
        await asyncio.gather(*streams)
        gaps = [gap for reply in done for gap in gaps_of(reply)]
        whole = [r for r in done if r.is_complete and r.error is None and r.num_tokens == self.args.stream_tokens]
        return {
            "engine": self.engine,
            "what": "rolling restart",
            "to_go": self.args.stream_tokens,
            "requests": len(done),
            "instances": len(answer.get("replaced", {})),
            "total_s": answer.get("total_s"),
            "drain_s": answer.get("drain_s"),
            "itl_ms": 1e3 * percentile(gaps, 50),
            "max_gap_ms": 1e3 * max(gaps, default=0.0),
            "errors": sorted({r.error for r in done if r.error})[:5],
            "failed": len(done) - len(whole) + (not answer.get("ok", False)),
        }

    def _start(self, num_tokens: int) -> Call:
        prompt = random_prompt(self.rng, self.args.prompt_tokens)
        return self.client.start(COMPLETIONS, decode_body(SERVED_NAME, prompt, num_tokens))

    async def _ready(self) -> list[int]:
        return [i["id"] for i in await self.client.get("/instances") if i["state"] == "ready"]

    async def _gather_at(self, victim: int) -> None:
        """Have everything run on one instance."""

        async def elsewhere() -> list[dict[str, Any]]:
            rows = [r for r in await self.client.get("/requests") if r["instance"] != victim]
            await asyncio.gather(*[self.client.migrate(r["id"], victim) for r in rows])
            return rows

        await poll(elsewhere, lambda rows: not rows, START_TIMEOUT_S)

    async def _revive(self, drained: int) -> None:
        await poll(lambda: self.client.get("/requests"), lambda rows: not rows, START_TIMEOUT_S)
        _, answer = await self.client.post("/restart", {"instances": [drained]})
        if not answer.get("ok"):
            raise RuntimeError(f"instance {drained} was not started again: {answer}")


async def measure(url: str, engine: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All samples of one engine."""
    samples = []
    async with Client(url) as client:
        bench = Bench(client, engine, args)
        for repeat in range(args.repeats):
            for to_go in args.to_go if repeat % 2 == 0 else reversed(args.to_go):
                samples.append(await bench.drain(to_go))
                say(f"{engine}: {to_go} tokens to go: {samples[-1]}")
        samples.append(await bench.roll())
        say(f"{engine}: {samples[-1]}")
    return samples


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m arriero.bench.drain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=("sim", "vllm"), default=["sim", "vllm"])
    parser.add_argument("--requests", type=int, default=32, help="on the instance that is drained (default: 32)")
    parser.add_argument(
        "--to-go", type=int, nargs="+", default=[250, 1000, 2000], help="tokens (default: 250 1000 2000)"
    )
    parser.add_argument("--repeats", type=int, default=2, help="(default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--streams", type=int, default=8, help="during the rolling restart (default: 8)")
    parser.add_argument("--stream-tokens", type=int, default=100, help="of each of them (default: 100)")
    parser.add_argument("--max-surge", type=int, default=1, help="of the rolling restart (default: 1)")
    add_server_options(parser, port=8140, kv_bytes=512 << 20)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0 if it was measured, whether targets are met or not."""
    args = _parser().parse_args(argv)
    samples: list[dict[str, Any]] = []
    for engine in args.engines:
        flags = ["--engine", engine]
        with arriero_server(args, f"drain-{engine}", instances=2, flags=flags) as server:
            samples += asyncio.run(measure(server.url, engine, args))
    drains = [s for s in samples if s["what"] == "drain"]
    targets = targets_of(drains, [s for s in samples if s["what"] != "drain"])
    report.write("drain", samples, targets)
    report.print_table("drain and rolling restart", [row_of(s) for s in samples], targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
