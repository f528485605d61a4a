"""What arriero costs beside stock vLLM: `make bench-overhead` -> results/overhead.json.

One instance behind `arriero serve` against `vllm serve`, with the same flags, cores and threads. Both are up all
the time; while one is measured, every process of the other is stopped (SIGSTOP). They take turns, in an order that
flips from round to round, and answer the same prompts, so each round gives one ratio in which the machine's drift
cancels out. Both are started anew several times: a start of the pair has differed from another one by 5 %, steadily
in all of its rounds, which more rounds cannot show. The load is closed-loop: as many clients as the
concurrency says, each sends the next request when its last one is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from time import perf_counter
from typing import Any

from arriero.bench import report
from arriero.bench.client import COMPLETIONS, MAX_TRIES, Client, Reply, decode_body, median, percentile, random_prompt
from arriero.bench.report import Target
from arriero.bench.server import (
    SERVED_NAME,
    Server,
    add_server_options,
    arriero_command,
    common_flags,
    ended_by_signals,
    log_file,
    model_of,
    say,
    stock_command,
)
from arriero.core.errors import ArrieroError

ARRIERO, STOCK = "arriero", "vllm"

MIN_THROUGHPUT = 0.98
MAX_TTFT_MS = 1.0  #: more than stock's, at the lowest concurrency

TITLE = "arriero with one instance beside stock vLLM (ms; c: concurrency, n: requests)"
SHOWN = {
    **{
        "concurrency": "c",
        "server": "server",
        "requests": "n",
        "tokens_per_s": "tokens /s",
        "throughput_ratio": "ratio",
    },
    **{"ttft_p50_ms": "ttft p50", "ttft_p99_ms": "ttft p99", "tpot_p50_ms": "tpot p50", "tpot_p99_ms": "tpot p99"},
}

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run measures."""

    concurrencies: Sequence[int]
    starts: int
    rounds: int
    requests_per_client: int
    min_requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int

    def num_requests(self, concurrency: int) -> int:
        """Requests of one turn: whole waves of clients."""
        waves = max(self.requests_per_client, -(-self.min_requests // concurrency))
        return waves * concurrency


def turns(plan: Plan) -> Iterator[tuple[int, int, tuple[str, str]]]:
    """(round, concurrency, servers in the order of their turns)."""
    for number in range(plan.rounds):
        for position, concurrency in enumerate(plan.concurrencies):
            order = (ARRIERO, STOCK) if (number + position) % 2 == 0 else (STOCK, ARRIERO)
            yield number, concurrency, order


# ---------------------------------------------------------------------- measuring


async def measure(url: str, prompts: Sequence[list[int]], concurrency: int, output_tokens: int) -> Sample:
    """Send all prompts with ``concurrency`` clients. Raises ArrieroError if an answer is not whole."""
    waiting = iter(prompts)
    replies: list[Reply] = []

    async def work(client: Client) -> None:
        for prompt in waiting:
            replies.append(await client.send(COMPLETIONS, decode_body(SERVED_NAME, prompt, output_tokens)))

    async with Client(url) as client:
        started_s = perf_counter()
        await asyncio.gather(*[work(client) for _ in range(concurrency)])
        seconds = perf_counter() - started_s
        await asyncio.sleep(0.1)  # the client's watch may be next only after us
        stalled_s = client.stalled_s()
    for reply in replies:
        if reply.num_tokens != output_tokens:
            raise ArrieroError(f"{url}: {reply.num_tokens} of {output_tokens} tokens came: {reply.error}")
    return {
        "machine_stalled_s": stalled_s,
        "tokens_per_s": round(len(replies) * output_tokens / seconds, 3),
        "ttft_ms": [round(1e3 * reply.ttft_s, 3) for reply in replies],
        "tpot_ms": [round(1e3 * reply.tpot_s, 3) for reply in replies],
    }


class Bench:
    """Lets two servers take turns."""

    def __init__(self, servers: Mapping[str, Server], plan: Plan, start: int) -> None:
        self._servers = servers
        self._plan = plan
        self._start = start
        self._rng = random.Random(plan.seed + start)

    def run(self) -> list[Sample]:
        """The samples of one start; every server is paused before and after."""
        for name in self._servers:  # every batch size once, unmeasured
            self._turn(name, self._prompts(max(self._plan.concurrencies)), max(self._plan.concurrencies))
        samples = []
        for number, concurrency, order in turns(self._plan):
            for sample in self._pair(concurrency, order):
                samples.append({"start": self._start, "round": number, "concurrency": concurrency, **sample})
                where = f"start {self._start}, round {number}, concurrency {concurrency}"
                say(f"{where}, {sample['server']}: {sample['tokens_per_s']:.1f} /s")
        return samples

    def _pair(self, concurrency: int, order: Sequence[str]) -> list[Sample]:
        """A turn of each server, taken anew if the machine stood still meanwhile."""
        for _ in range(MAX_TRIES):
            prompts = self._prompts(self._plan.num_requests(concurrency))
            pair = [{"server": name, **self._turn(name, prompts, concurrency)} for name in order]
            if not any(sample["machine_stalled_s"] for sample in pair):
                break
        return pair

    def _turn(self, name: str, prompts: Sequence[list[int]], concurrency: int) -> Sample:
        server = self._servers[name]
        server.resume()
        try:
            asyncio.run(measure(server.url, self._prompts(2), 1, 8))  # memory and caches are its own again
            return asyncio.run(measure(server.url, prompts, concurrency, self._plan.output_tokens))
        finally:
            server.pause()

    def _prompts(self, count: int) -> list[list[int]]:
        return [random_prompt(self._rng, self._plan.prompt_tokens) for _ in range(count)]


# ---------------------------------------------------------------------- pure parts


def ratio(samples: Sequence[Sample], concurrency: int) -> float:
    """Arriero's throughput over stock's: in each start the median over its rounds, then the mean over starts."""
    by_round: dict[tuple[int, int], dict[str, float]] = {}
    for s in samples:
        if s["concurrency"] == concurrency:
            by_round.setdefault((s["start"], s["round"]), {})[s["server"]] = s["tokens_per_s"]
    by_start: dict[int, list[float]] = {}
    for (start, _), pair in by_round.items():
        by_start.setdefault(start, []).append(pair[ARRIERO] / pair[STOCK])
    return fmean(median(ratios) for ratios in by_start.values())


def summarise(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row for each concurrency and server. Latencies are those of all rounds together."""
    rows = []
    for concurrency in sorted({s["concurrency"] for s in samples}):
        for name in (STOCK, ARRIERO):
            here = [s for s in samples if (s["concurrency"], s["server"]) == (concurrency, name)]
            ttft, tpot = ([v for s in here for v in s[key]] for key in ("ttft_ms", "tpot_ms"))
            rows.append(
                {
                    "concurrency": concurrency,
                    "server": name,
                    "requests": len(ttft),
                    "tokens_per_s": median(s["tokens_per_s"] for s in here),
                    "throughput_ratio": ratio(samples, concurrency) if name == ARRIERO else 1.0,
                    "ttft_p50_ms": percentile(ttft, 50),
                    "ttft_p99_ms": percentile(ttft, 99),
                    "tpot_p50_ms": percentile(tpot, 50),
                    "tpot_p99_ms": percentile(tpot, 99),
                }
            )
    return rows


def targets_of(summary: Sequence[dict[str, Any]]) -> list[Target]:
    """What the issue asks."""
    arriero = {row["concurrency"]: row for row in summary if row["server"] == ARRIERO}
    stock = {row["concurrency"]: row for row in summary if row["server"] == STOCK}
    targets = [
        Target.at_least(f"throughput over stock vLLM's, concurrency {c}", row["throughput_ratio"], MIN_THROUGHPUT)
        for c, row in arriero.items()
    ]
    lowest = min(arriero)
    extra_ms = arriero[lowest]["ttft_p50_ms"] - stock[lowest]["ttft_p50_ms"]
    return [*targets, Target.at_most(f"TTFT P50 above stock vLLM's, concurrency {lowest}, ms", extra_ms, MAX_TTFT_MS)]


# ---------------------------------------------------------------------- the command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--concurrencies", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--starts", type=int, default=3, help="of both servers (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="in a start (default: %(default)s)")
    parser.add_argument("--requests-per-client", type=int, default=2, help="in a turn (default: %(default)s)")
    parser.add_argument("--min-requests", type=int, default=16, help="in a turn (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_server_options(parser, port=8120, kv_bytes=1 << 29)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 0 whether the targets are met or not."""
    args = _parser().parse_args(argv)
    plan = Plan(**{f.name: getattr(args, f.name) for f in fields(Plan)})
    model, flags = model_of(args), common_flags(args)
    ports = {ARRIERO: args.port, STOCK: args.port + 1}
    commands = {
        ARRIERO: arriero_command(model, port=ports[ARRIERO], instances=1, flags=flags),
        STOCK: stock_command(model, port=ports[STOCK], flags=flags),
    }
    samples: list[Sample] = []
    described = []
    with ended_by_signals():
        for start in range(plan.starts):
            with contextlib.ExitStack() as stack:
                servers = {}
                for name, command in sorted(commands.items(), reverse=start % 2 == 1):
                    server = Server(
                        command, port=ports[name], log=log_file(f"overhead-{name}"), timeout_s=args.start_timeout
                    )
                    say(f"starting {name}")
                    servers[name] = stack.enter_context(server)
                    server.pause()
                processes = {name: server.describe_processes() for name, server in servers.items()}
                samples += Bench(servers, plan, start).run()
            left = {name: server.shared_memory() for name, server in servers.items()}
            described.append({"processes": processes, "left_in_shared_memory": left})
    summary = summarise(samples)
    targets = targets_of(summary)
    extra = {
        "plan": asdict(plan),
        "commands": commands,
        "starts": described,
    }
    report.write("overhead", samples, targets, summary=summary, **extra)
    report.print_table(TITLE, [{name: row[key] for key, name in SHOWN.items()} for row in summary], targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
