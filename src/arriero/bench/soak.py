"""Every kind of request, all moved all the time: `make soak` -> results/soak.json.

The same requests run three times on one server in float32: one by one, then together, both without a move (the
references), then together while every running request is moved four times a second, over and over. Every moved
stream must be whole and say what its reference says; at the end nothing may be left anywhere.

A request whose two references differ depends on what else is in its batch; it proves nothing and is counted apart.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from arriero.bench import report
from arriero.bench.client import Client, Reply, poll
from arriero.bench.report import Target
from arriero.bench.server import add_server_options, arriero_server, say
from arriero.bench.soak_requests import Case, difference, fault, make_cases
from arriero.core.types import MigrationMode

IDLE_TIMEOUT_S = 15.0
MIN_MIGRATIONS = 100
TITLE = "soak: all requests moved all the time"

# ---------------------------------------------------------------------- pure parts


def leaks_in(check: dict[str, Any]) -> list[str]:
    """What ``GET /arriero/check`` shows to be held by an idle server."""
    leaks = [f"{check['requests']} requests"] if check["requests"] else []
    leaks += [f"migration {m}" for m in check["migrations"]]
    for instance, books in check["instances"].items():
        for book in ("requests", "frozen", "parked", "reserved", "open"):
            leaks += [f"instance {instance}: {book} {entry}" for entry in books[book]]
        if missing := books["num_blocks"] - books["free_blocks"]:
            leaks.append(f"instance {instance}: {missing} blocks")
    return leaks


def reason_of(text: str) -> str:
    """A refusal without its names and numbers, to count by."""
    text = re.sub(r"request '?\S+", "request ...", text)
    return re.sub(r"\d+", "N", text)


# ---------------------------------------------------------------------- running


@dataclass(slots=True)
class Mover:
    """Moves every running request to the next instance, again and again."""

    client: Client
    interval_s: float
    modes: Sequence[str]
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    moves: Counter[str] = field(default_factory=Counter)  #: of each request, by the client's id
    moved_bytes: int = 0
    _open: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            started_s = perf_counter()
            ready = [i["id"] for i in await self.client.get("/instances") if i["state"] == "ready"]
            for row in await self.client.get("/requests"):
                if row["state"] != "moving" and row["id"] not in self._open:
                    to = ready[(ready.index(row["instance"]) + 1) % len(ready)]
                    self._open[row["id"]] = asyncio.create_task(self._move(row, to))
            await asyncio.sleep(max(0.0, self.interval_s - (perf_counter() - started_s)))

    async def settle(self) -> None:
        """Wait for the moves that are under way."""
        await asyncio.gather(*self._open.values())

    async def _move(self, row: dict[str, Any], to: int) -> None:
        _, answer = await self.client.migrate(row["id"], to, self.rng.choice(list(self.modes)))
        if answer.get("ok"):
            self.outcomes["moved"] += 1
            self.moves[row["client_id"]] += 1
            self.moved_bytes += answer["migrations"][0]["num_bytes"]
        else:
            why = answer["migrations"][0]["reason"] if "migrations" in answer else answer["error"]["message"]
            self.outcomes[reason_of(why)] += 1
        del self._open[row["id"]]


class Soak:
    """The runs on a server that is up: unmoved, and moved."""

    def __init__(self, client: Client, cases: Sequence[Case], mover: Mover) -> None:
        self._client = client
        self._cases = cases
        self._mover = mover
        self._serial = itertools.count()

    async def references(self, concurrency: int) -> list[Reply]:
        """Each case once, unmoved."""
        replies: dict[int, Reply] = {}

        async def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                case = self._cases[number]
                replies[number] = await self._client.send(case.path, case.body)

        numbers = iter(range(len(self._cases)))
        await asyncio.gather(*[work(numbers) for _ in range(concurrency)])
        return [replies[number] for number in range(len(self._cases))]

    async def moved(self, references: Sequence[Reply], seconds: float, concurrency: int) -> list[dict[str, Any]]:
        """All cases, over and over for ``seconds``, while the mover runs; one record an answer."""
        deadline = perf_counter() + seconds - self._client.stalled_s()
        records: list[dict[str, Any]] = []
        numbers = itertools.cycle(range(len(self._cases)))

        async def work() -> None:
            while perf_counter() < deadline + self._client.stalled_s():
                number = next(numbers)
                records.append(await self._one(number, references[number]))

        moving = asyncio.create_task(self._mover.run())
        try:
            await asyncio.gather(*[work() for _ in range(concurrency)])
        finally:
            moving.cancel()
            await asyncio.wait([moving])
        await self._mover.settle()
        if not moving.cancelled() and (error := moving.exception()) is not None:
            raise error
        for record in records:
            record["moves"] = sum(n for name, n in self._mover.moves.items() if record["id"] in name)
        return records

    async def _one(self, number: int, reference: Reply) -> dict[str, Any]:
        case, serial = self._cases[number], next(self._serial)
        name = f"soak{serial}x"
        # The references have left their prompts in the prefix caches: every second answer may not use them.
        salt = {"cache_salt": name} if serial % 2 else {}
        call = self._client.start(case.path, {**case.body, **salt}, request_id=name)
        if case.hang_up_after is None:
            await call.finish()
        elif case.body["stream"]:
            await call.wait_for_tokens(case.hang_up_after)
        else:
            await asyncio.sleep(0.02 * case.hang_up_after)
        is_cut = call.is_running
        await call.cancel()
        return {
            "id": name,
            "case": number,
            "kind": case.kind,
            "stream": case.body["stream"],
            "num_tokens": call.reply.num_tokens,
            "is_cut": is_cut,
            "fault": call.reply.error if is_cut else fault(case, call.reply),
            "difference": difference(call.reply, reference, is_cut=is_cut),
        }

    async def leaks(self) -> list[str]:
        """What an idle server still holds."""

        async def probe() -> list[str]:
            return leaks_in(await self._client.get("/arriero/check"))

        return await poll(probe, lambda found: not found, timeout_s=IDLE_TIMEOUT_S)


async def soak(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """References, the moved run, and the books afterwards."""
    cases = make_cases(args.cases, args.seed)
    async with Client(url) as client:
        mover = Mover(client, args.interval, args.modes, random.Random(args.seed))
        run = Soak(client, cases, mover)
        say(f"references: {len(cases)} requests one by one")
        alone = await run.references(1)
        say(f"references: {args.concurrency} at a time")
        together = await run.references(args.concurrency)
        say(f"moving every running request every {1e3 * args.interval:.0f} ms for {args.seconds:.0f} s")
        samples = await run.moved(alone, args.seconds, args.concurrency)
        leaks, stalled_s = await run.leaks(), client.stalled_s()
    references = [
        {
            "case": number,
            "kind": case.kind,
            "fault": fault(case, alone[number]) or fault(case, together[number]),
            "disagreement": difference(together[number], alone[number]),
        }
        for number, case in enumerate(cases)
    ]
    outcomes = dict(mover.outcomes.most_common())
    return {
        "samples": samples,
        "references": references,
        "outcomes": outcomes,
        "moved_bytes": mover.moved_bytes,
        "leaks": leaks,
        "machine_stalled_s": stalled_s,
    }


def summarise(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each kind of request."""
    disagree = {r["case"] for r in found["references"] if r["disagreement"] or r["fault"]}
    rows = []
    for kind in sorted({s["kind"] for s in found["samples"]}):
        here = [s for s in found["samples"] if s["kind"] == kind]
        whole, sound = [s for s in here if not s["is_cut"]], [s for s in here if s["case"] not in disagree]
        rows.append(
            {
                "kind": kind,
                "sent": len(here),
                "cut": len(here) - len(whole),
                "whole": sum(s["fault"] is None for s in whole),
                "compared": len(sound),
                "equal": sum(s["difference"] is None for s in sound),
                "reference_disagrees": len(here) - len(sound),
                "moves": sum(s["moves"] for s in here),
            }
        )
    return rows


