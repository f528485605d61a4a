"""Files that event logs are written to; one of them by a thread of its own: a slow or full disk holds up nobody.

Whoever serves requests must not wait for a disk. Lines queue up to a bound; what comes beyond it, or what the disk
refuses, is left out, counted, and said in the file as soon as it takes lines again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import threading
from pathlib import Path
from typing import Protocol

from arriero.core.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_LINES = 100_000
CLOSE_TIMEOUT_S = 2.0


class LineFile(Protocol):
    """Where an event log puts its lines."""

    def write(self, line: str) -> None:
        """Append a line; it ends without a line break."""

    def close(self) -> None:
        """No line comes after this."""


class PlainFile:
    """Each line is in the file when :meth:`write` returns, however long that takes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: str) -> None:
        """See :class:`LineFile`."""
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """See :class:`LineFile`."""
        self._file.close()


class EventFile:
    """Lines queue up for a thread. ``path`` opened for appending; raises ConfigError if it cannot be."""

    def __init__(self, path: Path, max_lines: int = MAX_LINES) -> None:
        self._path = path
        self._fd = _open(path)
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        self._num_unqueued = 0  # each of these is counted by one thread only
        self._num_refused = self._num_told = 0
        self._is_torn = False  # the last line is not whole
        self._is_failing = False
        self._thread = threading.Thread(target=self._write_all, name="arriero event log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Queue a line; never waits, never raises."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_unqueued += 1
            self._complain(f"{self._lines.maxsize} lines wait for it")

    @property
    def num_left_out(self) -> int:
        """Lines that the file lacks and has not been told of yet."""
        return self._num_unqueued + self._num_refused - self._num_told

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what is queued, as far as the disk takes it in ``timeout_s`` seconds. Idempotent."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    # ------------------------------------------------------------------ the thread

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
        os.close(self._fd)

    def _write(self, line: str) -> None:
        gap, num_left_out = "", self.num_left_out
        if num_left_out:
            gap = json.dumps({"event": "events_left_out", "num_events": num_left_out}) + "\n"
        data = (("\n" if self._is_torn else "") + gap + line + "\n").encode()
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                self._is_torn = True
                written += os.write(self._fd, data[written:])
        except OSError as error:
            self._num_refused += 1
            self._complain(error.strerror or str(error))
            return
        self._is_torn = self._is_failing = False
        self._num_told += num_left_out

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
