"""The instances of a simulation: who is there from when until when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from arriero.core.types import InstanceId
from arriero.sim.virtual_instance import VirtualInstance


@dataclass(slots=True)
class Life:
    """Of one instance, in seconds of virtual time; what it costs counts from ``launched_s``."""

    launched_s: float
    stopped_s: float = math.inf

    def seconds(self, end_s: float) -> float:
        """How long it was paid for, until ``end_s``."""
        return max(0.0, min(self.stopped_s, end_s) - self.launched_s)


class Membership(Sequence[VirtualInstance]):
    """All instances that ever were, by number; iterate over :meth:`present` for those that are."""

    def __init__(self, make: Callable[[InstanceId], VirtualInstance]) -> None:
        self._make = make
        self._all: list[VirtualInstance] = []
        self._present: dict[InstanceId, VirtualInstance] = {}
        self.lives: list[Life] = []

    def launch(self, now: float) -> VirtualInstance:
        """One more, which is being started."""
        instance = self._make(len(self._all))
        self._all.append(instance)
        self.lives.append(Life(now))
        return instance

    def joined(self, instance: InstanceId) -> None:
        """It serves."""
        self._present[instance] = self._all[instance]

    def stop(self, instance: InstanceId, now: float) -> None:
        """It is gone."""
        self._present.pop(instance, None)  # it may have died while it was started
        self.lives[instance].stopped_s = now

    def is_present(self, instance: InstanceId) -> bool:
        """Whether it serves or drains."""
        return instance in self._present

    def has_stopped(self, instance: InstanceId) -> bool:
        """Whether it was there, and is gone."""
        return not math.isinf(self.lives[instance].stopped_s)

    def present(self) -> Iterator[VirtualInstance]:
        """Those that serve or drain."""
        return iter(list(self._present.values()))

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> VirtualInstance: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[VirtualInstance]: ...
    def __getitem__(self, index: int | slice) -> VirtualInstance | Sequence[VirtualInstance]:
        return self._all[index]
