"""What arriero is compared with on real engines: the same model, flags, cores and number of engines for each.

    arriero               `arriero serve` with its default policy
    router-power_of_two   stock vLLM servers behind vllm-router
    router-cache_aware
    vllm-dp               `vllm serve --data-parallel-size N`: vLLM's own balancer

Every engine has one share of the cores, as `arriero serve` deals them out; front ends, routers and the client may run
anywhere. vllm-router has a virtual environment of its own, `make peers`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from arriero.bench.server import Server, arriero_command, log_file, stock_command
from arriero.core.errors import ConfigError
from arriero.launch.placement import split_cores

ARRIERO, VLLM_DP = "arriero", "vllm-dp"
ROUTER = "router-"
SYSTEMS = (ARRIERO, f"{ROUTER}power_of_two", f"{ROUTER}cache_aware", VLLM_DP)

ROUTER_BIN = Path(".cache") / "peers" / "bin" / "vllm-router"
_ENGINE_TITLE = "VLLM::EngineCor"  # of more, the kernel keeps 15 letters


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """How each system is started."""

    model: str
    flags: Sequence[str]  #: common to all of vLLM's servers
    num_engines: int
    port: int  #: of what clients talk to; servers behind a router have the next ones
    start_timeout_s: float
    arriero_flags: Sequence[str] = ()

    def cores(self) -> list[frozenset[int]]:
        """Of each engine."""
        return split_cores(sorted(os.sched_getaffinity(0)), self.num_engines)

    def server(self, name: str, command: Sequence[str], port: int, env: Mapping[str, str] | None = None) -> Server:
        """One server, not started yet."""
        return Server(command, port=port, log=log_file(name), env=env, timeout_s=self.start_timeout_s)


@dataclass(frozen=True, slots=True)
class Running:
    """A system that answers at ``url``; its engines' metrics are at ``metrics_urls``."""

    url: str
    metrics_urls: Sequence[str]
    servers: Sequence[Server] = field(repr=False)

    def total(self, metric: str) -> float:
        """The sum of a counter of vLLM's over all engines."""
        found = 0.0
        for url in self.metrics_urls:
            text = httpx.get(url + "/metrics", timeout=30.0).text
            for family in text_string_to_metric_families(text):
                found += sum(s.value for s in family.samples if s.name == metric)
        return found

    def describe(self) -> list[dict[str, Any]]:
        """Command, cores and threads of each process."""
        return [{"command": s.command, "processes": s.describe_processes()} for s in self.servers]


@contextlib.contextmanager
def arriero(fleet: Fleet, tag: str) -> Iterator[dict[str, Callable[[], contextlib.AbstractContextManager[Running]]]]:
    """`arriero serve`; it pins its engines itself."""
    command = arriero_command(
        fleet.model, port=fleet.port, instances=fleet.num_engines, flags=[*fleet.flags, *fleet.arriero_flags]
    )
    with fleet.server(f"{tag}-arriero", command, fleet.port) as server:
        running = Running(server.url, [server.url], [server])
        yield {ARRIERO: lambda: contextlib.nullcontext(running)}


@contextlib.contextmanager
def vllm_dp(fleet: Fleet, tag: str) -> Iterator[dict[str, Callable[[], contextlib.AbstractContextManager[Running]]]]:
    """One stock server with vLLM's own data parallel balancer."""
    flags = [*fleet.flags, "--data-parallel-size", str(fleet.num_engines)]
    command = stock_command(fleet.model, port=fleet.port, flags=flags)
    env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(_cpu_list(cores) for cores in fleet.cores())}
    with fleet.server(f"{tag}-dp", command, fleet.port, env) as server:
        pin_engines(server, fleet.cores())
        running = Running(server.url, [server.url], [server])
        yield {VLLM_DP: lambda: contextlib.nullcontext(running)}


@contextlib.contextmanager
def routed(fleet: Fleet, tag: str) -> Iterator[dict[str, Callable[[], contextlib.AbstractContextManager[Running]]]]:
    """Stock servers; a router with the policy of the system is started in front of them for each."""
    if not ROUTER_BIN.exists():
        raise ConfigError(f"there is no {ROUTER_BIN}: run `make peers` first, it installs vllm-router")
    with contextlib.ExitStack() as stack:
        servers = []
        for number, cores in enumerate(fleet.cores()):
            port = fleet.port + 1 + number
            command = stock_command(fleet.model, port=port, flags=fleet.flags)
            env = {"VLLM_CPU_OMP_THREADS_BIND": _cpu_list(cores)}
            servers.append(fleet.server(f"{tag}-stock-{number}", command, port, env))
        _start_together(stack, servers)
        for server, cores in zip(servers, fleet.cores(), strict=True):
            pin_engines(server, [cores])
        policies = [name.removeprefix(ROUTER) for name in SYSTEMS if name.startswith(ROUTER)]
        yield {ROUTER + policy: _router(fleet, tag, servers, policy) for policy in policies}


def _router(
    fleet: Fleet, tag: str, servers: Sequence[Server], policy: str
) -> Callable[[], contextlib.AbstractContextManager[Running]]:
    @contextlib.contextmanager
    def run() -> Iterator[Running]:
        urls = [server.url for server in servers]
        command = [str(ROUTER_BIN), "--worker-urls", *urls, "--policy", policy, "--host", "127.0.0.1"]
        command += ["--port", str(fleet.port), "--prometheus-port", str(fleet.port + 1 + len(servers))]
        command += ["--worker-startup-check-interval", "1", "--health-check-interval-secs", "1"]
        with fleet.server(f"{tag}-router-{policy}", command, fleet.port) as router:
            yield Running(router.url, urls, [*servers, router])

    return run


GROUPS: dict[str, tuple[Callable[..., contextlib.AbstractContextManager[Any]], tuple[str, ...]]] = {
    "arriero": (arriero, (ARRIERO,)),
    "routed": (routed, tuple(name for name in SYSTEMS if name.startswith(ROUTER))),
    "dp": (vllm_dp, (VLLM_DP,)),
}
"""Systems that share their engines are started together, one group at a time."""


# ---------------------------------------------------------------------- details


def _cpu_list(cores: frozenset[int]) -> str:
    return ",".join(map(str, sorted(cores)))


def _start_together(stack: contextlib.ExitStack, servers: Sequence[Server]) -> None:
    """Starting one after the other would take as many times as long."""
    for server in servers:
        server.launch()
        stack.callback(server.stop)
    for server in servers:
        server.wait_until_ready()


def pin_engines(server: Server, cores: Sequence[frozenset[int]]) -> None:
    """Put each engine of a stock server, with its workers and all threads, on cores of its own; in order of rank."""
    engines = [p for p in server.processes() if p.name().startswith(_ENGINE_TITLE)]
    engines.sort(key=lambda p: (" ".join(p.cmdline()), p.pid))
    if len(engines) != len(cores):
        raise ConfigError(f"{server.url} has {len(engines)} engine processes, {len(cores)} were expected")
    for engine, share in zip(engines, cores, strict=True):
        for process in [engine, *engine.children(recursive=True)]:
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, share)
