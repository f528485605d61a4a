"""Which instances have gone silent: they are asked whether they live, and if no answer comes they count as hung.

An instance answers between two steps. One that steps says so by itself; one that has nothing to do is asked. So
``timeout_s`` must be longer than any single step.
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero.core.types import InstanceId

_TICKS = 8  # in a timeout
_MAX_TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask the instance for a sign of life."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Hung:
    """It has not answered for ``silent_s``: kill it."""

    instance: InstanceId
    silent_s: float


class Watchdog:
    """Silence of each instance, in seconds during which we were awake ourselves."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._silent_s: dict[InstanceId, float] = {}
        self._asked: set[InstanceId] = set()
        self._ticked_s: float | None = None

    @property
    def tick_s(self) -> float:
        """How often :meth:`tick` should be called."""
        return min(self._timeout_s / _TICKS, _MAX_TICK_S) if self._timeout_s else _MAX_TICK_S

    def watch(self, instance: InstanceId) -> None:
        """It serves from now on."""
        self._silent_s[instance] = 0.0

    def heard(self, instance: InstanceId) -> None:
        """It said something. Of instances that are not watched, nothing is noted."""
        if instance in self._silent_s:
            self._silent_s[instance] = 0.0
            self._asked.discard(instance)

    def forget(self, instance: InstanceId) -> None:
        """It is gone, or about to go. Idempotent."""
        self._silent_s.pop(instance, None)
        self._asked.discard(instance)

    def tick(self, now: float) -> list[Ping | Hung]:
        """What to do now. A tick that comes late counts as two at most: the whole machine may have stood still, and
        then nobody else could speak either. Each instance is found hung once.
        """
        late_s = 0.0 if self._ticked_s is None else min(now - self._ticked_s, 2 * self.tick_s)
        self._ticked_s = now
        if not self._timeout_s:
            return []
        verdicts: list[Ping | Hung] = []
        for instance in list(self._silent_s):
            silent_s = self._silent_s[instance] = self._silent_s[instance] + late_s
            if silent_s >= self._timeout_s:
                self.forget(instance)
                verdicts.append(Hung(instance, silent_s))
            elif silent_s >= self._timeout_s / 2 and instance not in self._asked:
                self._asked.add(instance)
                verdicts.append(Ping(instance))
        return verdicts
