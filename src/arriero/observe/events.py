"""One event schema for production, the simulator and the dashboard: what happened, and when.

Events are flat dicts with ``time_s`` (the emitter's monotonic clock) and ``event``; the log keeps the
last ones in memory and may append each as a JSON line to a file, after a line with the format's version, one each
time that the file is opened: `time_s` starts anew there.

A `dispatch` event says what was known of the request (`arrival_s`, `prompt_tokens`, `max_tokens`, `priority`, and
`ttft_target_s` if it has one), a `finish` event what came of it (`how`, `num_output_tokens`): `arriero simulate` takes
such a log as a workload. A server's `preempt` event says whether a move could have avoided it (core/preempted.py); the
simulator's does not, since there snapshots are only taken when somebody decides.
A server must not wait for its disk: see event_file.py.
A full log also has what the scheduler was told and what it decided (decisions.py), in the file alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from arriero import __version__
from arriero.core.config import EventLogConfig, LogLevel
from arriero.observe.event_file import EventFile, LineFile, PlainFile

FORMAT = "arriero-events/1"
"""Raised when a field of an event changes its meaning or goes."""

Listener = Callable[[dict[str, Any]], None]

_encoder = msgspec.json.Encoder()


def known(**fields: Any) -> dict[str, Any]:
    """The fields of an event that have a value."""
    return {name: value for name, value in fields.items() if value is not None}


class EventLog:
    """Bounded in memory, optionally whole in a file.

    With ``wait`` false, a file that does not keep up loses events instead of time, and ``on_left_out`` hears how many.
    Raises OSError or ConfigError if the file cannot be opened.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        path: Path | None = None,
        keep: int = 1000,
        *,
        wait: bool = True,
        config: EventLogConfig = EventLogConfig(),  # noqa: B008 - frozen
        on_left_out: Callable[[int], None] = lambda num_lines: None,
    ) -> None:
        self._clock = clock
        self._events: deque[dict[str, Any]] = deque(maxlen=keep)
        self._file: LineFile | None = None
        if path is not None:
            self._file = PlainFile(path) if wait else EventFile(path, config.max_pending_bytes, on_left_out)
        self._listeners: list[Listener] = []
        self._num_events = 0
        self.is_full = path is not None and config.level is LogLevel.FULL  #: the file gets the decisions, too
        self._write({"format": FORMAT, "arriero": __version__})

    def listen(self, listener: Listener) -> None:
        """``listener`` gets each event from now on, after it was recorded."""
        self._listeners.append(listener)

    def emit(self, event: str, **fields: Any) -> None:
        """Record ``event`` now."""
        self._num_events += 1
        record = {"seq": self._num_events, "time_s": self._clock(), "event": event, **fields}
        self._events.append(record)
        self._write(record)
        for listener in self._listeners:
            listener(record)

    def emit_to_file(self, event: str, time_s: float, **fields: Any) -> None:
        """Record in the file alone what happened at ``time_s``."""
        self._num_events += 1
        self._write({"seq": self._num_events, "time_s": time_s, "event": event, **fields})

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(_encoder.encode(record))

    def recent(self, limit: int, after: int = 0) -> list[dict[str, Any]]:
        """The last ``limit`` events with a sequence number above ``after``, oldest first."""
        found = [e for e in self._events if e["seq"] > after]
        return found[max(0, len(found) - limit) :]

    def close(self) -> None:
        """Close the file, if any."""
        if self._file is not None:
            self._file.close()
            self._file, self.is_full = None, False
