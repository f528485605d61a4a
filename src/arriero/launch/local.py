"""Instances as processes of this machine, each in its own process group."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from arriero.core.errors import LaunchError
from arriero.core.types import InstanceId
from arriero.launch.child import CORES_ENV, END_SIGNAL, STATUS_FD_ENV
from arriero.launch.exiting import exit_code_ahead, open_stat
from arriero.launch.leftovers import reclaim, shared_memory_of_group
from arriero.launch.port import Launched, LaunchEvents, LaunchSpec

LOOK_S = 0.03
"""Ten microseconds of work for each instance."""


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    pidfd: int
    stat_fd: int
    status_fd: int
    is_told: bool = False  # its end
    status_buffer: bytes = b""
    left: set[Path] = field(default_factory=set)  # shared memory that it was seen to have


class LocalLauncher:
    """Starts instances with ``subprocess``; a look into ``/proc`` every ``LOOK_S`` or a pidfd tells when one ends.

    ``start`` must be called on the main thread: the child asks the kernel for a signal at the death of
    its parent *thread*.
    """

    def __init__(self, sweep: Callable[[], object] = lambda: None) -> None:
        self._children: dict[InstanceId, _Child] = {}
        self._sweep = sweep  #: reclaims what processes leave that have ended; called after each end

    def start(self, instance: InstanceId, spec: LaunchSpec, events: LaunchEvents) -> Launched:
        """See :class:`~arriero.launch.port.Launcher`."""
        loop = asyncio.get_running_loop()
        status_read, status_write = os.pipe()
        os.set_blocking(status_read, False)
        env = {**os.environ, **spec.env, STATUS_FD_ENV: str(status_write)}
        if spec.cores:
            env[CORES_ENV] = ",".join(map(str, sorted(spec.cores)))
        with tempfile.TemporaryFile() as payload:
            payload.write(spec.payload)
            payload.seek(0)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", spec.module],
                    stdin=payload,
                    env=env,
                    pass_fds=(status_write,),
                    start_new_session=True,  # with a share of the cores of its own (Linux: autogroup)
                )
            except OSError as error:
                os.close(status_read)
                raise LaunchError(f"instance {instance} could not be started: {error}") from error
            finally:
                os.close(status_write)
        pid = process.pid
        child = self._children[instance] = _Child(process, os.pidfd_open(pid), open_stat(pid), status_read)
        loop.add_reader(child.pidfd, self._exited, loop, instance, child, events)
        loop.add_reader(child.status_fd, self._status, loop, instance, child, events)
        loop.call_later(LOOK_S, self._look, loop, instance, child, events)
        return Launched(pid=process.pid, host=socket.gethostname())

    def end(self, instance: InstanceId) -> None:
        """See :class:`~arriero.launch.port.Launcher`."""
        child = self._children.get(instance)
        if child is not None and child.process.poll() is None:
            child.process.send_signal(END_SIGNAL)

    def kill(self, instance: InstanceId) -> None:
        """See :class:`~arriero.launch.port.Launcher`."""
        child = self._children.get(instance)
        if child is not None and child.process.returncode is None:  # not collected yet: its group is its own
            child.left |= shared_memory_of_group(child.process.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, signal.SIGKILL)

    def stop(self, instance: InstanceId, timeout_s: float) -> None:
        """See :class:`~arriero.launch.port.Launcher`."""
        child = self._children.get(instance)
        if child is not None:
            self._stop([child], timeout_s)

    def stop_all(self, timeout_s: float) -> None:
        """See :class:`~arriero.launch.port.Launcher`."""
        self._stop(list(self._children.values()), timeout_s)

    @staticmethod
    def _stop(children: list[_Child], timeout_s: float) -> None:
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(END_SIGNAL)
        deadline = time.monotonic() + timeout_s
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
        for child in children:
            # The group outlives its leader if a worker hangs.
            left = child.left | shared_memory_of_group(child.process.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()
            reclaim(left)

    def _exited(
        self, loop: asyncio.AbstractEventLoop, instance: InstanceId, child: _Child, events: LaunchEvents
    ) -> None:
        loop.remove_reader(child.pidfd)
        loop.remove_reader(child.status_fd)
        self._stop([child], 1.0)
        for fd in (child.pidfd, child.stat_fd, child.status_fd):
            os.close(fd)
        if self._children.get(instance) is child:
            del self._children[instance]
        self._sweep()
        if not child.is_told:
            child.is_told = True
            events.on_exit(instance, child.process.returncode)

    def _look(self, loop: asyncio.AbstractEventLoop, instance: InstanceId, child: _Child, events: LaunchEvents) -> None:
        """Tell of an end that has begun; what is left is removed when it is over."""
        if child.is_told:
            return
        returncode = exit_code_ahead(child.stat_fd)
        if returncode is None:
            loop.call_later(LOOK_S, self._look, loop, instance, child, events)
        else:
            child.is_told = True
            events.on_exit(instance, returncode)

    @staticmethod
    def _status(loop: asyncio.AbstractEventLoop, instance: InstanceId, child: _Child, events: LaunchEvents) -> None:
        try:
            data = os.read(child.status_fd, 65536)
        except BlockingIOError:
            return
        if not data:
            loop.remove_reader(child.status_fd)
            return
        *lines, child.status_buffer = (child.status_buffer + data).split(b"\n")
        for line in lines:
            try:
                news = msgspec.json.decode(line, type=dict)
            except msgspec.MsgspecError:
                continue
            if "stage" in news:
                # Now: when the whole group has been killed, nothing tells any more what it had mapped.
                child.left |= shared_memory_of_group(child.process.pid)
                events.on_status(instance, str(news["stage"]))
            elif news.get("asks") == "drain":
                events.on_drain_asked(instance)
