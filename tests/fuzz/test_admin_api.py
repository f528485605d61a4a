"""The admin API, from its own OpenAPI document: whatever is asked, an answer in OpenAI's shape comes, and no 500."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.server import AUTHORIZED, KEY, WAIT_S, Server, completion, serving

from .frames import EXAMPLES, tried

SCHEMATHESIS = Path(".venv-fuzz/bin/schemathesis")

numbers = st.integers(-(10**30), 10**30) | st.integers(0, 3)
texts = st.text(max_size=30) | st.sampled_from(["", "/", "..", "%00", "a/b", "é", "0", "cmpl-", "x" * 5000])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its instances may be drained: nobody else's tests use it."""
    pytest.importorskip("vllm")
    with serving(tmp_path_factory.mktemp("fuzz") / "log", "--instances", "3") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=AUTHORIZED, timeout=WAIT_S) as made:
        yield made


@pytest.fixture(scope="module")
def operations(client: httpx.Client) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of each of our endpoints."""
    paths = client.get("/openapi.json").json()["paths"]
    return [
        (method, path, described)
        for path, methods in paths.items()
        for method, described in methods.items()
        if "arriero" in described.get("tags", [])
    ]


def is_in_openais_shape(answer: httpx.Response) -> bool:
    body = answer.json()
    if body == {"detail": "Not Found"}:  # vLLM's, for a path that nobody serves: an id of dots, or none
        return answer.status_code == 404
    error = body["error"]
    return bool(error["message"]) and error["code"] == answer.status_code


@tried
@given(st.data())
def test_no_request_brings_the_server_down(
    client: httpx.Client, operations: list[tuple[str, str, dict[str, Any]]], data: st.DataObject
) -> None:
    method, path, described = data.draw(st.sampled_from(operations))
    for parameter in described.get("parameters", []):
        if parameter["in"] == "path":
            value = quote(str(data.draw(numbers | texts)), safe="")
            path = path.replace(f"{{{parameter['name']}}}", value)
    query = data.draw(st.dictionaries(st.sampled_from(["after", "limit", "x"]), st.one_of(numbers, texts), max_size=2))
    headers = data.draw(
        st.dictionaries(st.sampled_from(["last-event-id", "x-request-id"]), st.sampled_from(["", "1", "-"]))
    )
    body = data.draw(st.none() | _body(described) | st.binary(max_size=50))
    if path == "/restart" and body in (None, b"", {}):
        body = {"instances": [77]}  # an empty body would replace them all, each time
    content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    try:
        request = client.build_request(method, path, params=query, headers=headers, **content)
    except (httpx.InvalidURL, ValueError):
        return  # no client would send it
    answer = client.send(request)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and answer.status_code != 405:
        assert is_in_openais_shape(answer) or "ok" in answer.json(), answer.text


def _body(described: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What the endpoint knows, with anything in it."""
    fields = ["to", "mode", "force", "instances", "max_surge", "flags", "unknown"]
    right = st.fixed_dictionaries(
        {},
        optional={
            "to": numbers,
            "mode": st.sampled_from(["live", "stop_and_copy", "recompute", "teleport"]),
            "instances": st.lists(st.integers(50, 99), min_size=1, max_size=2),
        },
    )
    return st.dictionaries(st.sampled_from(fields), json_values, max_size=3) | right | json_values


def test_after_all_that_the_server_serves_and_holds_nothing(server: Server) -> None:
    answer = server.post("/v1/completions", completion())
    assert answer.status_code == 200
    assert len(answer.json()["choices"][0]["token_ids"]) == 40
    server.assert_clean()


@pytest.mark.skipif(
    EXAMPLES is None or not SCHEMATHESIS.exists(), reason="`make fuzz` installs schemathesis and runs it"
)
def test_schemathesis_finds_no_error_of_the_server(server: Server) -> None:
    command = [
        str(SCHEMATHESIS), "run", f"{server.url}/openapi.json", "--include-tag", "arriero",
        "--exclude-path", "/restart", "-H", f"Authorization: Bearer {KEY}", "--max-examples", str(EXAMPLES),
        "--checks", "not_a_server_error", "--request-timeout", "30",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
