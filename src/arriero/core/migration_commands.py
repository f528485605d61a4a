"""What the owner of a migration wants done; see :mod:`arriero.core.migration`."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.core.messages import Message
from arriero.core.types import InstanceId


@dataclass(frozen=True, slots=True)
class Park:
    """Send the request itself to ``instance``, not to be scheduled before COMMIT."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``message`` to ``instance`` and bring back its answer."""

    instance: InstanceId
    message: Message


@dataclass(frozen=True, slots=True)
class Abort:
    """Tell ``instance`` to abort the request."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Route:
    """From now on the request's tokens come from ``instance``."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call :meth:`Migration.on_time` at ``time_s``."""

    time_s: float


@dataclass(frozen=True, slots=True)
class Replay:
    """No instance holds the request any more: continue it somewhere from the token log."""


@dataclass(frozen=True, slots=True)
class End:
    """The outcome is known (clean-up may still be running)."""

    ok: bool
    reason: str


Command = Park | Send | Abort | Route | WakeAt | Replay | End
