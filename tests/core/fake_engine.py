"""A toy engine behind :class:`EnginePort`: it decodes *from its KV blocks*, so that a wrong block speaks.

Every position's KV entry is a function of its token and of all the entries before it, read back
from the block pool; the next token is a function of all entries. One missing, stale or torn block
therefore yields wrong tokens from then on. A block that is freed or allocated holds fresh garbage.

Like vLLM's asynchronous scheduling, a step *executes* when it is scheduled and its output is
*processed* ``depth`` steps later: until then the request is in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from arriero.core.engine_port import Export, RequestStatus
from arriero.core.errors import ArrieroError, TransportError
from arriero.core.llumlet import Llumlet
from arriero.core.types import MigrationId, Phase, RequestId

_PRIME = (1 << 61) - 1

Emit = Callable[[RequestId, list[int], bool], None]
"""Called with new output tokens and whether the request has finished."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a client asks for. The engine's scheduler does not know ``num_outputs`` (as with EOS)."""

    request_id: RequestId
    prompt: tuple[int, ...]
    num_outputs: int
    grammar_polls: int = 0  #: how often an engine answers "not ready" after a reservation
    unmovable: str | None = None


def _weigh(position: int, entry: int) -> int:
    return entry * (2 * position + 1)


def _entry(position: int, token: int, digest: int) -> int:
    return (digest * 6364136223846793005 + token * 1442695040888963407 + position + 1) % _PRIME


def _sample(num_tokens: int, digest: int, draws: int) -> int:
    return (digest * 2862933555777941757 + num_tokens + 3037000493 * draws) % _PRIME % 1_000_003


@cache
def reference(spec: Spec) -> tuple[int, ...]:
    """The output of ``spec`` when nothing ever happens to it."""
    tokens, digest, done = list(spec.prompt), 0, 0
    for draws in range(spec.num_outputs):
        for position in range(done, len(tokens)):
            digest = (digest + _weigh(position, _entry(position, tokens[position], digest))) % _PRIME
        done = len(tokens)
        tokens.append(_sample(len(tokens), digest, draws))
    return tuple(tokens[len(spec.prompt) :])


@dataclass(eq=False, slots=True)
class _Request:
    spec: Spec
    outputs: list[int] = field(default_factory=list)  # processed
    sampled: list[int] = field(default_factory=list)  # executed: outputs, and those in flight
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # executed KV entries
    settled: int = 0  # processed KV entries
    in_flight: int = 0  # steps
    epoch: int = 0
    draws: int = 0  # the sampler's hidden state
    dead: bool = False
    polls: int = 0
    untold: bytes = b"told by none"

    @property
    def tokens(self) -> list[int]:
        return [*self.spec.prompt, *self.sampled]


@dataclass(slots=True)
class _Job:
    """A copy in flight. Blocks are looked up when it starts and touched when it ends, as by DMA."""

    kind: str
    migration_id: MigrationId
    request_id: RequestId
    blocks: list[int]
    ticket: Any = None


Staging = dict[tuple[int, MigrationId], list[list[int]] | None]
"""Staging memory of all instances; None while the first export writes."""


