"""The engine's side of the workers' copy threads: orders out, reports of all ranks merged."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from arriero.core.config import CopyConfig
from arriero.core.engine_port import Export
from arriero.core.errors import TransportError
from arriero.core.types import MigrationId, RequestId
from arriero.launch.leftovers import FOLDER
from arriero.vllm.worker import CopyDone, CopyJob, RestOfImport

Copied = Callable[[MigrationId, Export | None, str | None], None]

CLOSE_POLL_MS = 100
"""How often the listener looks whether it should end; reports wake it at once."""


class Copier:
    """Starts copies on every rank; ``on_copied`` is called on a thread of its own when all have reported."""

    def __init__(self, collective_rpc: Callable[..., list[Any]], *, prefix: str, config: CopyConfig) -> None:
        self._rpc = collective_rpc
        self._folder = tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-")
        orders = f"ipc://{Path(self._folder.name) / 'orders'}"
        reports = f"ipc://{Path(self._folder.name) / 'reports'}"
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(reports)
        opened = collective_rpc("arriero_open", args=(orders, reports, prefix, config.slice_bytes, config.stage_bytes))
        self.unsupported: str | None = next((o["error"] for o in opened if "error" in o), None)
        self.bytes_per_block = 1
        if self.unsupported is None:
            self.bytes_per_block = max(o["layout"]["num_layers"] * o["layout"]["block_bytes"] for o in opened)
        self._world_size = len(opened)
        self._orders = [self._connect(f"{orders}-{rank}") for rank in range(len(opened))]
        self._reports: dict[MigrationId, list[CopyDone]] = {}
        self._on_copied: Copied | None = None
        self._closing = threading.Event()
        self._listener: threading.Thread | None = None

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        return socket

    def listen(self, on_copied: Copied) -> None:
        """Begin to hear reports."""
        self._on_copied = on_copied
        self._listener = threading.Thread(target=self._hear, daemon=True, name="arriero copy reports")
        self._listener.start()

    def _hear(self) -> None:
        decoder = msgspec.msgpack.Decoder(CopyDone)
        while not self._closing.is_set():
            if not self._inbox.poll(CLOSE_POLL_MS):
                continue
            done = decoder.decode(self._inbox.recv())
            reports = self._reports.setdefault(done.migration_id, [])
            reports.append(done)
            if len(reports) == self._world_size:
                del self._reports[done.migration_id]
                self._report(done.migration_id, reports)

    def _report(self, migration_id: MigrationId, reports: list[CopyDone]) -> None:
        assert self._on_copied is not None
        try:
            self._on_copied(migration_id, merge(reports), None)
        except TransportError as error:
            self._on_copied(migration_id, None, str(error))

    # ------------------------------------------------------------------ orders

    def start_export(self, migration_id: MigrationId, block_ids: list[int], share: float) -> None:
        """Export blocks on every rank (block ids are the same on all)."""
        self._order(CopyJob(migration_id=migration_id, kind="export", block_ids=block_ids, share=share))

    def start_import(self, migration_id: MigrationId, block_ids: list[int], tickets: Any, share: float) -> None:
        """Rank r imports what rank r exported. Raises TransportError if the ranks differ in number."""
        self.check_ranks(tickets)
        for rank, orders in enumerate(self._orders):
            job = CopyJob(
                migration_id=migration_id, kind="import", block_ids=block_ids, ticket=tickets[rank], share=share
            )
            orders.send(msgspec.msgpack.encode(job))

    def release(self, migration_id: MigrationId) -> None:
        """Free the staging memory of a migration."""
        self._order(CopyJob(migration_id=migration_id, kind="release"))

    def export_rest(self, migration_id: MigrationId, request_id: RequestId, block_ids: list[int]) -> Export:
        """Between two steps: export now, and fetch the sampler's state."""
        results = self._rpc("arriero_export_rest", args=(migration_id, request_id, block_ids))
        state = next((s for _, s in results if s is not None), None)
        return replace(merge([done for done, _ in results if done is not None]), sampler_state=state)

    def admit(self, state: dict[str, Any], sampler_state: bytes | None, rest: RestOfImport | None) -> None:
        """Between two steps: import the rest, and let the model runners know the request. Raises TransportError."""
        merge(self._rpc("arriero_admit", args=(state, sampler_state, rest)))

    def close(self) -> None:
        """Close sockets and remove their folder. The listener ends first: a socket belongs to one thread."""
        if self._listener is not None:
            self._closing.set()
            self._listener.join()
        self._context.destroy(linger=0)
        self._folder.cleanup()

    def _order(self, job: CopyJob) -> None:
        data = msgspec.msgpack.encode(job)
        for orders in self._orders:
            orders.send(data)

    def check_ranks(self, tickets: Any) -> None:
        """Raise TransportError unless there is a ticket for every rank."""
        if not isinstance(tickets, list) or len(tickets) != self._world_size:
            ranks = len(tickets) if isinstance(tickets, list) else 0
            raise TransportError(f"the source has {ranks} ranks, this instance has {self._world_size}")


def merge(done: list[CopyDone]) -> Export:
    """One report of all ranks: tickets in the order of ranks. Raises TransportError if any failed."""
    errors = [f"rank {d.rank}: {d.error}" for d in done if d.error is not None]
    if errors:
        raise TransportError("; ".join(errors))
    done = sorted(done, key=lambda d: d.rank)
    return Export(
        ticket=[d.ticket for d in done],
        num_bytes=sum(d.num_bytes for d in done),
        copy_s=max((d.copy_s for d in done), default=0.0),
    )
