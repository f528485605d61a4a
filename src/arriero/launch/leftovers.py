"""Shared memory that killed processes leave behind: vLLM's message queues unlink theirs only at a clean end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

SHM = Path("/dev/shm")


def shared_memory_of_group(process_group: int) -> set[Path]:
    """Files of /dev/shm that processes of this group have mapped now."""
    files: set[Path] = set()
    for pid in psutil.pids():
        # A process may end, or belong to somebody else, at any moment.
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == process_group:
                files |= _mapped(pid)
    return files


def _mapped(pid: int) -> set[Path]:
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return {path for path in paths if path.parent == SHM}


def reclaim(files: set[Path]) -> None:
    """Unlink what is still there."""
    for path in files:
        path.unlink(missing_ok=True)
