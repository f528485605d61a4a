"""Which instances of a simulation die, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from arriero.core.errors import ConfigError
from arriero.core.types import InstanceId


@dataclass(frozen=True, slots=True, order=True)
class Kill:
    """``instance`` dies at ``time_s``."""

    time_s: float
    instance: InstanceId

    def __str__(self) -> str:
        return f"{self.time_s:g}:{self.instance}"


def parse_kills(values: Iterable[str]) -> tuple[Kill, ...]:
    """Of ``--kill TIME_S:INSTANCE``, by time. Raises ConfigError."""
    kills = []
    for value in values:
        time_s, _, instance = value.partition(":")
        try:
            kills.append(Kill(float(time_s), int(instance)))
        except ValueError:
            raise ConfigError(
                f"--kill {value} is invalid: give a time in seconds and an instance, as in --kill 30:2"
            ) from None
    return tuple(sorted(kills))


def check_kills(kills: Sequence[Kill], num_instances: int, *, may_grow: bool) -> None:
    """Raise ConfigError if one cannot be. A dead instance's replacement has the next number that nobody has had;
    ``may_grow``: scaling may start more.
    """
    dead: set[InstanceId] = set()
    for kill in sorted(kills):
        if not 0 <= kill.time_s < math.inf:
            raise ConfigError(f"--kill {kill} is invalid: the time must be 0 or more seconds")
        num_known = num_instances + len(dead)
        if kill.instance in dead:
            raise ConfigError(f"--kill {kill} is invalid: instance {kill.instance} is dead by then, name another")
        if kill.instance < 0 or (kill.instance >= num_known and not may_grow):
            raise ConfigError(
                f"--kill {kill} is invalid: there is no instance {kill.instance} at that time, "
                f"name one from 0 to {num_known - 1}"
            )
        dead.add(kill.instance)
