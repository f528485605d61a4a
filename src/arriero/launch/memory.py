"""This machine's memory: whether it holds one more instance like those that run, and whether it ran out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import psutil

MARGIN = 1.2
"""An instance needs more while it starts than it holds afterwards."""

VMSTAT = Path("/proc/vmstat")


class OutOfMemory:
    """Looks for processes that the kernel has killed for memory, on the whole machine."""

    def __init__(self, vmstat: Path = VMSTAT) -> None:
        self._vmstat = vmstat
        self._count = self._read()

    def happened(self) -> bool:
        """Whether there was one since the last call; also if the kernel does not count them."""
        before, self._count = self._count, self._read()
        return self._count is None or self._count != before

    def _read(self) -> int | None:
        try:
            lines = self._vmstat.read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


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
