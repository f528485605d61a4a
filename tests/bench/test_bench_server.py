"""Servers as children: started, awaited, paused, and ended whatever they do. The child here is a small HTTP server."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from arriero.bench.server import (
    SHM,
    Server,
    add_server_options,
    arriero_command,
    common_flags,
    ended_by_signals,
    stock_command,
    warn_of_autogroups,
)
from arriero.core.errors import LaunchError

CHILD = """
import http.server, mmap, os, signal, subprocess, sys
port, segment, stubborn = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "stubborn"
if segment:
    file = open(segment, "w+b"); file.truncate(4096); memory = mmap.mmap(file.fileno(), 4096)
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
def stop(*_):
    if not stubborn:
        sleeper.kill(); sleeper.wait()
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
print("ERROR: only a test", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serving(port: int, log: Path, *, segment: str = "", how: str = "obedient") -> Iterator[Server]:
    command = [sys.executable, "-c", CHILD, str(port), segment, how]
    with Server(command, port=port, log=log, timeout_s=30.0) as server:
        yield server


def test_a_server_is_ready_when_it_answers_and_gone_after_the_block(port: int, tmp_path: Path) -> None:
    with serving(port, tmp_path / "log") as server:
        assert server.is_healthy()
        assert server.url == f"http://127.0.0.1:{port}"
        processes = server.processes()
        assert processes[0].pid == server.pid
        assert len(processes) == 2
        assert all(p["cores"] for p in server.describe_processes())
    assert server.exit_code == 0
    assert server.survivors == []
    assert not any(p.is_running() for p in processes)
    assert server.errors_logged() == ["ERROR: only a test"]


def test_a_server_ends_with_an_exception_too(port: int, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), serving(port, tmp_path / "log") as server:
        raise ZeroDivisionError
    assert server.exit_code == 0


def test_what_outlives_its_server_is_killed_and_named(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.bench.server.ORPHAN_TIMEOUT_S", 0.2)
    with serving(port, tmp_path / "log", how="stubborn") as server:
        sleeper = server.processes()[1]
    assert [int(s.split()[0]) for s in server.survivors] == [sleeper.pid]
    psutil.wait_procs([sleeper], timeout=5.0)
    assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE


def test_a_paused_server_does_not_answer_until_it_is_resumed(port: int, tmp_path: Path) -> None:
    with serving(port, tmp_path / "log") as server:
        server.pause()
        assert {p.status() for p in server.processes()} == {psutil.STATUS_STOPPED}
        server.resume()
        assert server.is_healthy()


def test_a_paused_server_can_be_stopped(port: int, tmp_path: Path) -> None:
    with serving(port, tmp_path / "log") as server:
        server.pause()
    assert server.exit_code == 0


def test_a_server_that_ends_at_its_start_shows_its_log(port: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        pytest.raises(LaunchError, match=r"exit code 1(.|\n)*no such model"),
        Server(command, port=port, log=tmp_path / "log"),
    ):
        pass


def test_a_server_that_is_never_ready_is_given_up_and_ended(port: int, tmp_path: Path) -> None:
    server = Server(
        [sys.executable, "-c", "import time; time.sleep(60)"], port=port, log=tmp_path / "log", timeout_s=0.5
    )
    with pytest.raises(LaunchError, match="not ready within"), server:
        pass
    assert server.exit_code == -signal.SIGTERM


def test_a_port_that_answers_already_is_refused(port: int, tmp_path: Path) -> None:
    with serving(port, tmp_path / "log"), pytest.raises(LaunchError, match="answers already"):
        Server(["true"], port=port, log=tmp_path / "other").__enter__()


def test_shared_memory_that_a_server_leaves_is_found(port: int, tmp_path: Path) -> None:
    segment = SHM / f"bench-test-{os.getpid()}"
    try:
        with serving(port, tmp_path / "log", segment=str(segment)) as server:
            ours = SHM / f"arriero-{server.pid}-i0-1"
            ours.touch()
            assert server.shared_memory() == [ours.name], "the other one is in use"
        assert server.shared_memory() == sorted([segment.name, ours.name])
        ours.unlink()
        segment.unlink()
        assert server.shared_memory() == []
    finally:
        segment.unlink(missing_ok=True)


def test_sigterm_unwinds_the_stack() -> None:
    unwound = []

    def work() -> None:
        with ended_by_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving:
        work()
    assert leaving.value.code == 128 + signal.SIGTERM
    assert unwound
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("argv", "fast", "dtype", "kv_bytes"),
    [
        ([], "auto", "auto", 100),
        ([], "float32", "float32", 200),
        (["--dtype", "auto"], "float32", "auto", 100),
        (["--model", "other"], "float32", "auto", 100),
        (["--model", "other", "--dtype", "float32"], "auto", "float32", 200),
    ],
)
def test_the_kv_cache_holds_as_many_tokens_whatever_the_dtype(
    argv: list[str], fast: str, dtype: str, kv_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.bench.server.fast_dtype", lambda: fast)
    parser = argparse.ArgumentParser()
    add_server_options(parser, port=8199, kv_bytes=100)
    flags = common_flags(parser.parse_args(argv))
    assert f"--dtype {dtype} --kv-cache-memory-bytes {kv_bytes} " in " ".join(flags)


def test_both_servers_get_the_same_flags() -> None:
    parser = argparse.ArgumentParser()
    add_server_options(parser, port=8199, kv_bytes=1 << 20)
    args = parser.parse_args(["--max-model-len", "512", "--dtype", "bfloat16"])
    flags = common_flags(args)
    assert "--max-model-len 512 --dtype bfloat16 --kv-cache-memory-bytes 1048576 --block-size 32" in " ".join(flags)
    ours, stock = arriero_command("M", port=1, instances=1, flags=flags), stock_command("M", port=1, flags=flags)
    assert ours[-len(flags) :] == stock[-len(flags) :] == flags


@pytest.mark.parametrize(("setting", "warned"), [("1\n", True), ("0\n", False), (None, False)])
def test_autogroups_are_warned_of(
    setting: str | None, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if setting is not None:
        (tmp_path / "setting").write_text(setting)
    warn_of_autogroups(tmp_path / "setting")
    assert ("kernel.sched_autogroup_enabled=0" in capsys.readouterr().err) is warned
