"""`arriero chaos` as a user runs it: against test servers, and what it refuses to touch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from arriero.bench.server import Server
from arriero.chaos.cli import free_ports, main
from arriero.chaos.token_server import answer_tokens, text_of


@pytest.fixture
def token_server(tmp_path: Path) -> Iterator[Server]:
    """A small server with known tokens."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "arriero.chaos.token_server", "--port", str(port), "--token-time", "0.005"]
    with Server(command, port=port, log=tmp_path / "server.log", timeout_s=60.0) as server:
        yield server


def events_of(response: httpx.Response) -> list[str]:
    """The data of a stream."""
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/v1/completions", {"prompt": "Once"}),
        ("/v1/completions", {"prompt": [5, 6, 7], "seed": 3}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
def test_a_token_server_answers_what_is_known_in_advance_streamed_or_whole(
    token_server: Server, path: str, ask: dict[str, Any]
) -> None:
    body = {"model": "m", "max_tokens": 7, **ask}
    expected = answer_tokens(body)
    whole = httpx.post(token_server.url + path, json=body).json()
    choice = whole["choices"][0]
    assert choice["token_ids"] == expected
    assert choice.get("text", choice.get("message", {}).get("content")) == text_of(expected)
    assert whole["usage"]["completion_tokens"] == 7
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events_of(httpx.post(token_server.url + path, json={**body, **stream}))
    assert [t for c in chunks for t in json.loads(c)["choices"][0]["token_ids"]] == expected
    assert json.loads(usage)["usage"]["completion_tokens"] == 7
    assert done == "[DONE]"


def test_a_token_server_refuses_what_it_cannot_read(token_server: Server) -> None:
    response = httpx.post(
        token_server.url + "/v1/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_stream_whose_server_is_killed_is_seen_as_truncated(token_server: Server, tmp_path: Path) -> None:
    """No router, nothing to save it: the streams under way are cut, and what comes later is refused."""
    seen = tmp_path / "seen.json"
    faults = tmp_path / "faults.json"
    faults.write_text(
        '{"duration_s": 4, "faults": [{"at_tokens": 60, "action": "kill"}, {"at_s": 3, "action": "drain"}]}'
    )
    arguments = [token_server.url, "--backends", token_server.url, "--script", str(faults), "--cases", "6"]
    assert main([*arguments, "--concurrency", "3", "--json", str(seen)]) == 1
    result = json.loads(seen.read_text())
    assert next((f["action"], f["skipped"]) for f in result["faults"]) == ("kill", None)
    verdicts = [s["verdict"] for s in result["streams"]]
    assert verdicts.count("truncated") == 3
    assert "refused" in verdicts
    assert "wrong" not in verdicts


def test_broken_connections_and_a_stopped_server_are_told_apart(tmp_path: Path, token_server: Server) -> None:
    """SIGUSR1 breaks connections; SIGSTOP and SIGCONT only take time."""
    faults = tmp_path / "faults.yaml"
    faults.write_text("{duration_s: 3, faults: [{at_s: 0.5, action: stop, for_s: 0.5}]}")
    seen = tmp_path / "seen.json"
    arguments = [token_server.url, "--backends", token_server.url, "--script", str(faults), "--json", str(seen)]
    assert main([*arguments, "--cases", "4", "--concurrency", "2"]) == 0
    silences = [s["longest_silence_s"] for s in json.loads(seen.read_text())["streams"]]
    assert max(silences) >= 0.4
    url, body = token_server.url + "/v1/completions", {"prompt": "x", "max_tokens": 1000, "stream": True}
    with pytest.raises(httpx.RemoteProtocolError), httpx.stream("POST", url, json=body) as response:  # noqa: PT012
        for _ in response.iter_lines():
            os.kill(token_server.pid, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ([], "name either"),
        (["http://127.0.0.1:1", "--router", "r {urls} {port}"], "name either"),
        (["http://192.0.2.1:8000"], "http://192.0.2.1:8000 is not on this machine"),
        (["http://example.org"], "is not on this machine"),
        (["http://127.0.0.1:1", "--backends", "http://10.0.0.1:1"], "http://10.0.0.1:1 is not on this machine"),
        (["http://127.0.0.1:1", "--duration", "100000"], "--duration 100000"),
        (["http://127.0.0.1:1", "--concurrency", "0"], "--concurrency 0"),
        (["http://127.0.0.1:1", "--faults", "boom=1"], "'boom=1'"),
        (["--router", "some-router"], "has no place for {urls} or {port}"),
        (["http://127.0.0.1:1"], "is no arriero server"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    arguments: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert wrong in error
    assert error.count("\n") == 1


def test_a_router_that_does_not_start_is_said_and_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--router", "false {urls} {port}", "--duration", "1"]) == 2
    assert "exit code 1" in capsys.readouterr().err
    ours = [p for p in psutil.Process().children(recursive=True) if "token_server" in " ".join(p.cmdline())]
    assert ours == []


def test_the_command_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "arriero.cli", "chaos", "--help"], capture_output=True, text=True, check=True
    )
    assert "--router" in done.stdout
