"""Ranking: the best of many instances when few change at a time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from arriero.core.types import InstanceId
from arriero.core.view import ClusterView

Key = Callable[[ClusterView, InstanceId], tuple[Any, ...]]


class Ranking:
    """The candidate with the least ``key``, in O(log n) for each change since the last question.

    A heap with lazy deletion: an instance that changed is pushed anew, and what lies on top is dropped unless it is the
    latest of its instance.
    """

    def __init__(self, key: Key) -> None:
        self._key = key
        self._view: ClusterView | None = None
        self._changed: set[InstanceId] = set()
        self._latest: dict[InstanceId, tuple[Any, ...]] = {}
        self._heap: list[tuple[Any, ...]] = []

    def best(self, view: ClusterView) -> InstanceId:
        """The candidate whose key is least; ties go to the lower number. There must be one."""
        if view is not self._view:
            self._view, self._changed = view, view.follow()
            self._latest, self._heap = {}, []
        self._update(view)
        heap, latest = self._heap, self._latest
        while latest.get(heap[0][-1]) is not heap[0]:
            heapq.heappop(heap)
        best: InstanceId = heap[0][-1]
        return best

    def _update(self, view: ClusterView) -> None:
        for instance in self._changed:
            if view.is_candidate(instance):
                entry = (*self._key(view, instance), instance)
                self._latest[instance] = entry
                heapq.heappush(self._heap, entry)
            else:
                self._latest.pop(instance, None)
        self._changed.clear()
        if len(self._heap) > 4 * len(self._latest) + 16:
            self._heap = list(self._latest.values())
            heapq.heapify(self._heap)
