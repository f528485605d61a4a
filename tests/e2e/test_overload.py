"""More requests than may wait: the next one is refused at once, and those before it never notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from .server import AUTHORIZED, WAIT_S, Server, completion

PLACES = 14
"""4 that run and 3 that wait, at each of two instances."""


@contextlib.contextmanager
def streams(server: Server, number: int) -> Iterator[list[httpx.Response]]:
    """Clients that wait for long answers."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=WAIT_S, headers=AUTHORIZED, limits=httpx.Limits()))
        body = completion(stream=True, max_tokens=1500)
        yield [
            stack.enter_context(client.stream("POST", server.url + "/v1/completions", json=body)) for _ in range(number)
        ]


def load(server: Server) -> tuple[int, int]:
    """Requests that run, and that wait, at an instance or for one."""
    states = [r["state"] for r in server.requests()]
    return states.count("running"), states.count("waiting") + states.count("queued")


def assert_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 429, answer.text
    error = answer.json()["error"]
    assert error["code"] == 429
    assert "6 requests wait already, 6 may" in error["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": "One more"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "One more"}]}),
    ],
)
def test_the_request_that_is_one_too_many_is_refused_before_its_stream_begins(
    strict_server: Server, path: str, prompt: dict[str, Any]
) -> None:
    with streams(strict_server, PLACES) as accepted:
        assert [s.status_code for s in accepted] == [200] * PLACES
        strict_server.until(lambda: load(strict_server) == (8, 6))
        body = {"model": completion()["model"], "max_tokens": 5, **prompt}
        assert_refused(strict_server.post(path, body))
        assert_refused(strict_server.post(path, {**body, "stream": True}))
        assert load(strict_server) == (8, 6)
    strict_server.until(lambda: strict_server.requests() == [])
    strict_server.until(lambda: strict_server.post(path, body).status_code == 200)


def test_a_place_that_comes_free_is_taken_by_one_that_waits(strict_server: Server) -> None:
    with streams(strict_server, PLACES - 1) as accepted:
        strict_server.until(lambda: load(strict_server) == (8, 5))
        with streams(strict_server, 1):
            strict_server.until(lambda: load(strict_server) == (8, 6))
            accepted[0].close()
            strict_server.until(lambda: load(strict_server) == (8, 5))
            with streams(strict_server, 1) as (late,):
                assert late.status_code == 200


def test_the_answer_says_where_the_request_runs(strict_server: Server) -> None:
    whole = strict_server.post("/v1/completions", completion(max_tokens=3))
    assert whole.headers["x-arriero-instance"] in ("0", "1")
    with streams(strict_server, 3) as accepted:
        told = {s.headers["x-request-id"]: s.headers["x-arriero-instance"] for s in accepted}
        strict_server.until(lambda: len(strict_server.requests()) == 3)
        shown = {r["client_id"]: str(r["instance"]) for r in strict_server.requests()}
        assert {f"cmpl-{name}-0": instance for name, instance in told.items()} == shown


@pytest.mark.parametrize("header", ["x-request-id", "x-correlation-id", "request-id"])
def test_a_client_names_its_own_request(strict_server: Server, header: str) -> None:
    headers = {**AUTHORIZED, header: "my own/name"}
    answer = strict_server.post("/v1/completions", completion(max_tokens=3), headers=headers)
    assert answer.headers["x-request-id"] == "my own/name"
    assert answer.json()["id"] == "cmpl-my own/name"


def test_an_answer_names_a_request_that_has_no_name(strict_server: Server) -> None:
    answer = strict_server.post("/v1/completions", completion(max_tokens=3))
    assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"
    refused = strict_server.get("/instances", headers={})
    assert refused.status_code == 401
    assert refused.headers["x-request-id"]


def test_a_name_without_end_is_refused(strict_server: Server) -> None:
    headers = {**AUTHORIZED, "x-request-id": "x" * 257}
    answer = strict_server.post("/v1/completions", completion(), headers=headers)
    assert answer.status_code == 400
    assert "has 257 characters: send at most 256" in answer.json()["error"]["message"]
