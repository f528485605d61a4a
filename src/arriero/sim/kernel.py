"""The event loop of the simulator: a heap of (time, order, number, callback) and a clock that jumps."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Kernel:
    """Virtual time in seconds, from 0. Events at the same time run by ``order``, then in the order of their making."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, int, Callable[[], None]]] = []
        self._number = 0

    def at(self, time_s: float, callback: Callable[[], None], order: int = 0) -> None:
        """Call back at ``time_s``, not before now."""
        if not time_s >= self.now:
            raise ValueError(f"an event at {time_s!r} s cannot be: it is {self.now!r} s already")
        self._number += 1
        heapq.heappush(self._heap, (time_s, order, self._number, callback))

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap = self._heap
        while heap:
            self.now, _, _, callback = heapq.heappop(heap)
            callback()
