"""Processes that are about to end, seen before the kernel says that they have.

A pidfd becomes readable, and ``waitpid`` returns, once the memory of a process is free: with gigabytes that is a
quarter of a second after a SIGKILL. That it exits, and with which status, stands in ``/proc/PID/stat`` at once
(proc(5)).
"""

from __future__ import annotations

import os

_PF_EXITING = 0x4  # include/linux/sched.h
_FLAGS, _EXIT_STATUS = 9 - 3, 52 - 3  # what follows the name in parentheses begins with field 3


def open_stat(pid: int) -> int:
    """A descriptor for :func:`exit_code_ahead`; of this process only, whoever gets its number later."""
    return os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)


def exit_code_ahead(stat_fd: int) -> int | None:
    """What ``Popen.returncode`` is going to be; None while the process lives, when it has been waited for, and if it
    exits with 0, which in time its pidfd tells.
    """
    try:
        fields = os.pread(stat_fd, 4096, 0).rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) <= _EXIT_STATUS or not int(fields[_FLAGS]) & _PF_EXITING:
        return None
    return os.waitstatus_to_exitcode(int(fields[_EXIT_STATUS])) or None
