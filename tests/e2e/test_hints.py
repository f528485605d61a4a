"""What a request tells the scheduler beside its lengths: when its first token is due, and whose prefix it has."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from .server import AUTHORIZED, MODEL, Server

TARGET = "x-slo-ttft-ms"
LONG = "Once upon a time there was a llama. " * 60
OTHER = "In another valley lived an alpaca. " * 60


def complete(server: Server, prompt: str, name: str, **headers: str) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    return server.post("/v1/completions", body, headers={**headers, **AUTHORIZED, "X-Request-Id": name})


def dispatch_of(server: Server, name: str) -> dict[str, Any]:
    events = server.get("/events", params={"limit": 1000}).json()
    return next(e for e in events if e["event"] == "dispatch" and name in e["client_id"])


def test_a_target_is_known_to_the_scheduler_and_counted(strict_server: Server) -> None:
    def counted(outcome: str) -> float:
        start = f'arriero_ttft_targets_total{{outcome="{outcome}"'
        lines = strict_server.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(start))

    met, missed = counted("met"), counted("missed")
    assert complete(strict_server, "Hello", "easy", **{TARGET: "60000"}).status_code == 200
    assert complete(strict_server, "Hello", "hard", **{TARGET: "0.001"}).status_code == 200
    assert complete(strict_server, "Hello", "free").status_code == 200
    assert (counted("met"), counted("missed")) == (met + 1, missed + 1)
    assert dispatch_of(strict_server, "easy")["ttft_target_s"] == 60
    assert "ttft_target_s" not in dispatch_of(strict_server, "free")


@pytest.mark.parametrize("text", ["soon", "-3", "0", "inf", "nan", ""])
def test_what_is_no_target_is_refused_by_name(strict_server: Server, text: str) -> None:
    refused = complete(strict_server, "Hello", "refused", **{TARGET: text})
    assert refused.status_code == 400
    assert f"{TARGET}: {text!r} is no target" in refused.json()["error"]["message"]


def test_a_prompt_goes_to_who_holds_its_prefix_already(strict_server: Server) -> None:
    server = strict_server
    assert complete(server, LONG, "first").status_code == 200
    home = dispatch_of(server, "first")["instance"]

    def running() -> dict[int, int]:
        return {i["id"]: i["running"] for i in server.instances()}

    filler = {"prompt": "Tell me a tale.", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
    streams = []
    try:
        while max(running(), key=lambda i: running()[i]) != home or len(set(running().values())) == 1:
            streams.append(server.stream("/v1/completions", filler))
            next(streams[-1])
            server.until(lambda: sum(running().values()) == len(streams))
            assert len(streams) < 4
        assert complete(server, LONG + "It spat.", "again").status_code == 200
        assert complete(server, OTHER, "other").status_code == 200
        again, other = (dispatch_of(server, name) for name in ("again", "other"))
        assert again["instance"] == home
        assert "tokens of its prompt" in again["reason"]
        assert other["instance"] != home
    finally:
        for stream in streams:
            stream.close()
