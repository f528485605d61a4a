"""What a :class:`FastEngine` reports of itself, also in the middle of a segment: ``num_steps`` of it are done."""

from __future__ import annotations

from collections.abc import Iterable

from arriero.core.errors import ProtocolError
from arriero.core.types import InstanceSnapshot, Phase, RequestSnapshot
from arriero.sim.fast_engine import FastEngine
from arriero.sim.fast_sequence import FastSequence


def snapshot(engine: FastEngine, now: float, num_steps: int = 0) -> InstanceSnapshot:
    """The load report after ``num_steps`` steps of the segment in flight, if any: as `Holdings.snapshot` gives it."""
    size, more = engine.block_size, 0
    requests = []
    for sequence in engine.running:
        num_blocks = sequence.num_blocks
        num_tokens = sequence.num_prompt + sequence.num_output
        if num_steps:
            num_blocks = max(num_blocks, -(-(sequence.num_computed + num_steps) // size))
            more += num_blocks - sequence.num_blocks
        requests.append(
            RequestSnapshot.of(
                request_id=sequence.request_id,
                phase=Phase.RUNNING,
                priority=sequence.priority,
                num_tokens=num_tokens + num_steps,
                num_computed=num_tokens + num_steps if num_steps else sequence.num_computed,
                num_blocks=num_blocks,
                block_size=size,
            )
        )
    for others in (engine.waiting, engine.frozen.values(), engine.reserved.values()):
        requests += [_describe(sequence, size) for sequence in others]
    return InstanceSnapshot.of(
        requests,
        instance=engine.instance,
        time_s=now,
        num_blocks=engine.config.num_blocks,
        num_free_blocks=engine.num_free - more,
        block_size=size,
        max_num_seqs=engine.config.max_num_seqs,
        num_preemptions=engine.num_preemptions,
        num_steps=engine.num_steps + num_steps,
        step_s=engine.took_s(engine.segment, num_steps) if num_steps and engine.segment else engine.step_s,
    )


def _describe(sequence: FastSequence, block_size: int) -> RequestSnapshot:
    return RequestSnapshot.of(
        request_id=sequence.request_id,
        phase=sequence.phase,
        priority=sequence.priority,
        num_tokens=sequence.num_tokens,
        num_computed=sequence.num_computed,
        num_blocks=sequence.num_blocks,
        block_size=block_size,
    )


def _num_shared(sequence: FastSequence) -> int:
    return sequence.share.num_blocks if sequence.share is not None else 0


def num_used_blocks(engine: FastEngine, num_steps: int) -> int:
    """Blocks in use while step ``num_steps`` (from 1) of the segment runs; 0: between two segments."""
    used = engine.config.num_blocks - engine.num_free
    if num_steps > 1:
        size = engine.block_size
        used += sum(max(0, -(-(s.num_computed + num_steps) // size) - s.num_blocks) for s in engine.running)
    return used


def head_demand(engine: FastEngine) -> int:
    """Blocks that the head of the queue waits for; 0 without a queue."""
    return -(-(engine.waiting[0].num_tokens + 1) // engine.block_size) if engine.waiting else 0


def prefix_hit(engines: Iterable[FastEngine]) -> float | None:
    """Share of the tokens to prefill that their prefix caches had; None if they have no caches."""
    cached = [e for e in engines if e.cache is not None]
    num_looked_up = sum(e.num_looked_up for e in cached)
    return sum(e.num_hit for e in cached) / max(1, num_looked_up) if cached else None


def check_integrity(engine: FastEngine) -> None:
    """Raise ProtocolError if the books contradict themselves; between two segments."""
    listed = [*engine.running, *engine.waiting, *engine.frozen.values()]
    if len(listed) != len(engine.live) or {s.request_id for s in listed} != engine.live.keys():
        raise ProtocolError(f"requests are lost or listed twice: {[s.request_id for s in listed]}")
    held = sum(s.num_blocks - _num_shared(s) for s in [*listed, *engine.reserved.values()])
    if engine.cache is not None:
        engine.cache.check_integrity(engine.num_free)
        held += engine.cache.num_held
    if held + engine.num_free != engine.config.num_blocks or engine.num_free < 0:
        raise ProtocolError(
            f"blocks are lost or shared: {held} held, {engine.num_free} free of {engine.config.num_blocks}"
        )
    if len(engine.running) + engine.num_places_held > engine.config.max_num_seqs:
        raise ProtocolError(f"more than max_num_seqs={engine.config.max_num_seqs} requests are in the batch")
    for sequence in listed:
        if sequence.num_computed > sequence.num_blocks * engine.block_size:
            raise ProtocolError(f"request {sequence.request_id} has fewer blocks than computed tokens")
        if sequence.phase is Phase.WAITING and sequence.num_blocks:
            raise ProtocolError(f"request {sequence.request_id} waits, but holds blocks")
