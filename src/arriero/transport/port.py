"""The port through which KV blocks travel from one process to another.

It is complete because a block transfer is only this: the exporter gathers blocks into staging memory and
writes a ticket about it; the ticket travels with the control messages; the importer fetches what the ticket
names. Who may overwrite whose memory, and when, is the migration protocol's business (`core/llumlet.py`).

One conformance suite (`tests/transport/test_transport_conformance.py`) holds for every implementation.
"""

from __future__ import annotations

from typing import Any, Protocol

Ticket = dict[str, Any]
"""Plain msgpack-able values: tells a peer how to fetch. Every kind has ``kind`` and ``num_bytes``."""


class BlockTransport(Protocol):
    """Staging memory on one side, a view of it on the other. All methods may be called from any thread."""

    def stage(self, key: str, num_bytes: int) -> memoryview:
        """Writable memory of ``num_bytes`` (more than 0) for one export; its contents are undefined.

        A key that is staged again gets memory anew and its earlier ticket is void, so the peer must have
        fetched before. The view must not be written to after :meth:`release`.
        Raises TransportError if there is no room.
        """

    def ticket(self, key: str) -> Ticket:
        """How a peer fetches what was staged last under ``key``. Raises TransportError for an unknown key."""

    def fetch(self, ticket: Ticket) -> memoryview:
        """Read-only view of the bytes that the ticket names; to be copied out before the key is released.

        Raises TransportError, saying what is missing, if the ticket is malformed or void, or the peer is gone.
        """

    def release(self, key: str) -> None:
        """The export is over: the memory goes back to a pool and the ticket is void. Idempotent."""

    def close(self) -> None:
        """Give back everything; staging and fetching raise from now on. Idempotent."""

    def check_integrity(self) -> None:
        """Raise TransportError if the books contradict themselves or the memory."""

    @property
    def num_open(self) -> int:
        """Keys that are staged and not released: 0 when no export is open."""
