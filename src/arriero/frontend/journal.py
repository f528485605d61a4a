"""The numbered events of one stream, for a client that comes back: a bounded number of bytes, the latest."""

from __future__ import annotations

from collections import deque

from arriero.core.errors import GoneError


class Journal:
    """Events in order, numbered from 1. Those that the client has not taken yet are never dropped."""

    def __init__(self) -> None:
        self._events: deque[bytes] = deque()
        self._first = 1  # number of the oldest event that is kept
        self._taken = 0
        self.num_bytes = 0

    @property
    def last(self) -> int:
        """Number of the newest event; 0 before the first."""
        return self._first + len(self._events) - 1

    def append(self, event: bytes) -> int:
        """One more event; returns its size in bytes, with its number."""
        numbered = b"id: %d\n%b" % (self.last + 1, event)
        self._events.append(numbered)
        self.num_bytes += len(numbered)
        return len(numbered)

    def taken(self, number: int) -> None:
        """The client has all events up to ``number``, and may lose none of those behind it."""
        self._taken = number

    def drop_oldest(self) -> int:
        """Forget the oldest event, if the client has taken it; returns its bytes, 0 if there is none such."""
        if self._first > self._taken or not self._events:
            return 0
        size = len(self._events.popleft())
        self._first += 1
        self.num_bytes -= size
        return size

    def after(self, number: int) -> list[bytes]:
        """All events behind ``number``. Raises GoneError if some of them were dropped."""
        if number + 1 < self._first:
            raise GoneError(
                f"events {number + 1} to {self._first - 1} are not kept any more, only those from {self._first} on: "
                "the client was too far behind; send the request again"
            )
        return [self._events[i] for i in range(number + 1 - self._first, len(self._events))]