def targets_of(summary: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[Target]:
    """What the issue asks."""
    total = Counter[str]()
    for row in summary:
        total.update({key: value for key, value in row.items() if key != "kind"})
    expected = total["sent"] - total["cut"]
    return [
        Target.at_least("streams that came whole, %", percent(total["whole"], expected), 100.0),
        Target.at_least(
            "streams equal to their unmoved reference, %", percent(total["equal"], total["compared"]), 100.0
        ),
        Target.at_most("blocks, routes, reservations, files and processes left", len(found["leaks"]), 0),
        Target.at_least("migrations", found["outcomes"].get("moved", 0), MIN_MIGRATIONS),
    ]


def percent(part: int, whole: int) -> float:
    """0 of 0 proves nothing: 0 %."""
    return 100.0 * part / whole if whole else 0.0


# ---------------------------------------------------------------------- the command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="of the moved run (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=0.25, help="s between moves (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--cases", type=int, default=44, help="different requests (default: %(default)s)")
    parser.add_argument("--instances", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=[m.value for m in MigrationMode], default=["live"])
    parser.add_argument("--seed", type=int, default=0)
    add_server_options(parser, port=8130, kv_bytes=1 << 29)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run and write; 0 whether the targets are met or not."""
    args = _parser().parse_args(argv)
    with arriero_server(args, "soak", instances=args.instances, flags=["--dtype", "float32"]) as server:
        found = asyncio.run(soak(server.url, args))
    found["leaks"] += [f"shared memory {name}" for name in server.shared_memory()]
    found["leaks"] += [f"process {name}" for name in server.survivors]
    summary = summarise(found)
    targets = targets_of(summary, found)
    extra = {"exit_code": server.exit_code, "errors_logged": server.errors_logged()[:50], "command": server.command}
    report.write("soak", found.pop("samples"), targets, summary=summary, **found, **extra)
    report.print_table(TITLE, summary, targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
