"""The first lines that run in an instance's process. Standard library only: nothing heavy yet."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

CORES_ENV = "ARRIERO_CORES"
STATUS_FD_ENV = "ARRIERO_STATUS_FD"

END_SIGNAL = signal.SIGUSR1
"""The front end's order to end now. SIGTERM is an operator's, and asks for a drain first."""

ORPHAN_GRACE_S = 10.0
"""An instance that has not ended so long after its front end is stuck."""

_ORPHAN_POLL_S = 1.0
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
    threading.Thread(target=_outlive_nobody, args=(parent,), daemon=True, name="arriero orphan watch").start()
    return payload


def _outlive_nobody(parent: int) -> None:
    """If the main thread is stuck, no signal handler runs: end by force then, with all children."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_POLL_S)
    time.sleep(ORPHAN_GRACE_S)
    os.killpg(0, signal.SIGKILL)


def end_on_signals(end: Callable[[], None]) -> None:
    """Call ``end`` at the front end's order, at its death, and at the second SIGTERM; the first one asks the front end
    to move everything away and to end this instance then. On the main thread.
    """
    parent = os.getppid()
    asked = False

    def on_term(*_: object) -> None:
        nonlocal asked
        if asked or os.getppid() != parent:
            end()
        asked = True
        _tell({"asks": "drain"})

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(END_SIGNAL, lambda *_: end())
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def report_stage(stage: str) -> None:
    """Tell the front end how far start-up is; silent if nobody listens."""
    _tell({"stage": stage})


def _tell(news: dict[str, str]) -> None:
    fd = os.environ.get(STATUS_FD_ENV)
    if fd is not None:
        with contextlib.suppress(OSError, ValueError):
            os.write(int(fd), json.dumps(news).encode() + b"\n")
