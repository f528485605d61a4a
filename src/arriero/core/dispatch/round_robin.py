"""Dispatch one after the other."""

from __future__ import annotations

from bisect import bisect_right

from arriero.core.types import Dispatchable, InstanceId
from arriero.core.view import ClusterView


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """The candidate after the last one chosen, in the order of their numbers."""
        candidates = view.candidates
        after = bisect_right(candidates, self._last)
        self._last = candidates[after % len(candidates)]
        return self._last
