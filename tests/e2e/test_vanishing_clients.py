"""Clients that go away or stop reading, whenever: their requests end everywhere, and nothing else does."""

from __future__ import annotations

import json
import random
import socket
import time
from typing import Any

import pytest

from .server import KEY, Server, completion


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    connection.connect((host, int(port)))
    return connection


def ask(connection: socket.socket, name: str, **changes: Any) -> None:
    """Send a request for a stream."""
    post(connection, "/v1/completions", completion(**{"stream": True, "max_tokens": 1500, **changes}), name)


def post(connection: socket.socket, path: str, body: dict[str, Any], name: str = "unnamed") -> None:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\nX-Request-Id: {name}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)


def read_some(connection: socket.socket, num_events: int = 3) -> None:
    read = b""
    while read.count(b"data: ") < num_events:
        part = connection.recv(65536)
        assert part, read
        read += part


def how_it_ended(server: Server, name: str) -> set[str]:
    """Of all sequences of the request; empty while it has not ended."""
    events = server.get("/events", params={"limit": 1000}).json()
    return {e["how"] for e in events if e["event"] == "finish" and f"cmpl-{name}-" in e["request"]}


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_closes_its_connection_ends_its_request(strict_server: Server, reset: bool) -> None:
    name = f"closed-{reset}"
    connection = connect(strict_server)
    if reset:  # RST instead of FIN
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    ask(connection, name)
    read_some(connection)
    assert len(strict_server.requests()) == 1
    connection.close()
    strict_server.until(lambda: how_it_ended(strict_server, name) == {"aborted"})


def test_a_client_that_closes_while_its_request_waits_ends_it(strict_server: Server) -> None:
    connections = [connect(strict_server) for _ in range(10)]
    for number, connection in enumerate(connections):
        ask(connection, f"waits-{number}")
    strict_server.until(lambda: sum(r["state"] in ("waiting", "queued") for r in strict_server.requests()) == 2)
    for connection in connections:
        connection.close()
    strict_server.until(lambda: strict_server.requests() == [])


def test_a_client_that_closes_before_its_body_is_complete_leaves_nothing(strict_server: Server) -> None:
    connection = connect(strict_server)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 500\r\n\r\n{")
    connection.close()
    assert strict_server.requests() == []


def test_a_client_that_stops_reading_ends_its_request(strict_server: Server) -> None:
    """Once the buffers between are full and nothing has been taken for `--client-timeout`."""
    connection = connect(strict_server, receive_buffer=2048)
    with connection:
        ask(connection, "deaf", n=4, max_tokens=1900)
        strict_server.until(lambda: how_it_ended(strict_server, "deaf"))
        assert how_it_ended(strict_server, "deaf") == {"aborted"}
        strict_server.until(lambda: strict_server.requests() == [])


def test_a_client_that_closes_in_the_middle_of_a_move_ends_its_request_on_both_sides(strict_server: Server) -> None:
    chance = random.Random(7)
    for number in range(12):
        name = f"moving-{number}"
        connection = connect(strict_server)
        ask(connection, name, prompt=[11] * 400)
        read_some(connection)
        (request,) = strict_server.requests()
        with connect(strict_server) as mover:
            post(mover, f"/requests/cmpl-{name}/migrate", {"to": 1 - request["instance"]})
            time.sleep(chance.uniform(0, 0.03))  # at another moment each time
            connection.close()
            mover.recv(65536)
        strict_server.until(lambda: strict_server.requests() == [])
        strict_server.assert_clean()
    moves = [e for e in strict_server.get("/events", params={"limit": 1000}).json() if e["event"] == "migration"]
    assert len(moves) >= 6, "most clients left before their move had begun"
