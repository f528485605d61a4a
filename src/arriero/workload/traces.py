"""Traces: CSV files with a header, ``arrival_s,prompt_tokens,output_tokens[,priority][,hash_ids][,ttft_target_s]``;
or gzipped ones.

``hash_ids`` are ids of prefix blocks, separated by blanks; "a-b" is an inclusive run. ``ttft_target_s``
may be empty. Other columns are ignored.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

from arriero.core.errors import ConfigError
from arriero.workload.workload import PREFIX_BLOCK_TOKENS, Arrival, Workload

T = TypeVar("T")

_REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
_RUN = re.compile(r"(\d+)(?:-(\d+))?")


def read_trace(path: Path, limit: int | None = None) -> Workload:
    """The trace in ``path``, or its first ``limit`` requests. Raises ConfigError: file, line, field and value."""
    try:
        with _open(path) as file:
            arrivals = list(_parse(path, file, limit))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from error
    for line, (before, after) in enumerate(pairwise(arrivals), start=3):
        if after.arrival_s < before.arrival_s:
            _reject(path, line, "arrival_s", str(after.arrival_s), f"at least {before.arrival_s}, as the line before")
    return Workload(path.name.removesuffix(".gz").removesuffix(".csv"), arrivals)


def read_columns(path: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """Further columns of a trace, numbers all of them; line by line what :func:`read_trace` gives."""
    with _open(path) as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in names}


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _parse(path: Path, lines: Iterable[str], limit: int | None) -> Iterator[Arrival]:
    rows = csv.reader(lines)
    header = next(rows, [])
    for name in _REQUIRED:
        if name not in header:
            raise ConfigError(f"trace {path}, line 1: no field {name!r} in the header {','.join(header)!r}")
    for number, row in enumerate(rows):
        if number == limit:
            return
        if len(row) != len(header):
            raise ConfigError(
                f"trace {path}, line {rows.line_num}: {len(row)} fields, but the header has {len(header)}: {row!r}"
            )
        values = dict(zip(header, row, strict=True))
        fields = _Fields(path, rows.line_num, values)
        arrival = Arrival(
            fields.take("arrival_s", _seconds, "seconds, 0 or more"),
            fields.take("prompt_tokens", _tokens, "a whole number of tokens, 1 or more"),
            fields.take("output_tokens", _tokens, "a whole number of tokens, 1 or more"),
            fields.take("priority", int, "a whole number", "0"),
            fields.take("hash_ids", _runs, "block ids or runs of them, like '0 14-27'", ""),
            ttft_target_s=fields.take("ttft_target_s", _target, "seconds, more than 0, or empty", ""),
        )
        longest = -(-arrival.prompt_tokens // PREFIX_BLOCK_TOKENS)
        if arrival.num_prefix_ids > longest:
            want = f"at most {longest} ids, since prompt_tokens={arrival.prompt_tokens}"
            _reject(path, rows.line_num, "hash_ids", values["hash_ids"], want)
        yield arrival


class _Fields:
    """One line, by field."""

    def __init__(self, path: Path, line: int, values: dict[str, str]) -> None:
        self._path, self._line, self._values = path, line, values

    def take(self, name: str, parse: Callable[[str], T], want: str, default: str = "") -> T:
        """The parsed field, or an error that says where it stands."""
        text = self._values.get(name, default)
        try:
            return parse(text)
        except ValueError:
            _reject(self._path, self._line, name, text, want)


def _reject(path: Path, line: int, field: str, value: str, want: str) -> NoReturn:
    raise ConfigError(f"trace {path}, line {line}: {field}={value!r} is invalid: it must be {want}")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(text)
    return seconds


def _target(text: str) -> float | None:
    if not text.strip():
        return None
    seconds = _seconds(text)
    if not seconds:
        raise ValueError(text)
    return seconds


def _tokens(text: str) -> int:
    tokens = int(text)
    if tokens < 1:
        raise ValueError(text)
    return tokens


def _runs(text: str) -> tuple[tuple[int, int], ...]:
    runs = []
    for word in text.split():
        match = _RUN.fullmatch(word)
        if match is None:
            raise ValueError(word)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(word)
        runs.append((first, last))
    return tuple(runs)


def write_trace(path: Path, arrivals: Sequence[Arrival]) -> None:
    """Write a trace that :func:`read_trace` reads back; optional columns only if a request needs them."""
    with_priority = any(a.priority for a in arrivals)
    with_prefixes = any(a.prefix_blocks for a in arrivals)
    with_targets = any(a.ttft_target_s is not None for a in arrivals)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        optional = [*["priority"] * with_priority, *["hash_ids"] * with_prefixes, *["ttft_target_s"] * with_targets]
        writer.writerow([*_REQUIRED, *optional])
        for arrival in arrivals:
            row: list[object] = [arrival.arrival_s, arrival.prompt_tokens, arrival.output_tokens]
            row += [arrival.priority] * with_priority
            row += [" ".join(_run_text(*run) for run in arrival.prefix_blocks)] * with_prefixes
            row += [arrival.ttft_target_s] * with_targets
            writer.writerow(row)


def _run_text(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
