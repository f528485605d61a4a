"""The first lines that run in an instance's process. Standard library only: nothing heavy yet."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys

CORES_ENV = "ARRIERO_CORES"
STATUS_FD_ENV = "ARRIERO_STATUS_FD"

_PR_SET_PDEATHSIG = 1


def adopt_parent() -> bytes:
    """Tie this process to its parent, pin it, and return the payload from standard input.

    The kernel sends SIGTERM when the parent dies, also by SIGKILL: no instance outlives its front end.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    cores = os.environ.pop(CORES_ENV, "")
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    payload = sys.stdin.buffer.read()
    if os.getppid() != parent:
        sys.exit("the front end ended during start-up")
    return payload


def report_stage(stage: str) -> None:
    """Tell the front end how far start-up is; silent if nobody listens."""
    fd = os.environ.get(STATUS_FD_ENV)
    if fd is not None:
        with contextlib.suppress(OSError, ValueError):
            os.write(int(fd), json.dumps({"stage": stage}).encode() + b"\n")
