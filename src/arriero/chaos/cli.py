"""`arriero chaos`: a load, scripted faults, and a scoreboard of what became of the streams.

    arriero chaos http://127.0.0.1:8000 --faults kill=5,stop=2 --duration 60      an arriero server
    arriero chaos URL --backends URL URL --script faults.yaml                      any server, its engines by port
    arriero chaos --router 'vllm-router --worker-urls {urls} --port {port}'        a router, before two test servers

Every stream is compared with what the server answered before the first fault. Only this machine is touched.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import aiohttp

from arriero.bench import report
from arriero.bench.client import Client
from arriero.bench.server import Server, say
from arriero.chaos.backends import ArrieroBackends, Backends, FoundBackends, TestServers, is_arriero, require_loopback
from arriero.chaos.load import PATIENCE_S, Load, mixed_cases, plain_cases
from arriero.chaos.run import Result, Run
from arriero.chaos.scoreboard import Verdict, upright
from arriero.chaos.script import MAX_DURATION_S, Script, random_script, read_script
from arriero.chaos.slow_pipe import SlowPipe
from arriero.chaos.token_server import TOKEN_TIME_S
from arriero.core.errors import ArrieroError, ConfigError

ROUTER_TIMEOUT_S = 60.0
NUM_TEST_SERVERS = 2
TITLE = "chaos: what became of the streams"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a run loads its server."""

    seed: int = 0
    concurrency: int = 8
    num_cases: int = 24
    mixed: bool = False
    model: str | None = None
    patience_s: float = PATIENCE_S


@dataclass(frozen=True, slots=True)
class System:
    """What is put to the test."""

    name: str
    client: Client
    backends: Backends


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """See the class."""
        self.exit(2, f"{self.prog}: {message} (see '{self.prog} --help')\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `arriero chaos`."""
    parser = _OneLineParser(
        prog="arriero chaos",
        description="Load a server, hurt what is behind it, and say what became of every stream.",
        epilog="Exit code: 0 if every stream came whole, 1 if not, 2 if the run could not be made.",
    )
    parser.add_argument("url", nargs="?", help="server on this machine: arriero, or any other with OpenAI's API")
    parser.add_argument(
        "--router", metavar="COMMAND", help="start this before test servers; {urls} and {port} are filled in"
    )
    parser.add_argument("--backends", nargs="+", metavar="URL", help="what is behind another server, by URL")
    parser.add_argument("--script", type=Path, metavar="FILE", help="YAML or JSON: faults, each with a moment")
    parser.add_argument(
        "--faults", default="kill=3", metavar="ACTION=N,...", help="so many at random (default: kill=3)"
    )
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of load (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of faults and requests (default: 0)")
    parser.add_argument("--concurrency", type=int, default=8, help="streams at a time (default: 8)")
    parser.add_argument("--cases", type=int, default=24, help="different requests (default: 24)")
    parser.add_argument(
        "--mixed", action="store_true", help="also grammars, logprobs, n > 1, stop strings (vLLM's API)"
    )
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="seconds until a stream hangs (default: 60)")
    parser.add_argument("--model", help="model to ask for (default: the first that the server names)")
    parser.add_argument("--api-key", help="the server's API key, if it wants one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was seen to FILE")
    return parser


def _check(args: argparse.Namespace) -> None:
    if (args.url is None) == (args.router is None):
        raise ConfigError("name either the URL of a server that runs, or a --router to start")
    if args.router is not None and ("{urls}" not in args.router or "{port}" not in args.router):
        raise ConfigError(f"--router {args.router!r} has no place for {{urls}} or {{port}}")
    if not 0 < args.duration <= MAX_DURATION_S:
        raise ConfigError(f"--duration {args.duration} is invalid: it must be in (0, {MAX_DURATION_S:.0f}]")
    for name, most in (("concurrency", 256), ("cases", 1000)):
        if not 1 <= getattr(args, name) <= most:
            raise ConfigError(f"--{name} {getattr(args, name)} is invalid: it must be in [1, {most}]")
    for url in [args.url or "http://127.0.0.1", *(args.backends or [])]:
        require_loopback(url)


# ---------------------------------------------------------------------- systems


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.asynccontextmanager
async def running(
    url: str,
    backends: Sequence[str] | None,
    rng: random.Random,
    *,
    api_key: str | None = None,
    disk: SlowPipe | None = None,
) -> AsyncIterator[System]:
    """A server that runs. Raises ConfigError if nothing behind it is known."""
    async with Client(require_loopback(url), api_key) as client:
        if backends:
            yield System(url, client, FoundBackends(backends))
        elif await is_arriero(client):
            yield System("arriero", client, ArrieroBackends(client, rng, disk))
        else:
            raise ConfigError(f"{url} is no arriero server: name what is behind it with --backends, or use --router")


@contextlib.asynccontextmanager
async def routed(command: str, logs: Path, *, token_time_s: float = TOKEN_TIME_S) -> AsyncIterator[System]:
    """Test servers and a router before them, started here. Raises LaunchError."""
    port, metrics_port, *ports = free_ports(2 + NUM_TEST_SERVERS)
    servers = TestServers(ports, logs=logs, token_time_s=token_time_s)
    try:
        await servers.ready()
        filled = command.format(urls=" ".join(servers.urls), port=port, metrics_port=metrics_port)
        router = Server(
            shlex.split(filled), port=port, log=logs / f"chaos-router-{port}.log", timeout_s=ROUTER_TIMEOUT_S
        )
        router.launch()
        try:
            await asyncio.to_thread(router.wait_until_ready)
            async with Client(router.url) as client:
                yield System(command.split()[0].rpartition("/")[2], client, servers)
        finally:
            await asyncio.to_thread(router.stop)
    finally:
        await servers.close()


async def model_of(client: Client) -> str:
    """The first model that the server names."""
    try:
        return str((await client.get("/v1/models"))["data"][0]["id"])
    except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"the server names no model ({error}): is it up, and does it want --api-key or --model?"
        ) from error


