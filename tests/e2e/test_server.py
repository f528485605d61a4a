"""`arriero serve --engine sim` as a user meets it: OpenAI's API over HTTP, the admin endpoints, the commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from arriero.model.bundled import ensure_bundled_model
from arriero.sim.tokens import expected_tokens

from .harness import is_running
from .server import KEY, MODEL, START_S, VOCAB_SIZE, WAIT_S, Server, completion, serving

LEFTOVER = Path("/dev/shm/arriero-4194304-i0-4194304-1")
"""Shared memory of a process that cannot be: process ids are smaller."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server; shared memory of an earlier run lay about when it started."""
    pytest.importorskip("vllm")
    LEFTOVER.write_bytes(b"left by a process that was killed")
    try:
        with serving(tmp_path_factory.mktemp("server") / "log") as started:
            yield started
    finally:
        LEFTOVER.unlink(missing_ok=True)


# ---------------------------------------------------------------------- start


def test_the_start_says_what_it_does_and_reclaims_what_an_earlier_run_left(server: Server) -> None:
    said = server.log.read_text()
    assert f"arriero: reclaimed shared memory {LEFTOVER.name} of an earlier run" in said
    assert not LEFTOVER.exists()
    for line in ("instance 0: ready", "instance 1: ready", f"ready on {server.url}. Try:", "arriero migrate REQUEST"):
        assert line in said


# ---------------------------------------------------------------------- OpenAI's endpoints


def test_a_completion_has_the_tokens_of_the_reference(server: Server) -> None:
    body = server.post("/v1/completions", completion(seed=7)).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["token_ids"] == expected_tokens(choice["prompt_token_ids"], 7, 40, VOCAB_SIZE)
    assert body["usage"]["completion_tokens"] == 40


