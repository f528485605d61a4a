"""The Launcher port: starts and stops instances, and says when one died."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from arriero.core.types import InstanceId


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """What to run for an instance: a Python module that reads ``payload`` from its standard input."""

    module: str
    payload: bytes
    env: Mapping[str, str] = field(default_factory=dict)
    cores: frozenset[int] | None = None  #: CPU cores to pin it to; None: not pinned


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A process that was started."""

    pid: int
    host: str


class LaunchEvents(Protocol):
    """Who hears about the processes; called on the event loop."""

    def on_status(self, instance: InstanceId, stage: str) -> None:
        """The instance reports how far its start-up is."""

    def on_drain_asked(self, instance: InstanceId) -> None:
        """The process was told to end (SIGTERM), and asks to be emptied first."""

    def on_exit(self, instance: InstanceId, returncode: int) -> None:
        """The process is gone."""


class Launcher(Protocol):
    """Complete because an instance is only started, watched and ended, one way or the other."""

    def start(self, instance: InstanceId, spec: LaunchSpec, events: LaunchEvents) -> Launched:
        """Start an instance. Raises LaunchError."""

    def end(self, instance: InstanceId) -> None:
        """Order it to end, and return. Idempotent."""

    def kill(self, instance: InstanceId) -> None:
        """Kill it with all its children, and return. Idempotent."""

    def stop(self, instance: InstanceId, timeout_s: float) -> None:
        """Order it to end, wait, then kill it with all its children. Blocking, idempotent."""

    def stop_all(self, timeout_s: float) -> None:
        """The same for all instances, at the same time. Thread-safe."""
