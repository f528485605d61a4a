"""Carries the blocks of a simulated engine through a real transport, on a thread beside the engine."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arriero.core.engine_port import Export
from arriero.core.errors import ArrieroError
from arriero.core.types import MigrationId
from arriero.sim.blocks import BlockPool
from arriero.sim.copier import check_size
from arriero.transport.checksum import FIELD as CHECKSUM
from arriero.transport.checksum import Checksum
from arriero.transport.port import BlockTransport

Copied = Callable[[MigrationId, Export | None, str | None], None]


@dataclass(frozen=True, slots=True)
class _Job:
    migration_id: MigrationId
    block_ids: Sequence[int]
    share: float
    ticket: Any  # None: export


class TransportCopier:
    """See :class:`arriero.sim.copier.BlockCopier`; ``on_copied`` is called on the copier's thread.

    A copy goes slice by slice and sleeps in between, so that it takes its share of the time and no more.
    """

    def __init__(self, pool: BlockPool, transport: BlockTransport, *, slice_bytes: int, on_copied: Copied) -> None:
        assert pool.contents is not None, "blocks without contents cannot be copied"
        self._contents = pool.contents
        self._slice_blocks = max(1, slice_bytes // pool.block_bytes)
        self._transport = transport
        self._on_copied = on_copied
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="arriero copier")
        self._thread.start()

    def start_export(self, migration_id: MigrationId, block_ids: Sequence[int], share: float) -> None:
        """See :class:`~arriero.sim.copier.BlockCopier`."""
        self._jobs.put(_Job(migration_id, block_ids, share, None))

    def start_import(self, migration_id: MigrationId, block_ids: Sequence[int], ticket: Any, share: float) -> None:
        """See :class:`~arriero.sim.copier.BlockCopier`."""
        self._jobs.put(_Job(migration_id, block_ids, share, ticket))

    def export_now(self, migration_id: MigrationId, block_ids: Sequence[int]) -> Export:
        """See :class:`~arriero.sim.copier.BlockCopier`."""
        return self._export(migration_id, block_ids, 1.0)

    def import_now(self, migration_id: MigrationId, block_ids: Sequence[int], ticket: Any) -> Export:
        """See :class:`~arriero.sim.copier.BlockCopier`."""
        return self._import(block_ids, ticket, 1.0)

    def close_export(self, migration_id: MigrationId) -> None:
        """See :class:`~arriero.sim.copier.BlockCopier`."""
        self._transport.release(migration_id)

    def close(self) -> None:
        """End the thread; a copy in flight is finished first, without its pauses."""
        self._closing.set()
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if job.ticket is None:
                    done = self._export(job.migration_id, job.block_ids, job.share)
                else:
                    done = self._import(job.block_ids, job.ticket, job.share)
            except ArrieroError as error:
                self._on_copied(job.migration_id, None, str(error))
            else:
                self._on_copied(job.migration_id, done, None)

    def _export(self, migration_id: MigrationId, block_ids: Sequence[int], share: float) -> Export:
        num_bytes = len(block_ids) * self._contents.shape[1]
        stage = np.frombuffer(self._transport.stage(migration_id, num_bytes), dtype=np.uint8)
        stage = stage.reshape(len(block_ids), -1)

        checksum = Checksum()

        def gather(blocks: Sequence[int], part: slice) -> None:
            np.take(self._contents, blocks, axis=0, out=stage[part], mode="clip")  # "raise" would copy twice
            checksum.add(stage[part])

        copy_s = self._paced(block_ids, share, gather)
        ticket = {**self._transport.ticket(migration_id), CHECKSUM: checksum.value}
        return Export(ticket=ticket, num_bytes=num_bytes, copy_s=copy_s)

    def _import(self, block_ids: Sequence[int], ticket: Any, share: float) -> Export:
        data = np.frombuffer(self._transport.fetch(ticket), dtype=np.uint8)
        check_size(len(data), len(block_ids), self._contents.shape[1])
        staged, checksum = data.reshape(len(block_ids), -1), Checksum()

        def scatter(blocks: Sequence[int], part: slice) -> None:
            checksum.add(staged[part])
            self._contents[blocks] = staged[part]

        copy_s = self._paced(block_ids, share, scatter)
        checksum.require(ticket)
        return Export(ticket=None, num_bytes=len(data), copy_s=copy_s)

    def _paced(self, block_ids: Sequence[int], share: float, copy: Callable[[Sequence[int], slice], None]) -> float:
        """Copy slice by slice; returns the seconds spent copying."""
        spent = 0.0
        for first in range(0, len(block_ids), self._slice_blocks):
            part = slice(first, first + self._slice_blocks)
            started = time.perf_counter()
            copy(block_ids[part], part)
            took = time.perf_counter() - started
            spent += took
            if share < 1 and part.stop < len(block_ids):
                self._closing.wait(took * (1 / share - 1))
        return spent
