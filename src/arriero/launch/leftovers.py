"""What killed processes leave behind: sockets, and shared memory (vLLM's message queues unlink theirs only at a clean
end).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import psutil

SHM = Path("/dev/shm")
FOLDER = "arriero-"
NOTE = ".shm"

_RUN_FOLDER = re.compile(rf"{FOLDER}(\d+)-.+")

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
    """By inode: a semaphore is mapped under a temporary name, which glibc unlinks once it has linked the final one."""
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    inodes = {int(f[4]) for line in lines if len(f := line.split(maxsplit=5)) == 6 and f[5].startswith(f"{SHM}/")}
    with os.scandir(SHM) as entries:
        return {Path(entry.path) for entry in entries if entry.inode() in inodes}


def reclaim(files: set[Path]) -> None:
    """Unlink what is still there."""
    for path in files:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- what a killed front end leaves


def _is_alive(pid: int) -> bool:
    """A zombie is not: nobody may ever collect it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def run_folder() -> Path:
    """A new folder for the sockets and notes of this process; readable by its user alone."""
    return Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))


def note_shared_memory(folder: Path, process_group: int) -> None:
    """Note in ``folder`` what the instance with this process group has mapped, for :func:`reclaim_folders`."""
    names = sorted(path.name for path in shared_memory_of_group(process_group))
    (folder / f"{process_group}{NOTE}").write_text("\n".join(names))


def reclaim_folders() -> list[str]:
    """Remove the folders of processes that are no more, and the shared memory that they note. Returns their names."""
    reclaimed = []
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        found = _RUN_FOLDER.fullmatch(folder.name)
        if found is None or _is_alive(int(found[1])):
            continue
        with contextlib.suppress(OSError):  # another user's, or another start is at it
            if folder.lstat().st_uid == os.getuid():
                for note in folder.glob(f"*{NOTE}"):
                    if not _is_alive(int(note.name.removesuffix(NOTE))):
                        reclaim({SHM / Path(name).name for name in note.read_text().split()})
                shutil.rmtree(folder)
                reclaimed.append(folder.name)
    return reclaimed
