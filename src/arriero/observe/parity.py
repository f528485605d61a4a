"""Parity: a fresh GlobalScheduler, told of the events in a full event log, gives the commands that were given then."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from arriero import __version__
from arriero.core.config import SchedulerConfig
from arriero.core.errors import ConfigError, PolicyError
from arriero.core.scheduler import GlobalScheduler
from arriero.observe.decisions import inputs_of, named
from arriero.observe.events import FORMAT

_encoder = msgspec.json.Encoder()


class _Line(msgspec.Struct):
    """What parity reads of a line; all else is for others."""

    format: str | None = None
    arriero: str = "of unknown version"
    event: str = ""
    time_s: float = 0.0
    num_events: int = 0
    config: msgspec.Raw = msgspec.Raw(b"{}")
    on: str = ""
    given: msgspec.Raw = msgspec.Raw(b"{}")
    commands: msgspec.Raw = msgspec.Raw(b"[]")
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """The first decision that came out otherwise."""

    line: int
    time_s: float
    event: str
    given: str  #: JSON, as all below
    recorded: str
    replayed: str

    def __str__(self) -> str:
        return (
            f"line {self.line}, {self.time_s:.6f} s: {self.event} {self.given}\n"
            f"  recorded: {self.recorded}\n  replayed: {self.replayed}"
        )


@dataclass(slots=True)
class Replay:
    """What replaying a log showed."""

    num_events: int = 0
    num_commands: int = 0
    difference: Difference | None = None
    versions: tuple[str, ...] = ()  #: of arriero that wrote the log, if not this one
    cut_at: int = 0  #: the line that ends in the middle, where whoever wrote it was killed; 0: none

    def __str__(self) -> str:
        seen = f"{self.num_events:,} events, {self.num_commands:,} commands"
        notes = [f"the log is of arriero {v}, this is {__version__}" for v in self.versions]
        if self.cut_at:
            notes.append(f"line {self.cut_at} is cut off, and ends the log")
        if self.difference is not None:
            return "\n".join([f"different after {seen}", str(self.difference), *notes])
        return "; ".join([f"{seen}, identical", *notes])


def replay(path: Path) -> Replay:
    """Repeat every decision in the log, until one comes out otherwise.

    Raises ConfigError: the file cannot be read, is no full log, or has lost lines.
    """
    try:
        with path.open("rb") as file:
            return replay_lines(path, file)
    except OSError as error:
        raise ConfigError(f"log {path} cannot be read: {error}") from error


def replay_lines(path: Path, lines: Iterable[bytes]) -> Replay:
    """As :func:`replay`; ``path`` is only for messages."""
    result = Replay()
    _replay(path, lines, result)
    if not result.num_events:
        raise ConfigError(f"log {path} has no decisions: record it with --event-log-level full")
    return result


def _replay(path: Path, lines: Iterable[bytes], result: Replay) -> None:
    scheduler: GlobalScheduler | None = None
    for number, line in _parse(path, lines, result):
        if line.format is not None:
            scheduler = None
            if line.arriero != __version__ and line.arriero not in result.versions:
                result.versions += (line.arriero,)
        elif line.event == "scheduler":
            scheduler = GlobalScheduler(_decode(path, number, line.config, SchedulerConfig))
        elif line.event == "events_left_out":
            raise ConfigError(
                f"log {path}, line {number}: {line.num_events} events are missing, the disk was too slow; "
                f"{result} up to there"
            )
        elif line.event == "decision":
            if scheduler is None:
                raise ConfigError(f"log {path}, line {number}: a decision of no scheduler: the log has no beginning")
            result.num_events += 1
            result.difference = _compare(path, number, line, scheduler, result)
            if result.difference is not None:
                return


def _parse(path: Path, lines: Iterable[bytes], result: Replay) -> Iterator[tuple[int, _Line]]:
    for number, raw in enumerate(lines, start=1):
        if not raw.endswith(b"\n"):
            result.cut_at = number
            return
        line = _decode(path, number, raw, _Line)
        if number == 1 and line.format != FORMAT:
            raise ConfigError(f"log {path}, line 1: format={line.format!r} is not {FORMAT!r}: no event log of ours")
        yield number, line


def _compare(path: Path, number: int, line: _Line, scheduler: GlobalScheduler, result: Replay) -> Difference | None:
    try:
        inputs = _decode(path, number, line.given, inputs_of(line.on))
    except KeyError:
        raise ConfigError(f"log {path}, line {number}: on={line.on!r} is no event of this scheduler") from None
    given = {name: getattr(inputs, name) for name in inputs.__struct_fields__}
    recorded: Any = line.error if line.error is not None else msgspec.json.decode(line.commands)
    replayed: Any
    try:
        commands = getattr(scheduler, line.on)(**given, now=line.time_s)
        result.num_commands += len(commands)
        replayed = msgspec.json.decode(_encoder.encode(named(commands)))
    except PolicyError as error:
        replayed = str(error)
    if recorded == replayed:
        return None
    shown = [msgspec.json.encode(x).decode() for x in (recorded, replayed)]
    return Difference(number, line.time_s, line.on, bytes(line.given).decode(), *shown)


def _decode(path: Path, number: int, raw: bytes | msgspec.Raw, kind: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        shown = bytes(raw)[:80]
        raise ConfigError(f"log {path}, line {number}: {shown!r} cannot be understood: {error}") from error


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `replay` to the sub-commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay", help="repeat the scheduler's decisions in a full event log and compare"
    )
    parser.add_argument("log", type=Path, help="of `arriero serve` or `arriero simulate`, with --event-log-level full")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry it out; exit code 0: identical, 1: different, 2: no such log."""
    try:
        result = replay(args.log)
    except ConfigError as error:
        sys.stderr.write(f"arriero replay: {error}\n")
        return 2
    print(result)
    return 0 if result.difference is None else 1