class FakeEngine:
    """One instance's engine. ``fail_next`` names port methods that raise (or copies that fail) once."""

    block_size = 4
    step_s = 0.002  #: how long a step takes, as the door of :mod:`arriero.core.door` is told

    def __init__(
        self,
        instance: int,
        staging: Staging,
        emit: Emit,
        *,
        num_blocks: int = 16,
        max_num_seqs: int = 4,
        depth: int = 1,
        chunk: int = 6,
        stage_blocks: int = 2,
    ) -> None:
        self.instance = instance
        self.num_blocks = num_blocks
        self.max_num_seqs = max_num_seqs
        self.depth = depth
        self.chunk = chunk
        self.stage_blocks = stage_blocks
        self.llumlet: Llumlet | None = None
        self.requests: dict[RequestId, _Request] = {}
        self.running: list[_Request] = []
        self.waiting: list[_Request] = []
        self.frozen: dict[RequestId, bool] = {}  # whether it was running
        self.parked: dict[RequestId, Spec] = {}
        self.reserved: dict[RequestId, _Request] = {}
        self.jobs: deque[_Job] = deque()
        self.fail_next: set[str] = set()
        self.num_preemptions = 0
        self._staging = staging
        self._emit = emit
        self._pipeline: deque[list[tuple[_Request, int, int, int | None]]] = deque()
        self._free = list(range(num_blocks))
        self._kv: list[list[int]] = [[0] * self.block_size for _ in range(num_blocks)]
        self._garbage = instance * 1_000_003

    # ------------------------------------------------------------------ what a client and a clock do

    def add(self, spec: Spec) -> None:
        request = self.requests[spec.request_id] = _Request(spec)
        self.waiting.append(request)

    def park(self, spec: Spec) -> None:
        self.parked[spec.request_id] = spec

    def abort(self, request_id: RequestId, now: float) -> None:
        """Abort what runs here; parked and reserved requests are the migration's business."""
        if request_id in self.requests:
            self._forget(request_id)
            self._llumlet.request_gone(request_id, now)

    def preempt(self, request_id: RequestId) -> None:
        """Evict a running request, as a scheduler short of blocks does."""
        request = self.requests[request_id]
        self.running.remove(request)
        self._free_blocks(request)
        request.computed = request.settled = 0
        request.epoch += 1
        self.num_preemptions += 1
        self.waiting.insert(0, request)

    def step(self, now: float) -> bool:
        """Schedule and execute one batch; process the output of an earlier one. False: nothing to do."""
        if self.busy and self._llumlet.door.hold_for(now, self.step_s) > 0:
            return True
        batch = self._schedule()
        if batch:
            self._pipeline.append(batch)
        busy = bool(self._pipeline)
        if self._pipeline and (len(self._pipeline) > self.depth or not batch):
            self._process(self._pipeline.popleft(), now)
        self._llumlet.after_step(now)
        return busy

    def finish_copy(self, now: float) -> None:
        """The oldest copy in flight ends."""
        job = self.jobs.popleft()
        failed = f"{job.kind}_copy" in self.fail_next
        self.fail_next.discard(f"{job.kind}_copy")
        if job.kind == "export":
            self._staging[self.instance, job.migration_id] = [list(self._kv[b]) for b in job.blocks]
            export = Export(ticket=(self.instance, job.migration_id), num_bytes=len(job.blocks), copy_s=0.5)
        else:
            reserved = self.reserved.get(job.request_id)
            owned = set(job.blocks) <= set(reserved.blocks if reserved is not None else ())
            assert owned, f"an import wrote into blocks that {job.request_id} does not own any more"
            failed = failed or not self._write(job.blocks, job.ticket)
            export = Export(ticket=None, num_bytes=len(job.blocks), copy_s=0.25)
        self._llumlet.copied(job.migration_id, None if failed else export, "cut" if failed else None, now)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting or self._pipeline or self.jobs)

    def schedules(self, request_id: RequestId) -> bool:
        """Whether the request is, or may be, put into a batch here."""
        return request_id in self.requests and request_id not in self.frozen

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def check_integrity(self) -> None:
        """Every block is owned once; free + owned = total; each request stands in one place."""
        owned = [b for r in (*self.requests.values(), *self.reserved.values()) for b in r.blocks]
        assert sorted([*owned, *self._free]) == list(range(self.num_blocks)), "a block leaked or is owned twice"
        assert not self.requests.keys() & self.reserved.keys(), "a request both runs and is reserved here"
        places = [r.spec.request_id for r in (*self.running, *self.waiting)] + list(self.frozen)
        assert sorted(places) == sorted(self.requests), "a request stands in no queue, or in two"
        assert all(not r.blocks for r in self.waiting), "a waiting request holds blocks"

    def leaks(self) -> list[str]:
        """What is left here that an idle instance must not hold."""
        held = {"request": self.requests, "frozen": self.frozen, "parked": self.parked, "reserved": self.reserved}
        left = [f"{name} {key}" for name, table in held.items() for key in table]
        left += [f"staging {mid}" for instance, mid in self._staging if instance == self.instance]
        left += [f"{job.kind} {job.migration_id}" for job in self.jobs]
        return left if self.num_free_blocks == self.num_blocks else [*left, "blocks"]

    # ------------------------------------------------------------------ EnginePort

    def find(self, request_id: RequestId) -> RequestStatus | None:
        request = self.requests.get(request_id)
        if request is None:
            return None
        running = request in self.running
        phase = Phase.FROZEN if request_id in self.frozen else Phase.RUNNING if running else Phase.WAITING
        return RequestStatus(
            phase=phase,
            num_tokens=len(request.spec.prompt) + len(request.outputs),
            num_output_tokens=len(request.outputs),
            num_computed_tokens=request.settled,
            in_flight=request.in_flight > 0,
            epoch=request.epoch,
            unmovable=request.spec.unmovable,
        )

    def start_export(self, migration_id: MigrationId, request_id: RequestId, first: int, max_end: int) -> int:
        self._maybe_fail("start_export")
        end = min(max_end, first + self.stage_blocks)
        self._staging.setdefault((self.instance, migration_id), None)
        self.jobs.append(_Job("export", migration_id, request_id, self.requests[request_id].blocks[first:end]))
        return end

    def export_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, with_blocks: bool
    ) -> Export:
        self._maybe_fail("export_rest")
        request = self.requests[request_id]
        assert request_id in self.frozen, "exporting the rest of a request that runs"
        assert not request.in_flight, "exporting the rest under a step in flight"
        state, untold = str(request.draws).encode(), request.untold
        if not with_blocks:
            return Export(ticket=None, sampler_state=state, untold=untold)
        self._staging[self.instance, migration_id] = [list(self._kv[b]) for b in request.blocks[first:end]]
        at = (self.instance, migration_id)
        return Export(ticket=at, num_bytes=end - first, copy_s=0.125, sampler_state=state, untold=untold)

    def close_export(self, migration_id: MigrationId) -> None:
        exporting = any(j.kind == "export" and j.migration_id == migration_id for j in self.jobs)
        assert not exporting, "staging memory was freed under an export that writes into it"
        self._staging.pop((self.instance, migration_id), None)

    def freeze(self, request_id: RequestId) -> None:
        request = self.requests[request_id]
        assert request_id not in self.frozen
        self.frozen[request_id] = request in self.running
        (self.running if self.frozen[request_id] else self.waiting).remove(request)

    def unfreeze(self, request_id: RequestId) -> None:
        (self.running if self.frozen.pop(request_id) else self.waiting).append(self.requests[request_id])

    def release(self, request_id: RequestId) -> None:
        if request_id in self.requests:
            self._forget(request_id)

    def reserve(self, request_id: RequestId, num_tokens: int) -> None:
        self._maybe_fail("reserve")
        if request_id not in self.parked:
            raise ArrieroError("not parked here")
        if request_id in self.requests or request_id in self.reserved:
            raise ArrieroError("already here")
        if num_tokens and len(self.requests) + len(self.reserved) >= self.max_num_seqs:
            raise ArrieroError("no seat")
        request = _Request(self.parked[request_id])
        request.polls = request.spec.grammar_polls
        self._grow(request, num_tokens)
        del self.parked[request_id]
        self.reserved[request_id] = request

    def is_ready(self, request_id: RequestId) -> bool:
        request = self.reserved[request_id]
        request.polls -= 1
        return request.polls < 0

    def grow(self, request_id: RequestId, num_tokens: int) -> None:
        self._maybe_fail("grow")
        self._grow(self.reserved[request_id], num_tokens)

    def extend(self, request_id: RequestId, output_token_ids: tuple[int, ...]) -> None:
        self.reserved[request_id].outputs.extend(output_token_ids)

    def start_import(self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any) -> None:
        self._maybe_fail("start_import")
        blocks = self.reserved[request_id].blocks[first:end]
        assert len(blocks) == end - first, "the reservation is too small for what comes in"
        self.jobs.append(_Job("import", migration_id, request_id, blocks, ticket))

    def import_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any
    ) -> Export:
        self._maybe_fail("import_rest")
        blocks = self.reserved[request_id].blocks[first:end]
        if not self._write(blocks, ticket):
            raise TransportError("the source's staging memory is gone")
        return Export(ticket=None, num_bytes=len(blocks), copy_s=0.0625)

    def admit(
        self, request_id: RequestId, num_computed_tokens: int, sampler_state: bytes | None, untold: bytes
    ) -> None:
        self._maybe_fail("admit")
        request = self.reserved.pop(request_id)
        request.sampled = list(request.outputs)
        request.computed = request.settled = num_computed_tokens
        request.draws = len(request.outputs) if sampler_state is None else int(sampler_state)
        request.untold = untold
        self.requests[request_id] = request
        (self.running if request.blocks else self.waiting).append(request)

    def discard(self, request_id: RequestId) -> None:
        self.parked.pop(request_id, None)
        request = self.reserved.pop(request_id, None)
        if request is not None:
            self._free_blocks(request)

    # ------------------------------------------------------------------ inside

    @property
    def _llumlet(self) -> Llumlet:
        assert self.llumlet is not None
        return self.llumlet

    def _maybe_fail(self, method: str) -> None:
        if method in self.fail_next:
            self.fail_next.discard(method)
            raise TransportError(f"{method} was made to fail")

    def _schedule(self) -> list[tuple[_Request, int, int, int | None]]:
        batch = []
        for request in list(self.running):
            while request in self.running and not self._fits(request):
                self.preempt(self.running[-1].spec.request_id)
            if request in self.running:
                batch.append(self._execute(request))
        while self.waiting and len(self.requests) - len(self.waiting) + len(self.reserved) < self.max_num_seqs:
            request = self.waiting[0]
            if request.in_flight or not self._fits(request):
                break
            self.running.append(self.waiting.pop(0))
            batch.append(self._execute(request))
        return batch

    def _fits(self, request: _Request) -> bool:
        """Allocate for the next chunk, if possible."""
        try:
            self._grow(request, min(request.computed + self.chunk, len(request.tokens)))
        except ArrieroError:
            return False
        return True

    def _execute(self, request: _Request) -> tuple[_Request, int, int, int | None]:
        tokens, start = request.tokens, request.computed
        end = min(start + self.chunk, len(tokens))
        digest = 0
        for position in range(start):
            block, offset = divmod(position, self.block_size)
            digest += _weigh(position, self._kv[request.blocks[block]][offset])
        digest %= _PRIME
        for position in range(start, end):
            entry = _entry(position, tokens[position], digest)
            block, offset = divmod(position, self.block_size)
            self._kv[request.blocks[block]][offset] = entry
            digest = (digest + _weigh(position, entry)) % _PRIME
        request.computed = end
        request.in_flight += 1
        token = None
        if end == len(tokens):
            token = _sample(end, digest, request.draws)
            request.draws += 1
            request.sampled.append(token)
        return request, request.epoch, end - start, token

    def _process(self, batch: list[tuple[_Request, int, int, int | None]], now: float) -> None:
        for request, epoch, num_computed, token in batch:
            if request.dead:
                continue
            request.in_flight -= 1
            if epoch == request.epoch:
                request.settled += num_computed
            if token is None:
                continue
            request.outputs.append(token)
            finished = len(request.outputs) == request.spec.num_outputs
            if finished:
                self._forget(request.spec.request_id)
            self._emit(request.spec.request_id, [token], finished)
            if finished:
                self._llumlet.request_gone(request.spec.request_id, now)

    def _forget(self, request_id: RequestId) -> None:
        request = self.requests.pop(request_id)
        request.dead = True
        if self.frozen.pop(request_id, None) is None:
            (self.running if request in self.running else self.waiting).remove(request)
        self._free_blocks(request)

    def _grow(self, request: _Request, num_tokens: int) -> None:
        missing = -(-num_tokens // self.block_size) - len(request.blocks)
        if missing > len(self._free):
            raise ArrieroError("no free blocks")
        for _ in range(missing):
            block = self._free.pop()
            self._scrub(block)
            request.blocks.append(block)

    def _free_blocks(self, request: _Request) -> None:
        for block in request.blocks:
            self._scrub(block)
        self._free.extend(request.blocks)
        request.blocks.clear()

    def _scrub(self, block: int) -> None:
        """Somebody else's data, as far as anyone can tell."""
        self._garbage += 1
        self._kv[block] = [self._garbage] * self.block_size

    def _write(self, blocks: list[int], ticket: Any) -> bool:
        """Copy staging memory into ``blocks``, first to first: a ticket holds exactly what was asked for."""
        contents = self._staging.get(ticket)
        if contents is None:
            return False
        for block, entries in zip(blocks, contents, strict=False):
            self._kv[block] = list(entries)
        return True
