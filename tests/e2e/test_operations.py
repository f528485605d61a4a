"""Operating a server over HTTP and by the commands: drain, rolling restart, instances that die, and its end.

One server for all tests, in their order; the last one ends it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from arriero.sim.tokens import expected_tokens

from .harness import is_running
from .server import AUTHORIZED, VOCAB_SIZE, WAIT_S, Server, completion, serving

SHUTDOWN_S = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("vllm")
    flags = ("--shutdown-timeout", str(SHUTDOWN_S), "--no-instance-timeout", "20")
    with serving(tmp_path_factory.mktemp("operations") / "log", *flags) as started:
        yield started


@dataclass
class Client:
    """A stream that is read on a thread of its own, with all that it was sent."""

    server: Server
    max_tokens: int
    seed: int | None
    n: int = 1
    events: list[dict[str, Any]] = field(default_factory=list)
    status: int | None = None
    done: bool = False
    thread: threading.Thread = field(default_factory=threading.Thread)

    def start(self) -> Client:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        return self

    def _read(self) -> None:
        body = {**completion(max_tokens=self.max_tokens, seed=self.seed, n=self.n), "stream": True}
        url = f"{self.server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=AUTHORIZED, timeout=WAIT_S) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                self.done |= line == "data: [DONE]"

    def begun(self) -> Client:
        self.server.until(lambda: len(self.events) >= 3)
        return self

    def tokens(self, choice: int = 0) -> list[int]:
        choices = [c for e in self.events for c in e.get("choices", ()) if c["index"] == choice]
        return [t for c in choices for t in c["token_ids"]]

    @property
    def error(self) -> dict[str, Any] | None:
        return next((e["error"] for e in self.events if "error" in e), None)

    def assert_whole(self) -> None:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        assert (self.status, self.error) == (200, None)
        prompt = self.events[0]["choices"][0]["prompt_token_ids"]
        for choice in range(self.n):
            assert self.tokens(choice) == expected_tokens(prompt, self.seed, self.max_tokens, VOCAB_SIZE)


def clients(server: Server, num: int, max_tokens: int) -> list[Client]:
    started = [Client(server, max_tokens, None if i % 2 else i, n=1 + i % 2).start() for i in range(num)]
    return [client.begun() for client in started]


def ready(server: Server) -> list[int]:
    return [i["id"] for i in server.instances() if i["state"] == "ready"]


def test_restart_replaces_all_instances_under_load_with_new_flags_and_no_stream_notices(server: Server) -> None:
    streams = clients(server, 4, 500)
    done = server.command("restart", "--rolling", "--max-surge", "1", "--", "--max-num-seqs", "32")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:2] == ["instance 0 -> 2", "instance 1 -> 3"]
    assert "2 instances replaced in " in done.stdout
    assert ready(server) == [2, 3]
    shown = server.command("status").stdout
    assert "drained" in shown
    assert "replaces 0" in shown
    for stream in streams:
        stream.assert_whole()
    server.assert_clean()


def test_flags_that_are_the_front_ends_and_nonsense_are_refused_and_nothing_is_touched(server: Server) -> None:
    for flags, says in (
        (["--port", "1"], "--port: the front end depends on it too"),
        (["--max-model-len", "64"], "--max-model-len: the front end depends on it too"),
        (["--instances", "5"], "--instances: the front end"),
        (["--no-such-flag"], "no-such-flag"),
        (["--max-num-seqs", "-4"], "validation error"),
    ):
        done = server.command("restart", "--rolling", "--", *flags)
        assert (done.returncode, done.stdout) == (1, ""), flags
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert ready(server) == [2, 3]


def test_drain_and_restart_say_what_is_wrong(server: Server) -> None:
    for arguments, code, says in (
        (("drain", "77"), 1, "arriero drain: instance 77 is unknown"),
        (("drain", "0"), 1, "arriero drain: instance 0 is dead: only one that is ready can be drained"),
        (("restart",), 2, "name the instances, or use --rolling"),
        (("restart", "0"), 1, "arriero restart: instance 0 is dead: it cannot be restarted now"),
        (("restart", "77"), 1, "arriero restart: instance 77 is unknown"),
        (("drain", "2", "--", "--flag"), 2, "drain takes no flags after --"),
    ):
        done = server.command(*arguments)
        assert done.returncode == code, done
        assert says in done.stderr
    for path, body in (
        ("/instances/2/drain", {"force": "maybe"}),
        ("/restart", {"max_surge": -1}),
        ("/restart", {"x": 1}),
    ):
        assert server.post(path, body).status_code == 400
    assert server.post("/restart", {}, headers={}).status_code == 401
    assert server.post("/instances/2/drain", {}, headers={}).status_code == 401
    assert ready(server) == [2, 3]


def test_a_killed_instance_is_replaced_while_its_streams_go_on(server: Server) -> None:
    streams = clients(server, 4, 300)
    victim = server.requests()[0]["instance"]
    os.kill(next(i["pid"] for i in server.instances() if i["id"] == victim), signal.SIGKILL)
    server.until(lambda: any(i["replaces"] == victim and i["state"] == "ready" for i in server.instances()))
    for stream in streams:
        stream.assert_whole()
    server.assert_clean()


def test_drain_empties_an_instance_and_the_last_one_only_by_force(server: Server) -> None:
    first, last = ready(server)
    streams = clients(server, 4, 400)
    done = server.command("drain", str(first))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"instance {first} ended after " in done.stdout
    refused = server.command("drain", str(last))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"instance {last} is the last one that takes requests" in refused.stderr
    for stream in streams:
        stream.assert_whole()
    assert ready(server) == [last]
    assert "arriero_drain_seconds_count" in server.get("/metrics").text


def test_a_request_that_finds_no_instance_waits_for_one(server: Server) -> None:
    (last,) = ready(server)
    os.kill(next(i["pid"] for i in server.instances() if i["id"] == last), signal.SIGKILL)
    server.until(lambda: ready(server) != [last])
    stream = Client(server, 30, 5).start()
    stream.assert_whole()


def test_sigterm_lets_requests_finish_for_a_while_then_cuts_them_and_says_so(server: Server) -> None:
    """No process, no shared memory and no folder is left."""
    short, endless = Client(server, 150, 1).start().begun(), Client(server, 2000, 2).start().begun()
    pids = [i["pid"] for i in server.instances() if i["state"] == "ready"]
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: "may finish within" in server.log.read_text())
    late = Client(server, 10, 3).start()
    late.thread.join(WAIT_S)
    assert late.status in (None, 503), "it takes no more requests"
    short.assert_whole()
    endless.thread.join(WAIT_S)
    assert 3 < len(endless.tokens()) < 2000
    assert endless.error is not None
    assert endless.error["code"] == 500
    assert server.process.wait(WAIT_S) == 0, server.log.read_text()
    said = server.log.read_text()
    assert "ending: 1 request(s) were cut" in said
    assert "the server ends: cut after" in said
    assert not any(is_running(pid) for pid in pids)
    assert list(server.folder.glob("arriero-*")) == []
