"""Who carries the bytes of KV blocks for a simulated engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from arriero.core.engine_port import Export
from arriero.core.errors import TransportError
from arriero.core.types import MigrationId
from arriero.sim.blocks import BlockPool


class BlockCopier(Protocol):
    """Copies blocks of the pool out and in. ``start_*`` return at once; the end is reported to the llumlet."""

    def start_export(self, migration_id: MigrationId, block_ids: Sequence[int], share: float) -> None:
        """Begin to export; ``share`` of the time may go into it."""

    def export_now(self, migration_id: MigrationId, block_ids: Sequence[int]) -> Export:
        """Export between two steps."""

    def close_export(self, migration_id: MigrationId) -> None:
        """Free what the exports of this migration hold. Idempotent."""

    def start_import(self, migration_id: MigrationId, block_ids: Sequence[int], ticket: Any, share: float) -> None:
        """Begin to import."""

    def import_now(self, migration_id: MigrationId, block_ids: Sequence[int], ticket: Any) -> Export:
        """Import between two steps."""


class InlineCopier:
    """For tests in one process: the ticket is the bytes, and copies end when :meth:`finish` is called."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._running: list[tuple[MigrationId, Sequence[int], Any]] = []

    def start_export(self, migration_id: MigrationId, block_ids: Sequence[int], share: float) -> None:
        """See :class:`BlockCopier`."""
        self._running.append((migration_id, block_ids, None))

    def start_import(self, migration_id: MigrationId, block_ids: Sequence[int], ticket: Any, share: float) -> None:
        """See :class:`BlockCopier`."""
        self._running.append((migration_id, block_ids, ticket))

    def export_now(self, migration_id: MigrationId, block_ids: Sequence[int]) -> Export:
        """See :class:`BlockCopier`."""
        assert self._pool.contents is not None
        data = self._pool.contents[list(block_ids)].tobytes()
        return Export(ticket=data, num_bytes=len(data))

    def import_now(self, migration_id: MigrationId, block_ids: Sequence[int], ticket: Any) -> Export:
        """See :class:`BlockCopier`."""
        assert self._pool.contents is not None
        check_size(len(ticket), len(block_ids), self._pool.block_bytes)
        data = np.frombuffer(ticket, dtype=np.uint8)
        self._pool.contents[list(block_ids)] = data.reshape(len(block_ids), -1)
        return Export(ticket=None, num_bytes=len(data))

    def close_export(self, migration_id: MigrationId) -> None:
        """See :class:`BlockCopier`."""

    def finish(self) -> list[tuple[MigrationId, Export]]:
        """End the copies in flight; each is to be reported with ``Llumlet.copied``."""
        running, self._running = self._running, []
        return [
            (m, self.export_now(m, blocks) if ticket is None else self.import_now(m, blocks, ticket))
            for m, blocks, ticket in running
        ]


def check_size(num_bytes: int, num_blocks: int, block_bytes: int) -> None:
    """Raise TransportError unless ``num_bytes`` are just the blocks that are due."""
    if num_bytes != num_blocks * block_bytes:
        raise TransportError(
            f"{num_bytes} bytes arrived for {num_blocks} blocks of {block_bytes}: the engines' block_bytes differ"
        )
