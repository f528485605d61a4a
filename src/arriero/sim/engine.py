"""SimEngine: a vLLM-like engine without a model. Pure: time comes in, tokens and durations come out.

The fake for every test above the engine (behind `sim/process.py`), and the simulator's engine in virtual
time. It implements :class:`arriero.core.engine_port.EnginePort`; see there for what those methods promise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from arriero.core.config import CopyConfig
from arriero.core.engine_port import Export, RequestStatus
from arriero.core.errors import ConflictError, ProtocolError, UnmovableError
from arriero.core.types import InstanceId, InstanceSnapshot, MigrationId, Phase, RequestId
from arriero.sim.batch import Chunk
from arriero.sim.blocks import BlockPool
from arriero.sim.config import SimEngineConfig
from arriero.sim.copier import BlockCopier, InlineCopier
from arriero.sim.holdings import Holdings
from arriero.sim.model import SimModel
from arriero.sim.sequence import Job, Sequence, TokenOutput
from arriero.sim.step_limits import StepLimits
from arriero.sim.tokens import draw_state, pack_state, unpack_state


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step in flight."""

    started_s: float
    duration_s: float
    chunks: tuple[Chunk, ...]

    @property
    def ends_s(self) -> float:
        return self.started_s + self.duration_s


class SimEngine:
    """One engine. Not thread-safe.

    ``make_copier`` is given the block pool; the default copies within this process.
    """

    def __init__(
        self,
        config: SimEngineConfig,
        *,
        instance: InstanceId = 0,
        copy: CopyConfig | None = None,
        make_copier: Callable[[BlockPool], BlockCopier] = InlineCopier,
    ) -> None:
        self.config = config
        self.block_size = config.block_size
        self.num_steps = 0
        self.step_s = 0.0  #: how long the last one took
        self.held = Holdings(config)
        self.copier = make_copier(self.held.pool)
        self._instance = instance
        self._copy = copy or CopyConfig()
        self._copy_share = self._copy.copy_share
        self._model = SimModel(config, self.held.pool)
        self._step: PlannedStep | None = None

    # ------------------------------------------------------------------ requests

    def add(self, job: Job) -> None:
        """Queue a new request. Raises ConflictError if it can never run here."""
        self._require_length(len(job.prompt_token_ids))
        if job.request_id in self.held.live:
            raise ConflictError(f"request {job.request_id} is here already")
        sequence = self.held.live[job.request_id] = Sequence(job, sampler=draw_state(job.seed))
        self.held.batch.enqueue(sequence)

    def _require_length(self, num_tokens: int) -> None:
        longest = self.config.max_model_len - 1
        if not 1 <= num_tokens <= longest:
            raise ConflictError(f"{num_tokens} tokens are too many or too few: 1 to {longest} are possible here")

    def park(self, job: Job) -> None:
        """Keep a request that arrived ahead of its RESERVE."""
        self.held.parked[job.request_id] = job

    def abort(self, request_id: RequestId) -> bool:
        """Forget a live request, silently. Returns whether it was here."""
        return self.held.drop(request_id)

    @property
    def limits(self) -> StepLimits:
        """Of its steps."""
        return self.held.batch.limits

    @property
    def has_requests(self) -> bool:
        """Whether a request waits, runs or is frozen."""
        return bool(self.held.live)

    # ------------------------------------------------------------------ steps

    def begin_step(self, now: float) -> PlannedStep | None:
        """Decide the next batch; None if nothing can run. Tokens appear with :meth:`finish_step`."""
        assert self._step is None, "the step in flight has not been finished"
        chunks = self.held.batch.plan(self.held.num_places_held)
        if not chunks:
            return None
        for chunk in chunks:
            chunk.sequence.num_scheduled = chunk.num_tokens
        decodes = [c for c in chunks if c.is_decode]
        prefills = [(c.num_tokens, c.num_computed) for c in chunks if not c.is_decode]
        milliseconds = self.config.step_time.step_ms(prefills, len(decodes), sum(c.num_computed + 1 for c in decodes))
        self._step = PlannedStep(now, milliseconds / 1000, tuple(chunks))
        return self._step

    def finish_step(self, now: float) -> list[TokenOutput]:
        """Apply the step in flight. Requests that were aborted meanwhile yield nothing."""
        assert self._step is not None, "no step is in flight"
        step, self._step = self._step, None
        self.num_steps += 1
        self.step_s = now - step.started_s
        num_prompt_tokens = sum(c.num_tokens for c in step.chunks if not c.is_decode)
        self.held.batch.limits.ended(num_prompt_tokens, [self.step_s])
        outputs = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            if self.held.live.get(sequence.request_id) is not sequence:
                continue
            sequence.num_scheduled = 0
            self._model.compute(sequence, chunk.num_tokens)
            if sequence.num_computed == sequence.num_tokens:
                outputs.append(self._sample(sequence))
        return outputs

    def _sample(self, sequence: Sequence) -> TokenOutput:
        token_id, reason, stop_token_id = self._model.sample(sequence)
        if reason is not None:
            self.abort(sequence.request_id)
        return TokenOutput(
            request_id=sequence.request_id, token_id=token_id, finish_reason=reason, stop_reason=stop_token_id
        )

    # ------------------------------------------------------------------ port: source

    def find(self, request_id: RequestId) -> RequestStatus | None:
        """See the port."""
        sequence = self.held.live.get(request_id)
        if sequence is None:
            return None
        return RequestStatus(
            phase=sequence.phase,
            num_tokens=sequence.num_tokens,
            num_output_tokens=len(sequence.output_token_ids),
            num_computed_tokens=sequence.num_computed,
            in_flight=sequence.num_scheduled > 0,
            epoch=sequence.num_preemptions,
            unmovable=sequence.job.unmovable,
        )

    def start_export(self, migration_id: MigrationId, request_id: RequestId, first: int, max_end: int) -> int:
        """See the port."""
        end = min(max_end, first + max(1, self._copy.stage_bytes // self.config.block_bytes))
        self.copier.start_export(migration_id, self.held.blocks(request_id, first, end), self._share(request_id))
        return end

    def export_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, with_blocks: bool
    ) -> Export:
        """See the port."""
        export = Export(ticket=None)
        if with_blocks and end > first:
            export = self.copier.export_now(migration_id, self.held.blocks(request_id, first, end))
        return replace(export, sampler_state=pack_state(self.held.live[request_id].sampler))

    def close_export(self, migration_id: MigrationId) -> None:
        """See the port."""
        self.copier.close_export(migration_id)

    def freeze(self, request_id: RequestId) -> None:
        """See the port."""
        sequence = self.held.frozen[request_id] = self.held.live[request_id]
        self.held.batch.remove(sequence)
        sequence.thaws_to, sequence.phase = sequence.phase, Phase.FROZEN

    def unfreeze(self, request_id: RequestId) -> None:
        """See the port."""
        sequence = self.held.frozen.pop(request_id)
        if sequence.thaws_to is Phase.RUNNING:
            self.held.batch.rerun(sequence)
        else:
            self.held.batch.requeue(sequence)

    def release(self, request_id: RequestId) -> None:
        """See the port."""
        self.abort(request_id)

    # ------------------------------------------------------------------ port: destination

    def reserve(self, request_id: RequestId, num_tokens: int) -> None:
        """See the port."""
        job = self.held.parked.get(request_id)
        if job is None:
            raise ConflictError("the request itself has not arrived")
        if job.unmovable:
            raise UnmovableError(job.unmovable)
        if request_id in self.held.live:
            raise ConflictError("the request is here already")
        self._require_length(max(num_tokens, len(job.prompt_token_ids)))
        if num_tokens:
            self._require_place()
        self.held.pool.allocate(request_id, num_tokens)
        del self.held.parked[request_id]
        self.held.reserved[request_id] = Sequence(job, phase=Phase.INCOMING)

    def _require_place(self) -> None:
        batch, limit = self.held.batch, self.config.max_num_seqs
        if batch.waiting:
            raise ConflictError("requests are waiting here already")
        if len(batch.running) + self.held.num_places_held >= limit:
            raise ConflictError(f"all {limit} places in the batch are taken")

    def is_ready(self, request_id: RequestId) -> bool:
        """See the port: there is nothing to wait for."""
        return True

    def grow(self, request_id: RequestId, num_tokens: int) -> None:
        """See the port."""
        self._incoming(request_id)
        self.held.pool.allocate(request_id, num_tokens)

    def extend(self, request_id: RequestId, output_token_ids: tuple[int, ...]) -> None:
        """See the port."""
        self._incoming(request_id).output_token_ids.extend(output_token_ids)

    def start_import(self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any) -> None:
        """See the port."""
        blocks = self.held.blocks(request_id, first, end)
        self.copier.start_import(migration_id, blocks, ticket, self._share(request_id))

    def import_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any
    ) -> Export:
        """See the port."""
        return self.copier.import_now(migration_id, self.held.blocks(request_id, first, end), ticket)

    def admit(
        self, request_id: RequestId, num_computed_tokens: int, sampler_state: bytes | None, untold: bytes
    ) -> None:
        """See the port. Without KV it queues: at the front if it was running before."""
        sequence = self._incoming(request_id)
        num_output = len(sequence.output_token_ids)
        self._require_length(sequence.num_tokens)
        if not 0 <= num_computed_tokens < sequence.num_tokens:
            raise ProtocolError(f"{num_computed_tokens} of {sequence.num_tokens} tokens cannot have been computed")
        self.held.blocks(request_id, 0, self.held.pool.num_blocks_for(num_computed_tokens))
        seed = sequence.job.seed
        sequence.sampler = draw_state(seed, num_output) if sampler_state is None else unpack_state(sampler_state)
        sequence.num_computed = num_computed_tokens
        self.held.live[request_id] = self.held.reserved.pop(request_id)
        if num_computed_tokens:
            self.held.batch.run(sequence)
        else:
            self.held.pool.free(request_id)
            self.held.batch.enqueue(sequence, front=num_output > 0)

    def discard(self, request_id: RequestId) -> None:
        """See the port."""
        self.held.parked.pop(request_id, None)
        if self.held.reserved.pop(request_id, None) is not None:
            self.held.pool.free(request_id)

    def _incoming(self, request_id: RequestId) -> Sequence:
        sequence = self.held.reserved.get(request_id)
        if sequence is None:
            raise ConflictError(f"request {request_id} is not reserved here")
        return sequence

    def _share(self, request_id: RequestId) -> float:
        """Share of the time for a copy: all of it if nobody else decodes here."""
        others = any(s.request_id != request_id for s in self.held.batch.running)
        return self._copy_share if others else 1.0

    def set_copy_share(self, share: float | None) -> None:
        """Share of the time for copies while others decode; None: as configured."""
        self._copy_share = self._copy.copy_share if share is None else share

    # ------------------------------------------------------------------ reports

    def snapshot(self, now: float) -> InstanceSnapshot:
        """The load report."""
        return self.held.snapshot(self._instance, now, self.num_steps, self.step_s)

    def check_integrity(self) -> None:
        """Raise ProtocolError if the books contradict themselves."""
        self.held.check_integrity()
