"""Whether this machine's memory holds one more instance like those that run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil

MARGIN = 1.2
"""An instance needs more while it starts than it holds afterwards."""


def holds_one_more(pids: Iterable[int]) -> bool:
    """Whether so much is available as the largest of these instances (its processes and theirs) holds."""
    largest = max((_held_by(pid) for pid in pids), default=0)
    return bool(psutil.virtual_memory().available > MARGIN * largest)


def _held_by(pid: int) -> int:
    """Bytes. Shared ones count for every process: too much rather than too little."""
    held = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                held += member.memory_info().rss
    return held