async def carry_out(system: System, script: Script, options: Options, rng: random.Random) -> Result:
    """One run against one system."""
    model = options.model or await model_of(system.client)
    cases = (
        mixed_cases(options.num_cases, options.seed)
        if options.mixed
        else plain_cases(options.num_cases, options.seed, model)
    )
    cases = [replace(case, body={**case.body, "model": model}) for case in cases]
    load = Load(
        system.client, cases, concurrency=options.concurrency, patience_s=options.patience_s, salt=options.mixed
    )
    return await Run(system.client, load, system.backends, rng, say).carry_out(script, system.name)


# ---------------------------------------------------------------------- the command


async def _main(args: argparse.Namespace) -> Result:
    rng = random.Random(args.seed)
    script = (
        read_script(args.script)
        if args.script is not None
        else random_script(args.faults, duration_s=args.duration, rng=rng)
    )
    options = Options(
        seed=args.seed,
        concurrency=args.concurrency,
        num_cases=args.cases,
        mixed=args.mixed,
        model=args.model,
        patience_s=args.patience,
    )
    with tempfile.TemporaryDirectory(prefix="arriero-chaos-") as logs:
        found = (
            routed(args.router, Path(logs))
            if args.router is not None
            else running(args.url, args.backends, rng, api_key=args.api_key)
        )
        async with found as system:
            return await carry_out(system, script, options, rng)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the command; the exit code."""
    args = make_parser().parse_args(argv)
    try:
        _check(args)
        result = asyncio.run(_main(args))
    except ArrieroError as error:
        sys.stderr.write(f"arriero chaos: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    report.print_table(TITLE, upright([result.row()]))
    for verdict, detail in first_details(result):
        print(f"{verdict}: {detail}")
    if args.json is not None:
        args.json.write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    return 0 if all(o.verdict is Verdict.WHOLE for o in result.outcomes) else 1


def first_details(result: Result) -> list[tuple[str, str]]:
    """One example of each way in which streams failed."""
    found = {o.verdict.value: o.detail or "" for o in reversed(result.outcomes) if o.verdict is not Verdict.WHOLE}
    return sorted(found.items())


if __name__ == "__main__":
    sys.exit(main())