def test_a_completion_streams(server: Server) -> None:
    events = list(server.stream("/v1/completions", completion()))
    tokens = [token for event in events for token in event["choices"][0]["token_ids"]]
    assert len(events) > 20
    assert tokens == expected_tokens(events[0]["choices"][0]["prompt_token_ids"], None, 40, VOCAB_SIZE)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_chat_streams_what_it_answers_at_once(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me about llamas."}], "max_tokens": 20, "ignore_eos": True}
    whole = server.post("/v1/chat/completions", {"model": MODEL, "seed": 3, **body}).json()["choices"][0]
    assert whole["finish_reason"] == "length"
    events = list(server.stream("/v1/chat/completions", {"seed": 3, **body}))
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == whole["message"]["content"]


def test_several_prompts_and_several_choices(server: Server) -> None:
    body = server.post("/v1/completions", completion(prompt=["One.", "Two."], n=2, max_tokens=10)).json()
    assert [len(c["token_ids"]) for c in body["choices"]] == [10] * 4
    server.assert_clean()


def test_a_client_that_leaves_frees_everything(server: Server) -> None:
    stream = server.stream("/v1/completions", completion(max_tokens=1500))
    next(stream)
    assert server.requests()
    stream.close()
    server.until(lambda: server.requests() == [])
    server.assert_clean()


# ---------------------------------------------------------------------- moving, by the commands


@dataclass
class Client:
    """A stream that is read beside the test."""

    thread: threading.Thread
    events: list[dict[str, Any]]

    @property
    def request_id(self) -> str:
        return str(self.events[0]["id"])

    def assert_exact(self, seed: int | None, num_tokens: int, choice: int = 0) -> None:
        """All tokens of a choice are those of the reference."""
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        choices = [c for event in self.events for c in event["choices"] if c["index"] == choice]
        tokens = [token for c in choices for token in c["token_ids"]]
        assert tokens == expected_tokens(choices[0]["prompt_token_ids"], seed, num_tokens, VOCAB_SIZE)


@contextlib.contextmanager
def client(server: Server, **changes: Any) -> Iterator[Client]:
    """A stream that has begun; it has ended after the block."""
    events: list[dict[str, Any]] = []

    def read() -> None:
        with contextlib.suppress(httpx.TransportError):  # where the server ends first, the test knows
            for event in server.stream("/v1/completions", completion(**changes)):
                events.append(event)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        server.until(lambda: len(events) >= 3)
        yield Client(thread, events)
    finally:
        thread.join(WAIT_S)


def test_a_stream_is_moved_by_the_command_and_nobody_notices(server: Server) -> None:
    with client(server, max_tokens=400, seed=11) as stream:
        (request,) = server.requests()
        there, back = 1 - request["instance"], request["instance"]
        for source, to in ((back, there), (there, back)):
            done = server.command("migrate", stream.request_id, "--to", str(to))
            assert (done.returncode, done.stderr) == (0, "")
            assert f"{source} -> {to} moved in " in done.stdout
        status = json.loads(server.command("status", "--json").stdout)
        assert [(r["instance"], r["moves"]) for r in status["requests"]] == [(back, 2)]
        assert [i["state"] for i in status["instances"]] == ["ready", "ready"]
        shown = server.command("status")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "2 instances" in shown.stdout
        assert "1 request" in shown.stdout
    stream.assert_exact(11, 400)
    server.assert_clean()


def test_all_choices_of_a_request_move_together(server: Server) -> None:
    with client(server, max_tokens=250, n=3) as stream:
        server.until(lambda: len(server.requests()) == 3)
        before = {r["instance"] for r in server.requests()}
        to = 0 if before == {1} else 1
        answer = server.post(f"/requests/{stream.request_id}/migrate", {"to": to}).json()
        assert answer["ok"], answer
        assert {r["destination"] for r in answer["migrations"]} == {to}
        assert {r["instance"] for r in server.requests()} == {to}
    for choice in range(3):
        stream.assert_exact(None, 250, choice)


def test_moves_that_cannot_be_are_refused_in_openais_shape(server: Server) -> None:
    with client(server, max_tokens=200) as stream:
        (request,) = server.requests()
        path = f"/requests/{request['id']}/migrate"
        for where, body, status, says in (
            ("/requests/nobody/migrate", {"to": 1}, 404, "request 'nobody' is not running"),
            (path, {"to": 9}, 404, "instance 9 is unknown"),
            (path, {"to": request["instance"]}, 409, "runs on instance"),
            (path, {"to": -1}, 400, "greater than or equal to 0"),
            (path, {"to": 1, "mode": "teleport"}, 400, "stop_and_copy"),
            (path, {}, 400, "Field required"),
        ):
            answer = server.post(where, body)
            assert answer.status_code == status, answer.text
            assert says in answer.json()["error"]["message"]
            assert answer.json()["error"]["code"] == status
        done = server.command("migrate", "nobody", "--to", "1")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("arriero migrate: request 'nobody' is not running")
        assert len(done.stderr.splitlines()) == 1
    stream.assert_exact(None, 200)


# ---------------------------------------------------------------------- looking


def test_a_request_is_explained_while_it_runs_and_after_its_end(server: Server) -> None:
    with client(server, max_tokens=300, priority=-1) as stream:
        (request,) = server.requests()
        assert request["priority"] == -1
        here = request["instance"]
        assert server.command("migrate", stream.request_id, "--to", str(1 - here)).returncode == 0
        said = server.command("explain", stream.request_id)
        assert (said.returncode, said.stderr) == (0, "")
        assert f"goes to instance {here} (" in said.stdout
        assert f"moved from instance {here} to {1 - here}, live (on demand)" in said.stdout
    stream.assert_exact(None, 300)
    (explained,) = server.get(f"/requests/{stream.request_id}/explain").json()["requests"]
    assert explained["now"] == "ended"
    assert explained["steps"][-1]["what"] == "ended (length) with 300 tokens"
    answer = server.get("/requests/nobody/explain")
    assert answer.status_code == 404
    assert "nothing is known of request 'nobody'" in answer.json()["error"]["message"]


def test_without_the_key_nothing_is_told_and_nothing_moves(server: Server) -> None:
    for path in ("/instances", "/requests", "/requests/any/explain", "/events", "/arriero/check", "/v1/models"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            assert server.get(path, headers=headers).status_code == 401, path
    assert server.post("/requests/any/migrate", {"to": 1}, headers={}).status_code == 401
    assert server.post("/v1/completions", completion(), headers={}).status_code == 401
    done = server.command("status", key="wrong")
    assert done.returncode == 1
    assert "needs an API key" in done.stderr


def test_instances_and_events_show_what_runs_and_what_happened(server: Server) -> None:
    with client(server, max_tokens=100):
        server.until(lambda: sum(i["running"] for i in server.instances()) == 1)
        first, second = server.instances()
    assert {i["id"] for i in (first, second)} == {0, 1}
    assert {i["state"] for i in (first, second)} == {"ready"}
    assert first["pid"] != second["pid"]
    assert first["blocks_used"] + second["blocks_used"] > 0
    events = server.get("/events", params={"limit": 1000}).json()
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    assert {"instance_ready", "dispatch", "finish", "migration"} <= {e["event"] for e in events}
    assert server.get("/events", params={"after": events[-1]["seq"] - 1}).json()[0] == events[-1]


def test_metrics_show_arrieros_beside_vllms(server: Server) -> None:
    lines = server.get("/metrics", headers={}).text.splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    assert values['arriero_migrations_total{outcome="ok",reason=""}'] >= 3
    assert values["arriero_migration_bytes_total"] > 0
    assert values["arriero_migration_downtime_seconds_count"] >= 3
    assert values["arriero_dispatch_seconds_count"] >= 8
    assert any(name.startswith("vllm:generation_tokens_total") for name in values)


# ---------------------------------------------------------------------- ends: the server does not come back


def test_an_instance_is_killed_and_the_stream_goes_on(server: Server) -> None:
    with client(server, max_tokens=200, seed=4) as stream:
        (request,) = server.requests()
        victim = request["instance"]
        os.kill(server.instances()[victim]["pid"], signal.SIGKILL)
        server.until(lambda: server.instances()[victim]["state"] == "dead")
    stream.assert_exact(4, 200)
    done = server.command("status")
    assert (done.returncode, "dead" in done.stdout) == (0, True)
    assert 'arriero_replays_total{outcome="ok"} 1.0' in server.get("/metrics").text
    server.assert_clean()


def test_ctrl_c_ends_everything_in_order(server: Server) -> None:
    """Amid a stream: exit code 0; no process, no shared memory, no socket folder, and the port is free again."""
    with client(server, max_tokens=1500):
        pids = [i["pid"] for i in server.instances() if i["state"] == "ready"]
        assert pids
        assert list(server.folder.glob("arriero-*"))
        server.process.send_signal(signal.SIGINT)
        code = server.process.wait(WAIT_S)
    assert code == 0, server.log.read_text()
    assert not any(is_running(pid) for pid in pids)
    assert list(server.folder.glob("arriero-*")) == []
    assert [p.name for p in Path("/dev/shm").iterdir() if f"arriero-{server.process.pid}-" in p.name] == []
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a moment ago
        bound.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))


