"""The event log of a server never waits for its disk, and says what it had to leave out."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from arriero.core.errors import ConfigError
from arriero.observe.event_file import EventFile
from arriero.observe.events import EventLog

WAIT_S = 30.0


def read_all(fd: int) -> str:
    """What comes out of a pipe until its other end is closed."""
    parts = []
    while data := os.read(fd, 65536):
        parts.append(data)
    return b"".join(parts).decode()


def test_lines_arrive_in_order_and_are_whole_after_close(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = EventFile(path, 1 << 20)
    for number in range(1000):
        file.write(b"line %d" % number)
    file.close()
    file.close()
    assert path.read_text().splitlines() == [f"line {number}" for number in range(1000)]


def test_a_pipe_whose_reader_sleeps_holds_nobody_up_and_gets_the_count_of_what_it_missed(tmp_path: Path) -> None:
    """The pipe holds 64 KiB and the queue 2,000 bytes; writing goes on regardless, as a serving loop must."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    left_out: list[int] = []
    file = EventFile(path, 2000, left_out.append)
    for number in range(5000):
        file.write(json.dumps({"number": number, "filling": "x" * 100}).encode())
    assert left_out, "more than the pipe and the queue hold"
    os.set_blocking(reader, True)
    read: list[str] = []
    thread = threading.Thread(target=lambda: read.append(read_all(reader)))
    thread.start()
    file.flush(WAIT_S)
    file.write(json.dumps({"number": 5000}).encode())
    file.close()
    thread.join(WAIT_S)
    os.close(reader)
    events = [json.loads(line) for line in read[0].splitlines()]
    numbers = [e["number"] for e in events if "number" in e]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 5000
    missed = sum(e["num_events"] for e in events if e.get("event") == "events_left_out")
    assert len(numbers) + missed == 5001
    assert sum(left_out) == missed


def test_a_full_disk_costs_events_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    events = EventLog(time.monotonic, Path("/dev/full"), wait=False)
    for _ in range(100):
        events.emit("tick")
    events.close()
    assert len(events.recent(1000)) == 100
    assert [r.message for r in caplog.records] == [
        "the event log /dev/full does not take lines (No space left on device): they are left out until it does"
    ]


def test_closing_does_not_wait_for_a_disk_that_hangs(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = EventFile(path, 1 << 20)
    file.write(b"x" * 200_000)
    file.close(timeout_s=0.05)
    assert file._thread.is_alive()
    os.close(reader)  # breaks the pipe, which ends the write
    file._thread.join(WAIT_S)
    assert not file._thread.is_alive()


def test_what_a_disk_refuses_last_is_said_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of a line, and has room again when the log is closed."""
    path, write, room = tmp_path / "events.jsonl", os.write, [13, 0]

    def limited(fd: int, data: bytes) -> int:
        if not room:
            return write(fd, data)
        num_bytes = room.pop(0)
        if not num_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:num_bytes])

    monkeypatch.setattr(os, "write", limited)
    left_out: list[int] = []
    file = EventFile(path, 1000, left_out.append)
    with file._changed:  # all three in one write
        for line in (b"first line", b"second", b"third"):
            file.write(line)
    file.close()
    assert path.read_bytes() == b'first line\nse\n{"event": "events_left_out", "num_events": 2}\n'
    assert (left_out, file.num_left_out) == ([2], 0)


@pytest.mark.parametrize("kind", ["pipe", "missing/file"])
def test_a_file_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"cannot be opened: (it is a pipe that nobody reads|No such file)"):
        EventFile(tmp_path / kind, 1)
