"""The instances of this front end: who is starting, ready, draining or dead, and their processes."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from arriero.core.errors import LaunchError, NotFoundError
from arriero.core.restarts import Place
from arriero.core.types import InstanceId, InstanceState
from arriero.launch.memory import OutOfMemory
from arriero.launch.port import Launcher, LaunchSpec

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
MakeSpec = Callable[[InstanceId, Place], LaunchSpec]

MAX_DEAD = 20
"""So many of the dead are remembered, for people."""


@dataclass(slots=True)
class Instance:
    """One instance and its process."""

    instance_id: InstanceId
    pid: int
    host: str
    place: Place
    state: InstanceState
    started_s: float
    stage: str = "starting"  #: of its start-up; once it is dead: how that came
    replaces: InstanceId | None = None
    replaced_by: InstanceId | None = None
    ready_payload: bytes = b""
    is_ending: bool = False  #: on our order
    is_refused: bool = False  #: it may not join
    is_killed: bool = False  #: by us
    died_from_outside: bool = False  #: by a SIGKILL that is neither ours nor the kernel's, for memory

    @property
    def serves(self) -> bool:
        """Whether requests may run there."""
        return self.state in (InstanceState.READY, InstanceState.DRAINING)


class Instances:
    """Starts instances in parallel, waits for them, and learns of their end."""

    def __init__(
        self,
        launcher: Launcher,
        make_spec: MakeSpec,
        *,
        on_joined: Callable[[Instance], None],
        on_lost: Callable[[Instance, int], None],
        on_left: Callable[[Instance], None],
        on_drain_asked: Callable[[InstanceId], None],
        progress: Progress,
        refusal: Callable[[bytes], str | None] = lambda payload: None,
        memory_ran_out: Callable[[], bool] | None = None,
    ) -> None:
        self.make_spec = make_spec  #: of the next launches
        self._launcher = launcher
        self._on_joined = on_joined
        self._on_lost = on_lost
        self._on_left = on_left
        self._on_drain_asked = on_drain_asked
        self._progress = progress
        self._refusal = refusal
        self._memory_ran_out = memory_ran_out or OutOfMemory().happened
        self._instances: dict[InstanceId, Instance] = {}
        self._starting: dict[InstanceId, asyncio.Future[Instance]] = {}
        self._ends: dict[InstanceId, asyncio.Future[int]] = {}
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
        """Instances that serve and take new requests."""
        return [i.instance_id for i in self if i.state is InstanceState.READY]

    def is_dead(self, instance: InstanceId) -> bool:
        """Whether it has ended; also of one that is forgotten."""
        found = self._instances.get(instance)
        return found is None or found.state is InstanceState.DEAD

    def place_of(self, instance: InstanceId) -> Place:
        """Where it runs, or ran; 0 if it is forgotten."""
        found = self._instances.get(instance)
        return 0 if found is None else found.place

    def replacement_of(self, dead: Instance) -> Instance:
        """What was started in its place; itself, if nothing could be."""
        return dead if dead.replaced_by is None else self[dead.replaced_by]

    # ------------------------------------------------------------------ starting

    def launch(self, *, place: Place | None = None, replaces: InstanceId | None = None) -> asyncio.Future[Instance]:
        """Start one more instance; the future is done when it is ready, or raises LaunchError.

        ``place`` None: the first one where nobody is. Raises LaunchError at once if there is no process at all.
        """
        if self._closing:
            raise LaunchError("no instance is started any more: the server ends")
        if place is None:
            place = self._free_place()
        instance_id, self._next_id = self._next_id, self._next_id + 1
        future: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        launched = self._launcher.start(instance_id, self.make_spec(instance_id, place), self)
        self._instances[instance_id] = Instance(
            instance_id=instance_id,
            pid=launched.pid,
            host=launched.host,
            place=place,
            state=InstanceState.STARTING,
            started_s=time.monotonic(),
            replaces=replaces,
        )
        if replaces in self._instances:
            self._instances[replaces].replaced_by = instance_id
        self._starting[instance_id] = future
        self._ends[instance_id] = asyncio.get_running_loop().create_future()
        in_place_of = "" if replaces is None else f", in place of instance {replaces}"
        self._progress(f"instance {instance_id}: starting (pid {launched.pid}{in_place_of})")
        self._forget_old_dead()
        return future

    def _free_place(self) -> Place:
        taken = {i.place for i in self if i.state is not InstanceState.DEAD}
        return next(place for place in range(len(taken) + 1) if place not in taken)

    def _forget_old_dead(self) -> None:
        dead = [i.instance_id for i in self if i.state is InstanceState.DEAD]
        for instance in dead[:-MAX_DEAD]:
            del self._instances[instance]

    # ------------------------------------------------------------------ ending

    def drain(self, instance: InstanceId) -> None:
        """It serves on, and takes nothing new."""
        self[instance].state = InstanceState.DRAINING

    def end(self, instance: InstanceId) -> asyncio.Future[int]:
        """Order it to end; the future has its exit code."""
        self[instance].is_ending = True
        self._launcher.end(instance)
        return self._ends[instance]

    def kill(self, instance: InstanceId, why: str) -> None:
        """Kill it; what follows is the same as if it had died by itself, or ended if it was told to."""
        record = self[instance]
        if record.is_ending:
            self._progress(f"instance {instance}: killed: {why}")
        else:
            logger.error("instance %d is killed: %s", instance, why)
        record.stage, record.is_killed = why, True
        self._launcher.kill(instance)

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

    def on_drain_asked(self, instance: InstanceId) -> None:
        """An operator wants it to end (from the launcher)."""
        if not self._closing:
            self._on_drain_asked(instance)

    def on_ready(self, instance: InstanceId, payload: bytes) -> None:
        """It has connected (from the links)."""
        record = self._instances.get(instance)
        if record is None:
            logger.warning("an unknown instance %d has connected; it is ignored", instance)
            return
        if record.state is not InstanceState.STARTING:
            logger.warning("instance %d is %s and says again that it starts; it is ignored", instance, record.state)
            return
        if (reason := self._refusal(payload)) is not None:
            self._refuse(record, reason)
            return
        record.ready_payload = payload

    def _refuse(self, record: Instance, reason: str) -> None:
        record.is_refused = True
        future = self._starting.pop(record.instance_id, None)
        if future is not None and not future.done():
            future.set_exception(LaunchError(f"instance {record.instance_id} may not join: {reason}"))
        self.kill(record.instance_id, f"may not join: {reason}")

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
        memory_ran_out = self._memory_ran_out()
        record.died_from_outside = returncode == -signal.SIGKILL and not record.is_killed and not memory_ran_out
        self._ends.pop(instance).set_result(returncode)
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
        if record.is_refused:
            return  # whoever has started it knows already, and why
        if was is InstanceState.STARTING:
            record.stage = f"did not start: {_how(returncode)}"
        elif record.is_ending:
            record.stage = "drained"
            self._progress(f"instance {instance}: ended")
            self._on_left(record)
        else:
            record.stage = _how(returncode) if record.stage == "ready" else record.stage
            logger.error("instance %d ended unexpectedly (exit code %d)", instance, returncode)
            self._on_lost(record, returncode)


def _how(returncode: int) -> str:
    """An exit code in words."""
    return f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"
