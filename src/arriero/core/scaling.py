"""Scaling: how many instances there should be."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

from arriero.core.commands import Drain, Launch
from arriero.core.config import ScalingConfig
from arriero.core.load import freeness
from arriero.core.types import InstanceId
from arriero.core.view import ClusterView


@dataclass(frozen=True, slots=True)
class Capacity:
    """The load of the whole cluster."""

    free_blocks: float  #: over all candidates; less what waits in the global queue
    num_running: int  #: and waiting globally
    blocks_per_instance: float

    def later(self, growth: float, ahead_s: float) -> Capacity:
        """What it will be in ``ahead_s`` seconds if the demand goes on growing by ``growth`` blocks a second."""
        return replace(self, free_blocks=self.free_blocks - growth * ahead_s)

    def freeness(self, num_more: int = 0) -> float:
        """Average freeness with so many instances more (or, below 0, less) and the same load."""
        return (self.free_blocks + num_more * self.blocks_per_instance) / max(1, self.num_running)


class Scaler:
    """Keeps the average freeness in [low, high] (Llumnix, OSDI'24, section 4.4.3).

    The average is over running requests: the sum of free blocks by the sum of running requests, so that an idle
    instance counts for the memory that it has and no more. Below ``low`` for ``period_s``, instances are added until
    the projected average reaches it; if it would be above ``high`` without one, that with the fewest running requests
    is drained.
    """

    def __init__(self, config: ScalingConfig) -> None:
        self._config = config
        self._low_since_s = self._high_since_s = math.inf
        self._acted_s = -math.inf
        self._start_s = config.start_s  # from the order to start an instance until it serves, as last seen
        self._launches: deque[float] = deque()  # when those that are starting were ordered
        self._demands: deque[tuple[float, float]] = deque()  # (time, blocks) of the last two periods

    def round(self, view: ClusterView, queued: tuple[int, int], num_starting: int, now: float) -> list[Launch | Drain]:
        """What to start or to drain now. ``queued``: requests in the global queue, and the blocks that they need."""
        config, num = self._config, len(view.candidates) + num_starting
        if num < config.min_instances:
            return self._launch(config.min_instances - num, f"{num} instances, at least {config.min_instances}", now)
        capacity = self._capacity(view, queued, num_starting)
        if capacity is None:
            return []
        while len(self._launches) > num_starting:
            self._start_s = now - self._launches.popleft()
        growth: float | None = 0.0
        if config.looks_ahead:
            growth = self._growth(num * capacity.blocks_per_instance - capacity.free_blocks, now)
            capacity = capacity.later(growth or 0.0, self._start_s)
        average = capacity.freeness()
        self._low_since_s = min(self._low_since_s, now) if average < config.low_freeness else math.inf
        is_spare = capacity.freeness(-1) > config.high_freeness and num_starting == 0 and growth is not None
        self._high_since_s = min(self._high_since_s, now) if is_spare else math.inf
        if now - self._acted_s < config.cooldown_s:
            return []
        if now - self._low_since_s >= config.period_s and num < config.max_instances:
            lacking = config.low_freeness * capacity.num_running - capacity.free_blocks
            num_more = min(math.ceil(lacking / capacity.blocks_per_instance), config.max_instances - num)
            return self._launch(max(1, num_more), f"average freeness {average:.1f}", now)
        if now - self._high_since_s >= config.period_s and num > config.min_instances:
            return self._drain(view, capacity, now)
        return []

    def _growth(self, demand: float, now: float) -> float | None:
        """Blocks a second by which the demand grew in each of the last two periods, at least: a jump is no growth.
        None: not known yet.
        """
        demands, period_s = self._demands, self._config.period_s
        demands.append((now, demand))
        while len(demands) > 1 and demands[1][0] <= now - 2 * period_s:
            demands.popleft()
        first_s, first = demands[0]
        if now - first_s < 2 * period_s:
            return None
        if not period_s:
            return 0.0
        middle = next(d for t, d in reversed(demands) if t <= now - period_s)
        return max(0.0, min(middle - first, demand - middle) / period_s)

    def _launch(self, num_instances: int, reason: str, now: float) -> list[Launch | Drain]:
        self._acted_s, self._low_since_s = now, math.inf
        self._launches.extend([now] * num_instances)
        return [Launch(num_instances=num_instances, reason=reason)]

    def _drain(self, view: ClusterView, capacity: Capacity, now: float) -> list[Launch | Drain]:
        self._acted_s, self._high_since_s = now, math.inf
        fewest = min(view.candidates, key=lambda i: (_num_running(view, i), -i))
        reason = f"average freeness {capacity.freeness(-1):.1f} without it"
        return [Drain(instance=fewest, reason=reason)]

    def _capacity(self, view: ClusterView, queued: tuple[int, int], num_starting: int) -> Capacity | None:
        """None before the first snapshot."""
        snapshots = [s for i in view.candidates if (s := view.snapshots.get(i)) is not None]
        if not snapshots:
            return None
        size = sum(s.num_blocks for s in snapshots) / len(snapshots)
        num_queued, queued_blocks = queued
        # Freeness times its denominator is what is free; priorities' headroom counts as in dispatch.
        free = sum(freeness(s, view.config) * max(1, s.num_running) for s in snapshots)
        return Capacity(
            free_blocks=free + num_starting * size - queued_blocks,
            num_running=sum(s.num_running for s in snapshots) + num_queued,
            blocks_per_instance=size,
        )


def _num_running(view: ClusterView, instance: InstanceId) -> int:
    snapshot = view.snapshots.get(instance)
    return (snapshot.num_running if snapshot is not None else 0) + view.ledger.num_pending(instance)
