"""Who may do what: keys at every endpoint of ours, no port but the one that was asked for, nothing for other users."""

from __future__ import annotations

import stat
from pathlib import Path

import httpx
import psutil
import pytest

from .server import AUTHORIZED, KEY, Server


def processes(server: Server) -> list[psutil.Process]:
    front_end = psutil.Process(server.process.pid)
    return [front_end, *front_end.children(recursive=True)]


def test_every_endpoint_of_ours_wants_the_key(strict_server: Server) -> None:
    """All that the OpenAPI document lists as arriero's: one that is added without the key fails this test."""
    paths = strict_server.get("/openapi.json").json()["paths"]
    ours = [
        (method, path)
        for path, methods in paths.items()
        for method, described in methods.items()
        if "arriero" in described.get("tags", [])
    ]
    assert len(ours) >= 9
    for method, path in ours:
        url = strict_server.url + path.replace("{instance}", "0").replace("{request_id}", "any")
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
        ):
            answer = httpx.request(method, url, headers=headers, json={"to": 1} if method == "post" else None)
            assert answer.status_code == 401, (method, path, headers)
            assert KEY not in answer.text


def test_the_dashboard_s_page_is_public_and_holds_no_data(strict_server: Server) -> None:
    page = strict_server.get("/dashboard", headers={})
    assert page.status_code == 200
    assert KEY not in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_no_port_is_open_but_the_server_s(strict_server: Server) -> None:
    """Instances talk over sockets in a folder; between hosts there is nothing yet."""
    listening = {
        (c.laddr.ip, c.laddr.port)
        for process in processes(strict_server)
        for c in process.net_connections(kind="inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", int(strict_server.url.rpartition(":")[2]))}


def test_sockets_and_shared_memory_are_closed_to_other_users(strict_server: Server) -> None:
    folders = [p for p in strict_server.folder.iterdir() if p.is_dir() and p.name.startswith("arriero-")]
    assert folders
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
    for path in Path("/dev/shm").iterdir():
        if path.name.startswith(f"arriero-{strict_server.process.pid}-"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_key_is_in_no_command_line_of_an_instance(strict_server: Server) -> None:
    _, *instances = processes(strict_server)
    assert len(instances) >= 2
    assert not any(KEY in part for process in instances for part in process.cmdline())


@pytest.mark.parametrize("size", [70_000, 5_000_000])
def test_a_body_without_end_is_refused(strict_server: Server, size: int) -> None:
    body = b'{"to": 1, "mode": "' + b"x" * size + b'"}'
    for content in (body, iter([body[:1000], body[1000:]])):  # with its length, and in chunks
        answer = httpx.post(strict_server.url + "/requests/any/migrate", content=content, headers=AUTHORIZED)
        assert answer.status_code == 413, answer.text
        assert "more than 65536 bytes" in answer.json()["error"]["message"]
