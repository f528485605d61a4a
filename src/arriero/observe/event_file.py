"""Files that event logs are written to; one of them by a thread of its own: a slow or full disk holds up nobody.

Whoever serves requests must not wait for a disk. Lines queue up to a bound; what comes beyond it, or what the disk
refuses, is left out, counted, and said in the file as soon as it takes lines again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from arriero.core.errors import ConfigError

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
PAUSE_S = 0.02  # between two writes of the thread, so that it wakes for many lines and not for each


class LineFile(Protocol):
    """Where an event log puts its lines."""

    def write(self, line: bytes) -> None:
        """Append a line; it ends without a line break."""

    def close(self) -> None:
        """No line comes after this."""


class PlainFile:
    """Each line is in the file when :meth:`write` returns, however long that takes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, line: bytes) -> None:
        """See :class:`LineFile`."""
        self._file.write(line + b"\n")
        self._file.flush()

    def close(self) -> None:
        """See :class:`LineFile`."""
        self._file.close()


class EventFile:
    """Lines queue up for a thread, at most ``max_pending_bytes`` of them. ``path`` opened for appending; raises
    ConfigError if it cannot be. ``on_left_out`` hears of so many lines that the file lacks; from either thread.
    """

    def __init__(
        self, path: Path, max_pending_bytes: int, on_left_out: Callable[[int], None] = lambda num_lines: None
    ) -> None:
        self._path = path
        self._fd = _open(path)
        self._max_pending_bytes = max_pending_bytes
        self._on_left_out = on_left_out
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._pending: list[bytes] = []
        self._num_pending_bytes = 0
        self._is_writing = False
        self._num_unqueued = 0  # each of these is counted by one thread only
        self._num_refused = self._num_told = 0
        self._is_torn = False  # the last line is not whole
        self._is_failing = False
        self._thread = threading.Thread(target=self._write_all, name="arriero event log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue a line; never waits, never raises."""
        with self._changed:
            fits = self._num_pending_bytes + len(line) <= self._max_pending_bytes and not self._closing.is_set()
            if fits:
                self._pending.append(line)
                self._num_pending_bytes += len(line)
                if len(self._pending) == 1:
                    self._changed.notify_all()
        if not fits:
            self._num_unqueued += 1
            self._on_left_out(1)
            self._complain(f"{self._num_pending_bytes} bytes wait for it")

    @property
    def num_left_out(self) -> int:
        """Lines that the file lacks and has not been told of yet."""
        return self._num_unqueued + self._num_refused - self._num_told

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Return when the disk has taken or refused what is queued, or after ``timeout_s`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending and not self._is_writing, timeout_s)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what is queued, as far as the disk takes it in ``timeout_s`` seconds. Idempotent."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join(timeout_s)

    # ------------------------------------------------------------------ the thread

    def _write_all(self) -> None:
        while lines := self._next():
            self._write(lines)
            self._closing.wait(PAUSE_S)
        if self.num_left_out:
            self._write([])
        os.close(self._fd)

    def _next(self) -> list[bytes]:
        """All that is queued, once there is something; nothing: the end."""
        with self._changed:
            self._is_writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._pending or self._closing.is_set())
            lines, self._pending, self._num_pending_bytes = self._pending, [], 0
            self._is_writing = bool(lines)
        return lines

    def _write(self, lines: list[bytes]) -> None:
        num_left_out, mended = self.num_left_out, self._is_torn
        gap = [json.dumps({"event": "events_left_out", "num_events": num_left_out}).encode()] if num_left_out else []
        data = (b"\n" if mended else b"") + b"".join(line + b"\n" for line in [*gap, *lines])
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
                self._is_torn = not data[:written].endswith(b"\n")
            self._is_failing = False
        except OSError as error:
            self._complain(error.strerror or str(error))
        num_whole = max(0, data.count(b"\n", 0, written) - mended)
        if num_whole:
            self._num_told += num_left_out
        num_refused = len(lines) - max(0, num_whole - len(gap))
        if num_refused:
            self._num_refused += num_refused
            self._on_left_out(num_refused)

    def _complain(self, why: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            logger.warning(
                "the event log %s does not take lines (%s): they are left out until it does", self._path, why
            )


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_NONBLOCK, 0o644)  # else a pipe that nobody reads would be waited for
    except OSError as error:
        hint = "it is a pipe that nobody reads" if error.errno == errno.ENXIO else error.strerror
        raise ConfigError(f"event log {path} cannot be opened: {hint}; name a file that can be written") from error
    os.set_blocking(fd, True)
    return fd
