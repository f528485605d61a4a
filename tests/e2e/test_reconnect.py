"""A client that asked for it gets its stream back after its connection broke, and not an event twice or too few."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from arriero.sim.tokens import expected_tokens

from .server import AUTHORIZED, VOCAB_SIZE, WAIT_S, Server, completion


@dataclass
class Read:
    """What arrived on one connection."""

    response: httpx.Response
    ids: list[int] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self._lines = self.response.iter_lines()

    @property
    def name(self) -> str:
        return self.response.headers["x-request-id"]

    def read(self, at_most: int = 10**9) -> Read:
        """Some events, or all that are left."""
        for line in self._lines:
            if line.startswith("id: "):
                self.ids.append(int(line.removeprefix("id: ")))
            elif line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                self.events.append(json.loads(line.removeprefix("data: ")))
                if len(self.events) == at_most:
                    break
        return self


@contextlib.contextmanager
def begun(server: Server, grace_s: str = "30", path: str = "/v1/completions", **body: Any) -> Iterator[Read]:
    headers = {**AUTHORIZED, "x-arriero-resume": grace_s}
    body = {**completion(stream=True, max_tokens=300), **body}
    with httpx.stream("POST", server.url + path, json=body, headers=headers, timeout=WAIT_S) as response:
        assert response.status_code == 200, response.read()
        yield Read(response)


@contextlib.contextmanager
def resumed(server: Server, name: str, last: int | None, **headers: str) -> Iterator[Read]:
    sent = {**AUTHORIZED, **headers, **({} if last is None else {"Last-Event-ID": str(last)})}
    with httpx.stream("GET", f"{server.url}/requests/{name}/stream", headers=sent, timeout=WAIT_S) as response:
        yield Read(response)


def tokens(*reads: Read) -> list[int]:
    return [t for read in reads for e in read.events for c in e["choices"] for t in c["token_ids"]]


def assert_whole(*reads: Read, num_tokens: int = 300) -> None:
    """Together they are the stream, every event once and in order."""
    ids = [i for read in reads for i in read.ids]
    assert ids == list(range(1, len(ids) + 1))
    prompt = reads[0].events[0]["choices"][0]["prompt_token_ids"]
    assert tokens(*reads) == expected_tokens(prompt, None, num_tokens, VOCAB_SIZE)
    assert reads[-1].done


def finished(server: Server, name: str) -> list[str]:
    events = server.get("/events", params={"limit": 1000}).json()
    return [e["how"] for e in events if e["event"] == "finish" and f"cmpl-{name}-" in e["request"]]


def test_a_broken_stream_goes_on_behind_the_last_event_that_arrived(strict_server: Server) -> None:
    with begun(strict_server) as first:
        assert first.response.headers["x-arriero-resume"] == "30"
        first.read(at_most=10)
    with resumed(strict_server, first.name, first.ids[-1]) as second:
        assert second.response.headers["content-type"].startswith("text/event-stream")
        second.read(at_most=50)
    with resumed(strict_server, second.events[0]["id"], second.ids[-1]) as third:  # the answer's id does as well
        third.read()
    assert_whole(first, second, third)


def test_it_goes_on_through_a_move(strict_server: Server) -> None:
    with begun(strict_server) as first:
        first.read(at_most=10)
    (request,) = strict_server.requests()
    moved = strict_server.post(f"/requests/cmpl-{first.name}/migrate", {"to": 1 - request["instance"]}).json()
    assert moved["ok"], moved
    with resumed(strict_server, first.name, first.ids[-1]) as second:
        second.read()
    assert_whole(first, second)


def test_a_chat_resumes_too(strict_server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me."}], "prompt": None, "ignore_eos": True}
    with begun(strict_server, path="/v1/chat/completions", **body) as first:
        first.read(at_most=5)
    with resumed(strict_server, first.events[0]["id"], first.ids[-1]) as second:
        second.read()
    assert second.done
    assert first.ids + second.ids == list(range(1, len(first.ids + second.ids) + 1))


def test_the_end_of_a_stream_can_be_fetched_after_the_request_has_ended(strict_server: Server) -> None:
    with begun(strict_server, max_tokens=20) as first:
        first.read(at_most=2)
    strict_server.until(lambda: finished(strict_server, first.name))
    with resumed(strict_server, first.name, first.ids[-1]) as second:
        second.read()
    assert_whole(first, second, num_tokens=20)
    with resumed(strict_server, first.name, None) as again:  # from the beginning
        again.read()
    assert_whole(again, num_tokens=20)
    with resumed(strict_server, first.name, again.ids[-1]) as nothing:
        assert nothing.read().ids == []


def test_a_client_that_never_leaves_sees_an_ordinary_stream_with_ids(strict_server: Server) -> None:
    with begun(strict_server) as only:
        only.read()
    assert_whole(only)


def test_whoever_comes_last_has_the_stream(strict_server: Server) -> None:
    """A server may take long to notice that the first connection is dead."""
    with begun(strict_server) as first:
        first.read(at_most=5)
        rest: list[Read] = []

        def take_over() -> None:
            with resumed(strict_server, first.name, 5) as second:
                rest.append(second.read())

        thread = threading.Thread(target=take_over)
        thread.start()
        first.read()
        thread.join(WAIT_S)
    assert not first.done  # it was cut short
    first.ids, first.events = first.ids[:5], first.events[:5]
    assert_whole(first, *rest)


def test_after_the_grace_the_request_is_aborted_and_the_stream_unknown(strict_server: Server) -> None:
    with begun(strict_server, grace_s="0.2", max_tokens=1500) as first:
        first.read(at_most=2)
    strict_server.until(lambda: finished(strict_server, first.name) == ["aborted"])
    with resumed(strict_server, first.name, 2) as late:
        assert late.response.status_code == 404
        assert "its grace is over" in json.loads(late.response.read())["error"]["message"]


def test_without_the_header_a_client_that_leaves_ends_its_request(strict_server: Server) -> None:
    body = completion(stream=True, max_tokens=1500)
    with httpx.stream("POST", strict_server.url + "/v1/completions", json=body, headers=AUTHORIZED) as response:
        assert "x-arriero-resume" not in response.headers
        assert not next(response.iter_lines()).startswith("id:")
        name = response.headers["x-request-id"]
    strict_server.until(lambda: finished(strict_server, name) == ["aborted"])
    with resumed(strict_server, name, 1) as late:
        assert late.response.status_code == 404


def test_a_client_can_end_its_request_at_once(strict_server: Server) -> None:
    with begun(strict_server, max_tokens=1500) as first:
        first.read(at_most=2)
    path = f"{strict_server.url}/requests/{first.name}/stream"
    assert httpx.delete(path, headers=AUTHORIZED).status_code == 204
    strict_server.until(lambda: finished(strict_server, first.name) == ["aborted"])
    assert httpx.delete(path, headers=AUTHORIZED).status_code == 404


def test_an_answer_that_is_no_stream_is_not_resumable_and_ends_with_its_client(strict_server: Server) -> None:
    headers = {**AUTHORIZED, "x-arriero-resume": "30", "x-request-id": "whole"}
    answer = strict_server.post("/v1/completions", completion(max_tokens=3), headers=headers)
    assert answer.status_code == 200
    assert "x-arriero-resume" not in answer.headers
    with pytest.raises(httpx.ReadTimeout):
        strict_server.post("/v1/completions", completion(max_tokens=1500), headers=headers, timeout=0.5)
    strict_server.until(lambda: "aborted" in finished(strict_server, "whole"))
    refused = strict_server.post("/v1/completions", completion(max_tokens=-1, stream=True), headers=headers)
    assert refused.status_code == 400


def test_the_key_that_began_a_stream_is_wanted_back(strict_server: Server) -> None:
    with begun(strict_server) as first:
        first.read(at_most=2)
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
        with resumed(strict_server, first.name, 2, **headers) as other:
            assert other.response.status_code == 401
    with resumed(strict_server, first.name, 2) as own:
        own.read()
    assert_whole(first, own)


@pytest.mark.parametrize("last", ["-1", "one", "999999", "1.5", "٣", "9" * 30])
def test_an_event_that_cannot_have_arrived_is_refused(strict_server: Server, last: str) -> None:
    with begun(strict_server, max_tokens=10) as first:
        first.read()
    answer = httpx.get(
        f"{strict_server.url}/requests/{first.name}/stream",
        headers=[*AUTHORIZED.items(), ("Last-Event-ID", last.encode())],  # type: ignore[list-item]
    )
    assert answer.status_code == 400
    assert "send the last `id` that arrived" in answer.json()["error"]["message"]


@pytest.mark.parametrize("grace", ["soon", "-1", "nan", "inf", ""])
def test_a_grace_that_is_no_time_is_refused(strict_server: Server, grace: str) -> None:
    headers = {**AUTHORIZED, "x-arriero-resume": grace}
    answer = strict_server.post("/v1/completions", completion(stream=True), headers=headers)
    assert answer.status_code == 400
    assert "send a number of seconds" in answer.json()["error"]["message"]


def test_two_streams_cannot_have_one_name(strict_server: Server) -> None:
    with begun(strict_server) as first:
        first.read(at_most=2)
        headers = {**AUTHORIZED, "x-arriero-resume": "30", "x-request-id": first.name}
        answer = strict_server.post("/v1/completions", completion(stream=True), headers=headers)
        assert answer.status_code == 409
        assert "choose another X-Request-Id" in answer.json()["error"]["message"]
