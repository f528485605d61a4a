"""One event schema for production, the simulator and the dashboard: what happened, and when.

Events are flat dicts with ``time_s`` (the emitter's monotonic clock) and ``event``; the log keeps the
last ones in memory and may append each as a JSON line to a file, after a line with the format's version, one each
time that the file is opened: `time_s` starts anew there.

A `dispatch` event says what was known of the request (`arrival_s`, `prompt_tokens`, `max_tokens`, `priority`), a
`finish` event what came of it (`how`, `num_output_tokens`): `arriero simulate` takes such a log as a workload. A server
must not wait for its disk: see event_file.py.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arriero.observe.event_file import EventFile, LineFile, PlainFile

FORMAT = "arriero-events/1"
"""Raised when a field of an event changes its meaning or goes."""


class EventLog:
    """Bounded in memory, optionally whole in a file.

    With ``wait`` false, a file that does not keep up loses events instead of time. Raises OSError or ConfigError if the
    file cannot be opened.
    """

    def __init__(
        self, clock: Callable[[], float], path: Path | None = None, keep: int = 1000, *, wait: bool = True
    ) -> None:
        self._clock = clock
        self._events: deque[dict[str, Any]] = deque(maxlen=keep)
        self._file: LineFile | None = None
        if path is not None:
            self._file = PlainFile(path) if wait else EventFile(path)
        self._num_events = 0
        if self._file is not None:
            self._write({"format": FORMAT})

    def emit(self, event: str, **fields: Any) -> None:
        """Record ``event`` now."""
        self._num_events += 1
        record = {"seq": self._num_events, "time_s": self._clock(), "event": event, **fields}
        self._events.append(record)
        if self._file is not None:
            self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record))

    def recent(self, limit: int, after: int = 0) -> list[dict[str, Any]]:
        """The last ``limit`` events with a sequence number above ``after``, oldest first."""
        found = [e for e in self._events if e["seq"] > after]
        return found[max(0, len(found) - limit) :]

    def close(self) -> None:
        """Close the file, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None
