"""`arriero serve --engine sim` as a process, and ways to talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from arriero.model.bundled import ensure_bundled_model

from .harness import HELD

START_S = 120.0
WAIT_S = 30.0
KEY = "a-key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
MODEL = "smollm2"
VOCAB_SIZE = 49_152


@dataclass
class Server:
    """A running server, its folder for temporary files, and what it has said."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    log: Path

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, **{"headers": AUTHORIZED, "timeout": WAIT_S, **options})

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, **{"headers": AUTHORIZED, "timeout": WAIT_S, **options})

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streaming answer."""
        body = {"model": MODEL, "stream": True, **body}
        with httpx.stream("POST", self.url + path, json=body, headers=AUTHORIZED, timeout=WAIT_S) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    def command(self, name: str, *arguments: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
        """`arriero NAME ...` on this server."""
        command = [sys.executable, "-m", "arriero.cli", name, "--url", self.url, "--api-key", key, *arguments]
        env = {**os.environ, "COLUMNS": "160"}
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=env)

    def instances(self) -> list[dict[str, Any]]:
        return list(self.get("/instances").json())

    def requests(self) -> list[dict[str, Any]]:
        return list(self.get("/requests").json())

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def assert_clean(self) -> None:
        """Nothing is held, here or in the instances."""
        self.until(lambda: is_clean(self.get("/arriero/check").json()))


def is_clean(books: dict[str, Any]) -> bool:
    held = books["instances"].values()
    return not books["requests"] and not books["migrations"] and not any(h[k] for h in held for k in HELD)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextlib.contextmanager
def serving(log: Path, *flags: str) -> Iterator[Server]:
    """Two simulated instances behind the whole front end, until the end of the block."""
    port = free_port()
    own = f"--engine sim --instances 2 --host 127.0.0.1 --port {port} --api-key {KEY} --served-model-name {MODEL}"
    command = [sys.executable, "-m", "arriero.cli", "serve", str(ensure_bundled_model()), *own.split()]
    with tempfile.TemporaryDirectory(prefix="e2e-") as folder, log.open("wb") as output:
        env = {**os.environ, "TMPDIR": folder}
        command += ["--max-model-len", "2048", *flags]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
        started = Server(process, f"http://127.0.0.1:{port}", Path(folder), log)
        try:
            _wait_for(started)
            yield started
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(WAIT_S)
            process.kill()
            process.wait()


def _wait_for(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < deadline, server.log.read_text()
        with contextlib.suppress(httpx.TransportError):
            if server.get("/health").status_code == 200:
                return
        time.sleep(0.1)


def completion(**changes: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": "The llama carries its load over the pass.",
        "max_tokens": 40,
        "ignore_eos": True,
        "return_token_ids": True,
        **changes,
    }
