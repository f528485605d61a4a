"""Shared memory that killed processes leave behind: vLLM's message queues unlink theirs only at a clean end."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import psutil

SHM = Path("/dev/shm")


_OURS = re.compile(r"arriero-.*-(\d+)-\d+")
"""A segment of the block transport; the number is its owner's process id. Peers map it too, to read."""


def shared_memory_of_group(process_group: int) -> set[Path]:
    """Files of /dev/shm that processes of this group have mapped now, but for those that a peer owns."""
    files: set[Path] = set()
    members: set[int] = set()
    for pid in psutil.pids():
        # A process may end, or belong to somebody else, at any moment.
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == process_group:
                members.add(pid)
                files |= _mapped(pid)
    return {path for path in files if (ours := _OURS.fullmatch(path.name)) is None or int(ours[1]) in members}


def _mapped(pid: int) -> set[Path]:
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return {path for path in paths if path.parent == SHM}


def reclaim(files: set[Path]) -> None:
    """Unlink what is still there."""
    for path in files:
        path.unlink(missing_ok=True)
