"""The llumlet's engine in virtual time: :class:`~arriero.core.engine_port.EnginePort` over FastEngine and Network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arriero.core.engine_port import Export, RequestStatus
from arriero.core.errors import ConflictError, ProtocolError
from arriero.core.types import MigrationId, Phase, RequestId
from arriero.sim.fast_engine import FastEngine
from arriero.sim.fast_sequence import FastSequence
from arriero.sim.network import Network

Copied = Callable[[MigrationId, Export], None]


class VirtualPort:
    """See the port for what the methods promise. The ticket of an export is the source's number.

    ``on_copied`` hears of a started copy's end; ``stall(seconds)`` of copies that the engine itself has to wait for;
    ``last_step_s`` tells when its last step ended.
    """

    def __init__(
        self,
        engine: FastEngine,
        network: Network,
        *,
        stage_bytes: int,
        on_copied: Copied,
        stall: Callable[[float], None],
        last_step_s: Callable[[], float],
    ) -> None:
        self.block_size = engine.block_size
        self._engine = engine
        self._network = network
        self._stage_blocks = max(1, stage_bytes // engine.config.block_bytes)
        self._on_copied = on_copied
        self._stall = stall
        self._last_step_s = last_step_s
        self.parked: dict[RequestId, FastSequence] = {}

    # ------------------------------------------------------------------ source

    def find(self, request_id: RequestId) -> RequestStatus | None:
        """See the port."""
        sequence = self._engine.live.get(request_id)
        if sequence is None:
            return None
        return RequestStatus(
            phase=sequence.phase,
            num_tokens=sequence.num_tokens,
            num_output_tokens=sequence.num_output,
            num_computed_tokens=sequence.num_computed,
            in_flight=False,  # the llumlet is only asked between two steps
            epoch=sequence.num_preemptions,
        )

    def start_export(self, migration_id: MigrationId, request_id: RequestId, first: int, max_end: int) -> int:
        """See the port."""
        end = min(max_end, first + self._stage_blocks)
        num_bytes = (end - first) * self._engine.config.block_bytes

        def done(copy_s: float) -> None:
            export = Export(ticket=self._engine.instance, num_bytes=num_bytes, copy_s=copy_s)
            self._on_copied(migration_id, export)

        self._network.copy(num_bytes, self._network.config.staging_bytes_per_s, (self._engine.instance,), done)
        return end

    def export_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, with_blocks: bool
    ) -> Export:
        """See the port."""
        num_bytes = (end - first) * self._engine.config.block_bytes if with_blocks and end > first else 0
        copy_s = self._copy_now(num_bytes, self._network.config.staging_bytes_per_s)
        return Export(ticket=self._engine.instance, num_bytes=num_bytes, copy_s=copy_s)

    def _copy_now(self, num_bytes: int, nominal: float) -> float:
        copy_s = self._network.alone_s(num_bytes, nominal) if num_bytes else 0.0
        self._stall(copy_s)
        return copy_s

    def close_export(self, migration_id: MigrationId) -> None:
        """See the port: nothing is held."""

    def freeze(self, request_id: RequestId) -> None:
        """See the port."""
        sequence = self._engine.frozen[request_id] = self._engine.live[request_id]
        self._engine.remove(sequence)
        sequence.thaws_to, sequence.phase = sequence.phase, Phase.FROZEN
        decodes = sequence.num_output and sequence.num_computed == sequence.num_tokens - 1
        sequence.left_s = self._last_step_s() if decodes else -1.0

    def unfreeze(self, request_id: RequestId) -> None:
        """See the port."""
        sequence = self._engine.frozen.pop(request_id)
        if sequence.thaws_to is Phase.RUNNING:
            self._engine.rerun(sequence)
        else:
            self._engine.requeue(sequence)

    def release(self, request_id: RequestId) -> None:
        """See the port."""
        self._engine.drop(request_id)

    # ------------------------------------------------------------------ destination

    def park(self, sequence: FastSequence) -> None:
        """Keep a request that arrived ahead of its RESERVE."""
        self.parked[sequence.request_id] = sequence

    def reserve(self, request_id: RequestId, num_tokens: int) -> None:
        """See the port."""
        engine, sequence = self._engine, self.parked.get(request_id)
        if sequence is None:
            raise ConflictError("the request itself has not arrived")
        if request_id in engine.live:
            raise ConflictError("the request is here already")
        if num_tokens:
            if engine.waiting:
                raise ConflictError("requests are waiting here already")
            if len(engine.running) + engine.num_places_held >= engine.config.max_num_seqs:
                raise ConflictError(f"all {engine.config.max_num_seqs} places in the batch are taken")
        engine.allocate(sequence, num_tokens)
        del self.parked[request_id]
        sequence.phase = Phase.INCOMING
        engine.reserved[request_id] = sequence

    def is_ready(self, request_id: RequestId) -> bool:
        """See the port: there is nothing to wait for."""
        return True

    def grow(self, request_id: RequestId, num_tokens: int) -> None:
        """See the port."""
        self._engine.allocate(self._incoming(request_id), num_tokens)

    def extend(self, request_id: RequestId, output_token_ids: tuple[int, ...]) -> None:
        """See the port."""
        self._incoming(request_id).num_output += len(output_token_ids)

    def start_import(self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any) -> None:
        """See the port."""
        num_bytes = (end - first) * self._engine.config.block_bytes

        def done(copy_s: float) -> None:
            self._on_copied(migration_id, Export(ticket=None, num_bytes=num_bytes, copy_s=copy_s))

        endpoints = (int(ticket), self._engine.instance)
        self._network.copy(num_bytes, self._network.config.bytes_per_s, endpoints, done)

    def import_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any
    ) -> Export:
        """See the port."""
        num_bytes = (end - first) * self._engine.config.block_bytes
        copy_s = self._copy_now(num_bytes, self._network.config.bytes_per_s)
        return Export(ticket=None, num_bytes=num_bytes, copy_s=copy_s)

    def admit(
        self, request_id: RequestId, num_computed_tokens: int, sampler_state: bytes | None, untold: bytes
    ) -> None:
        """See the port. Without KV it queues: at the front if it was running before."""
        engine, sequence = self._engine, self._incoming(request_id)
        if not 0 <= num_computed_tokens < sequence.num_tokens:
            raise ProtocolError(f"{num_computed_tokens} of {sequence.num_tokens} tokens cannot have been computed")
        if num_computed_tokens > sequence.num_blocks * self.block_size:
            raise ProtocolError(f"request {request_id} has fewer blocks than computed tokens")
        sequence.num_computed = num_computed_tokens
        engine.live[request_id] = engine.reserved.pop(request_id)
        if num_computed_tokens:
            engine.note_computed(sequence, num_computed_tokens)
            engine.run(sequence)
        else:
            engine.free(sequence)
            engine.enqueue(sequence, front=sequence.num_output > 0)

    def discard(self, request_id: RequestId) -> None:
        """See the port."""
        self.parked.pop(request_id, None)
        sequence = self._engine.reserved.pop(request_id, None)
        if sequence is not None:
            self._engine.free(sequence)

    def _incoming(self, request_id: RequestId) -> FastSequence:
        sequence = self._engine.reserved.get(request_id)
        if sequence is None:
            raise ConflictError(f"request {request_id} is not reserved here")
        return sequence
