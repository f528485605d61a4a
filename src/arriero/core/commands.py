"""What the scheduler wants done. Production's shell and the simulator's carry commands out, and decide nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from arriero.core.types import InstanceId, MigrationMode, RequestId


class RejectKind(StrEnum):
    """Why a request is not served; the HTTP status says it, too."""

    UNAVAILABLE = "unavailable"  #: no instance is there: 503
    IMPOSSIBLE = "impossible"  #: it could never run: 400
    OVERLOADED = "overloaded"  #: too many wait already: 429


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Send the request to the instance."""

    request_id: RequestId
    instance: InstanceId
    reason: str
    alternatives: tuple[tuple[InstanceId, float, int], ...] = ()
    """All candidates with freeness and outstanding requests, as they were; empty where that is a long list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """End the request: it is served nowhere."""

    request_id: RequestId
    kind: RejectKind
    reason: str
    retry_after_s: float | None = None  #: OVERLOADED: when to try again


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Migrate the request."""

    request_id: RequestId
    source: InstanceId
    destination: InstanceId
    reason: str
    mode: MigrationMode = MigrationMode.LIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Start so many more instances."""

    num_instances: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Let the instance empty; the scheduler regards it as draining from now on."""

    instance: InstanceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """End a draining instance: it is empty."""

    instance: InstanceId


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFailed:
    """A policy raised or chose nonsense; the safe default decided in its place. To be counted and logged."""

    policy: str
    error: str


Command = Dispatch | Reject | Move | Launch | Drain | Stop | PolicyFailed
