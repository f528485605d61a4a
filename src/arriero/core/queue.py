"""The global queue: requests that no instance has been given yet."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from arriero.core.types import Dispatchable, RequestId


@dataclass(order=True, slots=True)
class Queued:
    """A request in the queue: replays first, since their streams have begun; then by priority, then by arrival."""

    order: tuple[bool, int, int]
    request: Dispatchable = field(compare=False)
    since_s: float = field(compare=False)


class RequestQueue:
    """Priority, then first come, first served."""

    def __init__(self) -> None:
        self._heap: list[Queued] = []
        self._live: dict[RequestId, Queued] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._live)

    def push(self, request: Dispatchable, now: float) -> None:
        """Queue a request that is not queued."""
        self._number += 1
        entry = Queued((not request.is_replay, request.priority, self._number), request, now)
        self._live[request.request_id] = entry
        heapq.heappush(self._heap, entry)

    def head(self) -> Queued | None:
        """Who is next."""
        while self._heap and self._live.get(self._heap[0].request.request_id) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def remove(self, request_id: RequestId) -> bool:
        """Take a request out, if it is here; whether it was."""
        return self._live.pop(request_id, None) is not None

    def older_than(self, since_s: float) -> list[Dispatchable]:
        """Those that came before ``since_s``, in the order of the queue."""
        return [q.request for q in sorted(q for q in self._live.values() if q.since_s < since_s)]
