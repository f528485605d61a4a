"""A workload from an event log (`arriero serve --event-log FILE`, or `arriero simulate --events FILE`).

The last run in the file counts. A request arrives when it arrived then, and wants as many tokens as it got; one that
had not ended when the log did is left out, and one that ended before its first token counts as wanting one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from arriero.core.errors import ConfigError
from arriero.observe.events import FORMAT
from arriero.workload.workload import Arrival, Workload


def read_log(path: Path, limit: int | None = None) -> Workload:
    """The requests in ``path``, or the first ``limit``. Raises ConfigError: file, line, field and value."""
    try:
        with path.open("rb") as file:
            arrivals = _parse(path, file)
    except OSError as error:
        raise ConfigError(f"log {path} cannot be read: {error}") from error
    if not arrivals:
        raise ConfigError(f"log {path}: in its last run no request was dispatched and ended")
    arrivals.sort(key=lambda a: a.arrival_s)
    first_s = arrivals[0].arrival_s
    return Workload(path.stem, [replace(a, arrival_s=a.arrival_s - first_s) for a in arrivals[:limit]])


def is_log(path: Path) -> bool:
    """Whether the file looks like an event log: its first byte opens an object. False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return False


def _parse(path: Path, lines: Iterable[bytes]) -> list[Arrival]:
    found: list[Arrival] = []
    dispatched: dict[str, Arrival] = {}
    for number, line in enumerate(lines, start=1):
        event = _Event(path, number, _decode(path, number, line))
        if number == 1 or "format" in event.values:
            event.require_format()
            found, dispatched = [], {}
        elif event.values.get("event") == "dispatch":
            dispatched.setdefault(event.text("request"), event.arrival())  # a replay is dispatched again
        elif event.values.get("event") == "finish":
            arrival = dispatched.pop(event.text("request"), None)
            if arrival is not None:
                found.append(replace(arrival, output_tokens=max(1, event.whole("num_output_tokens", 0))))
    return found


def _decode(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"log {path}, line {number}: {line[:80]!r} is no event: {error}") from error


@dataclass(frozen=True, slots=True)
class _Event:
    """One line, by field."""

    path: Path
    line: int
    values: dict[str, Any]

    def require_format(self) -> None:
        if self.values.get("format") != FORMAT:
            self._reject("format", f"{FORMAT!r}: the log of another version cannot be read")

    def arrival(self) -> Arrival:
        return Arrival(
            self._seconds("arrival_s"),
            self.whole("prompt_tokens", 1),
            1,
            self.whole("priority", None),
            max_tokens=self.whole("max_tokens", 0),
            ttft_target_s=self._seconds("ttft_target_s") if "ttft_target_s" in self.values else None,
        )

    def text(self, name: str) -> str:
        value = self.values.get(name)
        return value if isinstance(value, str) else self._reject(name, "a request's id")

    def whole(self, name: str, least: int | None) -> int:
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            self._reject(name, "a whole number" + ("" if least is None else f", {least} or more"))
        return value

    def _seconds(self, name: str) -> float:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._reject(name, "seconds")
        return float(value)

    def _reject(self, name: str, want: str) -> NoReturn:
        raise ConfigError(
            f"log {self.path}, line {self.line}: {name}={self.values.get(name)!r} is invalid: it must be {want}"
        )
