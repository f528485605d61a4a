"""The global queue: requests that no instance has been given yet."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from arriero.core.types import Dispatchable, RequestId


@dataclass(order=True, slots=True)
class Queued:
    """A request in the queue: replays first, since their streams have begun; then by priority; then who is due first,
    that is by arrival among those with the same target.
    """

    order: tuple[bool, int, float, int]
    request: Dispatchable = field(compare=False)
    since_s: float = field(compare=False)


class RequestQueue:
    """Priority, then the earliest deadline first: arrival and the target for the first token. A request without one
    has ``ttft_target_s``, and ``ttft_target_s_per_token`` for each token of its prompt. So it is overtaken by those in
    a greater hurry, but not for ever: by a prompt of n tokens less only if that comes within n times the latter.
    """

    def __init__(self, ttft_target_s: float = 0.0, ttft_target_s_per_token: float = 0.0) -> None:
        self._ttft_target_s = ttft_target_s
        self._ttft_target_s_per_token = ttft_target_s_per_token
        self._line: list[Queued] = []
        self._live: dict[RequestId, Queued] = {}
        self._number = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._line)

    def push(self, request: Dispatchable, now: float) -> None:
        """Queue a request that is not queued."""
        self._number += 1
        target_s = request.ttft_target_s
        if target_s is None:
            target_s = self._ttft_target_s + request.num_prompt_tokens * self._ttft_target_s_per_token
        entry = Queued((not request.is_replay, request.priority, now + target_s, self._number), request, now)
        self._live[request.request_id] = entry
        self._num_tokens += request.num_prompt_tokens + 1
        insort(self._line, entry)

    def remove(self, request_id: RequestId) -> bool:
        """Take a request out, if it is here; whether it was."""
        entry = self._live.pop(request_id, None)
        if entry is None:
            return False
        self._num_tokens -= entry.request.num_prompt_tokens + 1
        del self._line[bisect_left(self._line, entry)]
        return True

    def first(self, num: int) -> Iterator[Dispatchable]:
        """Up to so many, in order; the queue may change meanwhile."""
        return iter([entry.request for entry in islice(self._line, num)])

    def shortest(self, num: int, late_s: float) -> Iterator[Dispatchable]:
        """As :meth:`first`, but among equals the short prompts first, behind those that came before ``late_s``."""

        def place(entry: Queued) -> tuple[tuple[bool, int], int, tuple[float, int]]:
            size = entry.request.num_prompt_tokens if entry.since_s >= late_s else 0
            return entry.order[:2], size, entry.order[2:]

        return iter([entry.request for entry in sorted(islice(self._line, num), key=place)])

    def demand(self) -> tuple[int, int]:
        """Requests in the queue, and the tokens that their prompts take."""
        return len(self._line), self._num_tokens

    def older_than(self, since_s: float) -> list[Dispatchable]:
        """Those that came before ``since_s``, in the order of the queue."""
        return [q.request for q in self._line if q.since_s < since_s]