# ---------------------------------------------------------------------- wrong arguments


MAIN_IN_FORKS = """
import json, os, sys
import arriero.vllm.server  # takes seconds: once for all
from arriero.cli import main

for number, argv in enumerate(json.load(sys.stdin)):
    if not os.fork():
        output = os.open(f"{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 0
        try:
            main(argv)
        except SystemExit as error:
            code = error.code
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""

REFUSED = {
    "MODEL --no-such-flag": "--no-such-flag",
    "./no-such-model": "model './no-such-model': there is no such file or folder",
    "MODEL --host 127.0.0.1 --port PORT": "choose another --port or stop what uses it",
    "MODEL --instances 0": "--instances 0 is invalid: it must be 1 or more",
    "MODEL --port 0 --kv-cache-memory-bytes 90000000000000": "use fewer --instances or a smaller --kv-cache-memory",
    "MODEL --data-parallel-size 2": "use --instances 2",
    "MODEL --engine sim --port 0 --max-model-len 999999": "max_model_len",
    "MODEL --engine sim --port 0 --dispatch-policy no.such.Policy": "'no.such.Policy' cannot be loaded",
}
"""Arguments of `arriero serve`, and what the one line that comes back says."""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of `arriero serve` in each of the cases."""
    pytest.importorskip("vllm")
    folder, model = tmp_path_factory.mktemp("forks"), str(ensure_bundled_model())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [["serve", *case.replace("MODEL", model).replace("PORT", port).split()] for case in REFUSED]
        command = [sys.executable, "-c", MAIN_IN_FORKS]
        done = subprocess.run(
            command, input=json.dumps(cases), text=True, cwd=folder, stdout=subprocess.PIPE, timeout=START_S, check=True
        )
    codes = [int(line) for line in done.stdout.split()]
    return {case: (codes[i], (folder / f"{i}").read_text()) for i, case in enumerate(REFUSED)}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_exit_code_2_and_one_line(
    refused: dict[str, tuple[int, str]], case: str
) -> None:
    code, output = refused[case]
    assert code == 2, output
    ours = [line for line in output.splitlines() if line.startswith("arriero serve: ")]  # vLLM logs before it, maybe
    assert ours == output.splitlines()[-1:], output
    assert REFUSED[case] in ours[0]
