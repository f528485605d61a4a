"""The instances of this front end: who is starting, ready or dead, and their processes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from arriero.core.errors import LaunchError, NotFoundError
from arriero.core.types import InstanceId, InstanceState
from arriero.launch.port import Launcher, LaunchSpec

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(slots=True)
class Instance:
    """One instance and its process."""

    instance_id: InstanceId
    pid: int
    host: str
    state: InstanceState
    started_s: float
    stage: str = "starting"
    ready_payload: bytes = b""


class Instances:
    """Starts instances in parallel, waits for them, and learns of their end."""

    def __init__(
        self,
        launcher: Launcher,
        *,
        on_joined: Callable[[Instance], None],
        on_lost: Callable[[Instance, int], None],
        progress: Progress,
    ) -> None:
        self._launcher = launcher
        self._on_joined = on_joined
        self._on_lost = on_lost
        self._progress = progress
        self._instances: dict[InstanceId, Instance] = {}
        self._starting: dict[InstanceId, asyncio.Future[Instance]] = {}
        self._next_id = 0
        self._closing = False

    def __iter__(self) -> Iterator[Instance]:
        return iter(list(self._instances.values()))

    def __getitem__(self, instance: InstanceId) -> Instance:
        found = self._instances.get(instance)
        if found is None:
            known = ", ".join(map(str, self._instances)) or "none"
            raise NotFoundError(f"instance {instance} is unknown: there is {known}")
        return found

    def ready_ids(self) -> list[InstanceId]:
        """Instances that serve."""
        return [i.instance_id for i in self if i.state is InstanceState.READY]

    def launch(self, make_spec: Callable[[InstanceId], LaunchSpec]) -> asyncio.Future[Instance]:
        """Start one more instance; the future is done when it is ready, or raises LaunchError."""
        instance_id, self._next_id = self._next_id, self._next_id + 1
        future: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        launched = self._launcher.start(instance_id, make_spec(instance_id), self)
        self._instances[instance_id] = Instance(
            instance_id, launched.pid, launched.host, InstanceState.STARTING, time.monotonic()
        )
        self._starting[instance_id] = future
        self._progress(f"instance {instance_id}: starting (pid {launched.pid})")
        return future

    def close(self, timeout_s: float) -> None:
        """End every instance. Blocking; safe from any thread."""
        self._closing = True
        self._launcher.stop_all(timeout_s)

    # ------------------------------------------------------------------ events

    def on_status(self, instance: InstanceId, stage: str) -> None:
        """Progress of a start-up (from the launcher)."""
        record = self._instances[instance]
        if record.state is not InstanceState.STARTING or stage == "ready":
            return  # it is ready once it serves, see on_snapshot
        record.stage = stage
        self._progress(f"instance {instance}: {stage} ({time.monotonic() - record.started_s:.0f} s)")

    def on_ready(self, instance: InstanceId, payload: bytes) -> None:
        """It has connected (from the links)."""
        record = self._instances.get(instance)
        if record is None:
            logger.warning("an unknown instance %d has connected; it is ignored", instance)
            return
        record.ready_payload = payload

    def on_snapshot(self, instance: InstanceId) -> None:
        """It pushed a load report: from the first one on, it serves (from the links)."""
        record = self._instances.get(instance)
        if record is None or record.state is not InstanceState.STARTING or not record.ready_payload:
            return
        record.state, record.stage = InstanceState.READY, "ready"
        self._progress(f"instance {instance}: ready ({time.monotonic() - record.started_s:.0f} s)")
        self._on_joined(record)
        future = self._starting.pop(instance, None)
        if future is not None and not future.done():
            future.set_result(record)

    def on_exit(self, instance: InstanceId, returncode: int) -> None:
        """Its process is gone (from the launcher)."""
        record = self._instances[instance]
        was, record.state = record.state, InstanceState.DEAD
        if self._closing:
            return
        future = self._starting.pop(instance, None)
        if future is not None and not future.done():
            future.set_exception(
                LaunchError(
                    f"instance {instance} ended with exit code {returncode} while {record.stage}; "
                    "its log above says why"
                )
            )
        if was is not InstanceState.STARTING:
            logger.error("instance %d ended unexpectedly (exit code %d)", instance, returncode)
            self._on_lost(record, returncode)
