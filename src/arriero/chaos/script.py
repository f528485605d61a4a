"""Fault scripts: what is done to whom, and when.

    duration_s: 60
    faults:
      - {at_s: 5, action: kill}                       # a backend chosen by the seed
      - {at_s: 12, action: stop, target: 1, for_s: 2} # the second backend, SIGSTOP and SIGCONT
      - {at_tokens: 5000, action: drain}
      - {at_event: migration, action: kill}           # arriero's events only

YAML or JSON. `kill=10,stop=5` stands for so many of each at random moments.
"""

from __future__ import annotations

import random
from enum import StrEnum
from pathlib import Path

import msgspec

from arriero.core.errors import ConfigError

MAX_FAULTS = 1000
MAX_DURATION_S = 3600.0
QUIET_SHARE = 0.1
"""No random fault in this share of the time at the beginning and at the end: before and after belong to the picture."""


class Action(StrEnum):
    """What can be done to a backend."""

    KILL = "kill"  #: SIGKILL to all its processes
    STOP = "stop"  #: SIGSTOP, and SIGCONT after ``for_s``
    DRAIN = "drain"  #: ask the server to move everything away and end it
    CUT = "cut"  #: its connections break, it stays
    CORRUPT = "corrupt"  #: bytes of KV blocks on their way change in shared memory, while requests are moved
    SLOW_DISK = "slow_disk"  #: what the server writes its log to takes nothing for ``for_s``


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fault. Exactly one of the ``at_...`` says when."""

    action: Action
    at_s: float | None = None  #: since the load began
    at_tokens: int | None = None  #: once so many tokens have come in all
    at_requests: int | None = None  #: once so many requests have ended
    at_event: str | None = None  #: at the next event of this name in `GET /events`
    target: int | None = None  #: index of the backend; None: the seed chooses among those that are up
    for_s: float = 1.0

    def __post_init__(self) -> None:
        moments = [m for m in (self.at_s, self.at_tokens, self.at_requests, self.at_event) if m is not None]
        if len(moments) != 1:
            raise ValueError("exactly one of at_s, at_tokens, at_requests, at_event says when a fault comes")
        if any(isinstance(m, int | float) and m < 0 for m in moments) or not 0 < self.for_s <= 60:
            raise ValueError("times and counts are 0 or more, for_s is more than 0 and at most 60 seconds")
        if self.target is not None and self.target < 0:
            raise ValueError(f"target {self.target} is no index of a backend: they count from 0")


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Faults in the order of the file."""

    faults: tuple[Fault, ...]
    duration_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise ValueError(f"duration_s={self.duration_s} is not in (0, {MAX_DURATION_S:.0f}]")
        if len(self.faults) > MAX_FAULTS:
            raise ValueError(f"{len(self.faults)} faults are too many: {MAX_FAULTS} at most")


def read_script(path: Path) -> Script:
    """A script file. Raises ConfigError, naming what is wrong and where."""
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=Script)
    except OSError as error:
        raise ConfigError(f"fault script {path} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"fault script {path}: {' '.join(str(error).split())}") from error


def random_script(counts: str, *, duration_s: float, rng: random.Random) -> Script:
    """`kill=10,stop=5`: so many of each, at random moments. Raises ConfigError."""
    middle = (QUIET_SHARE * duration_s, (1 - QUIET_SHARE) * duration_s)
    actions = [action for action, count in _counts(counts) for _ in range(count)]
    faults = [
        Fault(action=action, at_s=round(rng.uniform(*middle), 3), for_s=round(rng.uniform(0.5, 2.0), 3))
        for action in actions
    ]
    try:
        return Script(faults=tuple(sorted(faults, key=lambda f: f.at_s or 0.0)), duration_s=duration_s)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _counts(counts: str) -> list[tuple[Action, int]]:
    found = []
    for part in filter(None, counts.split(",")):
        name, _, count = part.strip().partition("=")
        if name not in list(Action) or not (count or "1").isdecimal():
            known = ", ".join(Action)
            raise ConfigError(f"--faults {part.strip()!r} is not understood: write ACTION=COUNT, with one of {known}")
        found.append((Action(name), min(int(count or "1"), MAX_FAULTS + 1)))
    return found
