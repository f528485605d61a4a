"""What a simulated engine holds: every request in one place or another, and the blocks they own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from arriero.core.errors import ProtocolError
from arriero.core.types import InstanceId, InstanceSnapshot, Phase, RequestId, RequestSnapshot
from arriero.sim.batch import Batch
from arriero.sim.blocks import BlockPool
from arriero.sim.config import SimEngineConfig
from arriero.sim.sequence import Job, Sequence


class Holdings:
    """The books. ``live`` requests wait, run or are frozen; ``reserved`` ones come in; ``parked`` ones own nothing."""

    def __init__(self, config: SimEngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(
            config.num_blocks, config.block_size, config.block_bytes, with_contents=config.with_contents
        )
        self.batch = Batch(config, self.pool)
        self.live: dict[RequestId, Sequence] = {}
        self.frozen: dict[RequestId, Sequence] = {}  # also in live
        self.reserved: dict[RequestId, Sequence] = {}
        self.parked: dict[RequestId, Job] = {}

    @property
    def num_places_held(self) -> int:
        """Places in the batch that requests keep while they are frozen, or will need once they are admitted."""
        frozen = sum(s.thaws_to is Phase.RUNNING for s in self.frozen.values())
        return frozen + sum(bool(self.pool.blocks_of(r)) for r in self.reserved)

    def drop(self, request_id: RequestId) -> bool:
        """Forget a live request and free its blocks. Returns whether it was here."""
        sequence = self.live.pop(request_id, None)
        if sequence is None:
            return False
        if self.frozen.pop(request_id, None) is None:
            self.batch.remove(sequence)
        self.pool.free(request_id)
        return True

    def blocks(self, request_id: RequestId, first: int, end: int) -> list[int]:
        """Blocks ``[first, end)`` of a request. Raises ProtocolError if it has fewer."""
        blocks = list(self.pool.blocks_of(request_id)[first:end])
        if len(blocks) != end - first:
            raise ProtocolError(f"blocks {first}..{end} of request {request_id} are asked for, it has fewer")
        return blocks

    # ------------------------------------------------------------------ reports

    def snapshot(self, instance: InstanceId, now: float, num_steps: int, step_s: float = 0.0) -> InstanceSnapshot:
        """The load report: running, waiting in queue order, frozen, coming in."""
        return InstanceSnapshot.of(
            (self._describe(s) for s in self._sequences()),
            instance=instance,
            time_s=now,
            num_blocks=self.pool.num_blocks,
            num_free_blocks=self.pool.num_free,
            block_size=self.pool.block_size,
            max_num_seqs=self.config.max_num_seqs,
            num_preemptions=self.batch.num_preemptions,
            num_steps=num_steps,
            step_s=step_s,
        )

    def _sequences(self) -> Iterator[Sequence]:
        yield from self.batch.running
        yield from self.batch.waiting
        yield from self.frozen.values()
        yield from self.reserved.values()

    def _describe(self, sequence: Sequence) -> RequestSnapshot:
        return RequestSnapshot.of(
            request_id=sequence.request_id,
            phase=sequence.phase,
            priority=sequence.job.priority,
            num_tokens=sequence.num_tokens,
            num_computed=sequence.num_computed,
            num_blocks=len(self.pool.blocks_of(sequence.request_id)),
            block_size=self.pool.block_size,
        )

    def describe(self) -> dict[str, Any]:
        """What is held, in plain values, for leak checks."""
        return {
            "requests": sorted(self.live),
            "frozen": sorted(self.frozen),
            "parked": sorted(self.parked),
            "reserved": sorted(self.reserved),
            "free_blocks": self.pool.num_free,
            "num_blocks": self.pool.num_blocks,
        }

    def check_integrity(self) -> None:
        """Raise ProtocolError if the books contradict themselves."""
        self.pool.check_integrity({*self.live, *self.reserved})
        listed = [s.request_id for s in self._sequences()]
        if sorted(listed) != sorted([*self.live, *self.reserved]):
            raise ProtocolError(f"requests are lost or listed twice: {listed}")
        if len(self.batch.running) + self.num_places_held > self.config.max_num_seqs:
            raise ProtocolError(f"more than max_num_seqs={self.config.max_num_seqs} requests are in the batch")
        for sequence in self._sequences():
            self._check(sequence)

    def _check(self, sequence: Sequence) -> None:
        request_id, phase = sequence.request_id, sequence.phase
        if self.pool.missing(request_id, sequence.num_computed):
            raise ProtocolError(f"request {request_id} has fewer blocks than computed tokens")
        if phase is Phase.WAITING and self.pool.blocks_of(request_id):
            raise ProtocolError(f"request {request_id} waits, but holds blocks")
        if (phase is Phase.FROZEN) is not (request_id in self.frozen):
            raise ProtocolError(f"request {request_id} is {phase}, but frozen are {sorted(self.frozen)}")
