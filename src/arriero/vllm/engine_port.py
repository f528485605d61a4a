"""The llumlet's port onto vLLM's scheduler, KV cache manager and workers.

Called on the engine's thread, between two steps, as :class:`arriero.core.engine_port.EnginePort` says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import monotonic
from typing import Any, ParamSpec, TypeVar

from arriero.core.config import CopyConfig
from arriero.core.engine_port import Export
from arriero.core.engine_port import RequestStatus as Status
from arriero.core.errors import ArrieroError, ConflictError, TransportError, UnmovableError
from arriero.core.types import InstanceId, InstanceSnapshot, MigrationId, Phase, RequestId, RequestSnapshot
from arriero.vllm.compat import Request, RequestStatus
from arriero.vllm.copier import Copier
from arriero.vllm.untold import pack_untold, unpack_untold
from arriero.vllm.worker import RestOfImport

P = ParamSpec("P")
R = TypeVar("R")


def _contained(method: Callable[P, R]) -> Callable[P, R]:
    """Turn whatever vLLM raises into a refusal: a failed move must not take the engine down."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except ArrieroError:
            raise
        except Exception as error:
            raise TransportError(f"{method.__name__} failed: {type(error).__name__}: {error}") from error

    return wrapper


def unsupported_cache(scheduler: Any) -> str | None:
    """Why the blocks of this vLLM scheduler's KV cache are not simply as many as tokens take; None if they are."""
    groups = scheduler.kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups (hybrid attention)"
    kind = type(groups[0].kv_cache_spec).__name__
    if kind != "FullAttentionSpec":
        return f"KV cache of kind {kind} cannot be moved block by block"
    if scheduler.connector is not None:
        return "a KV connector manages the KV cache"
    return None


class VllmEnginePort:
    """See :class:`arriero.core.engine_port.EnginePort`."""

    def __init__(self, engine: Any, copier: Copier, config: CopyConfig) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._kv = engine.scheduler.kv_cache_manager
        self._copier = copier
        self._config = config
        self._copy_share = config.copy_share
        self._frozen: set[RequestId] = set()
        self._parked: dict[RequestId, Request] = {}
        self._reserved: dict[RequestId, Request] = {}
        self.block_size: int = self._scheduler.block_size
        self._rest: RestOfImport | None = None
        self.num_preemptions = 0
        self._preempt = self._scheduler._preempt_request
        self._scheduler._preempt_request = self._preempt_and_count
        self._immovable = copier.unsupported or unsupported_cache(self._scheduler)

    def _preempt_and_count(self, *args: Any, **kwargs: Any) -> None:
        self.num_preemptions += 1
        self._preempt(*args, **kwargs)

    # ------------------------------------------------------------------ source

    def find(self, request_id: RequestId) -> Status | None:
        """See the port."""
        request = self._scheduler.requests.get(request_id)
        if request is None or request.is_finished():
            return None
        if request_id in self._frozen:
            phase = Phase.FROZEN
        else:
            phase = Phase.RUNNING if request.status == RequestStatus.RUNNING else Phase.WAITING
        in_flight = request.num_in_flight_tokens
        return Status(
            phase=phase,
            num_tokens=request.num_tokens,
            num_output_tokens=request.num_output_tokens,
            num_computed_tokens=request.num_computed_tokens - in_flight,
            in_flight=in_flight > 0 or request.num_output_placeholders > 0,
            epoch=request.num_preemptions,
            unmovable=self._immovable or self._unmovable(request),
        )

    @staticmethod
    def _unmovable(request: Request) -> str | None:
        params = request.sampling_params
        if params is not None and params.prompt_logprobs is not None and not request.num_output_tokens:
            return "its prompt logprobs are being computed; it can move after its first token"
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            return "its KV cache is being loaded by a connector"
        return None

    def start_export(self, migration_id: MigrationId, request_id: RequestId, first: int, max_end: int) -> int:
        """See the port."""
        at_most = max(1, self._config.stage_bytes // self._copier.bytes_per_block)
        end = min(max_end, first + at_most)
        ids = self._block_ids(request_id)[first:end]
        self._copier.start_export(migration_id, ids, self._share(request_id))
        return end

    @_contained
    def export_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, with_blocks: bool
    ) -> Export:
        """See the port."""
        ids = self._block_ids(request_id)[first:end] if with_blocks and end > first else []
        export = self._copier.export_rest(migration_id, request_id, ids)
        return replace(export, untold=pack_untold(self._scheduler.requests[request_id], monotonic()))

    def close_export(self, migration_id: MigrationId) -> None:
        """See the port."""
        self._copier.release(migration_id)

    def freeze(self, request_id: RequestId) -> None:
        """See the port. A running request leaves the batch: both model runners treat it as not scheduled."""
        request = self._scheduler.requests[request_id]
        if request.status == RequestStatus.RUNNING:
            self._scheduler.running.remove(request)
        else:
            self._scheduler.waiting.remove_requests([request])
            self._scheduler.kv_holding_waiting.remove_requests([request])
            self._scheduler.deferred_waiting.discard(request)
        self._frozen.add(request_id)

    def unfreeze(self, request_id: RequestId) -> None:
        """See the port."""
        self._frozen.discard(request_id)
        request = self._scheduler.requests[request_id]
        if request.status == RequestStatus.RUNNING:
            self._scheduler.running.append(request)
        elif self._scheduler._holds_kv_blocks(request):
            self._scheduler.kv_holding_waiting.prepend_request(request)
        else:
            self._scheduler.waiting.prepend_request(request)

    def release(self, request_id: RequestId) -> None:
        """See the port."""
        self._frozen.discard(request_id)
        self._scheduler.finish_requests([request_id], RequestStatus.FINISHED_ABORTED)

    def gone(self, request_id: RequestId) -> None:
        """The request was finished or aborted by the engine."""
        self._frozen.discard(request_id)

    # ------------------------------------------------------------------ destination

    def park(self, request: Request) -> None:
        """Keep a request that arrived ahead of its RESERVE."""
        self._parked[request.request_id] = request

    @_contained
    def reserve(self, request_id: RequestId, num_tokens: int) -> None:
        """See the port."""
        request = self._parked.get(request_id)
        if request is None:
            raise ConflictError("the request itself has not arrived (its preprocessing failed)")
        if self._immovable:
            raise UnmovableError(self._immovable)
        self._require_room(request, num_tokens)
        self._reserved[request_id] = request
        del self._parked[request_id]
        try:
            self.grow(request_id, num_tokens)
        except ArrieroError:
            del self._reserved[request_id]
            self._kv.free(request)
            raise

    def _require_room(self, request: Request, num_tokens: int) -> None:
        scheduler = self._scheduler
        if request.request_id in scheduler.requests or request.request_id in scheduler.finished_req_ids:
            raise ConflictError("the request was here a moment ago and is still being cleared away")
        if request.lora_request is not None and request.lora_request.lora_int_id not in self._engine.list_loras():
            raise ConflictError(f"LoRA adapter {request.lora_request.lora_name!r} is not loaded here")
        if num_tokens and scheduler.get_request_counts()[1]:
            raise ConflictError("requests are waiting here already")
        if num_tokens and len(scheduler.running) + len(self._reserved) >= scheduler.max_num_running_reqs:
            raise ConflictError(f"all {scheduler.max_num_running_reqs} places in the batch are taken")

    def is_ready(self, request_id: RequestId) -> bool:
        """See the port."""
        request = self._reserved[request_id]
        return not request.use_structured_output or request.structured_output_request.is_grammar_ready

    @_contained
    def grow(self, request_id: RequestId, num_tokens: int) -> None:
        """See the port."""
        request = self._reserved[request_id]
        have = len(self._block_ids(request_id)) * self.block_size if num_tokens else 0
        if num_tokens <= have:
            return
        if self._kv.allocate_slots(request, num_tokens, delay_cache_blocks=True) is None:
            free = self._kv.block_pool.get_num_free_blocks()
            need = -(-(num_tokens - have) // self.block_size)
            raise ConflictError(f"{need} more KV blocks are needed, {free} are free")

    @_contained
    def extend(self, request_id: RequestId, output_token_ids: tuple[int, ...]) -> None:
        """See the port. The grammar takes the tokens one by one, as it did at the source."""
        request = self._reserved[request_id]
        manager = self._engine.structured_output_manager
        for token in output_token_ids:
            request.append_output_token_ids(token)
            if not manager.accept_tokens(request, [token]):
                raise ConflictError(f"the grammar does not accept token {token}, which the source has produced")

    def start_import(self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any) -> None:
        """See the port."""
        ids = self._block_ids(request_id)[first:end]
        if not first and not self._engine.has_work():
            self._engine.execute_dummy_batch()  # a first step from idleness is slower, and would be in the pause
        self._copier.start_import(migration_id, ids, ticket, self._share(request_id))

    @_contained
    def import_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any
    ) -> Export:
        """See the port. The import travels with the worker call of :meth:`admit`: one less in the pause."""
        self._copier.check_ranks(ticket)
        ids = self._block_ids(request_id)[first:end]
        self._rest = RestOfImport(migration_id=migration_id, block_ids=ids, tickets=ticket)
        return Export(ticket=None, num_bytes=len(ids) * self._copier.bytes_per_block)

    @_contained
    def admit(
        self, request_id: RequestId, num_computed_tokens: int, sampler_state: bytes | None, untold: bytes
    ) -> None:
        """See the port. As if preempted with its blocks kept: it is scheduled as *resumed*, for one token."""
        request = self._reserved[request_id]
        rest, self._rest = self._rest, None
        past = unpack_untold(untold, monotonic()) if untold else ([], None)
        if num_computed_tokens or request.num_output_tokens:
            self._copier.admit(self._runner_state(request, num_computed_tokens), sampler_state, rest)
            request.status = RequestStatus.PREEMPTED
        if num_computed_tokens:
            request.num_computed_tokens = num_computed_tokens
            self._kv.cache_blocks(request, num_computed_tokens)
        del self._reserved[request_id]
        self._scheduler.add_request(request)
        if untold or request.num_output_tokens:  # a replay whose client has heard nothing is like any new request
            request.events, request.prefill_stats = past  # not a second QUEUED, which would spoil the client's metrics

    def _runner_state(self, request: Request, num_computed_tokens: int) -> dict[str, Any]:
        return {
            "req_id": request.request_id,
            "prompt_token_ids": request.prompt_token_ids,
            "sampling_params": request.sampling_params,
            "block_ids": self._kv.get_block_ids(request.request_id),
            "num_computed_tokens": num_computed_tokens,
            "output_token_ids": list(request.output_token_ids),
            "lora_request": request.lora_request,
        }

    def discard(self, request_id: RequestId) -> None:
        """See the port."""
        self._parked.pop(request_id, None)
        request = self._reserved.pop(request_id, None)
        if request is not None:
            self._kv.free(request)

    # ------------------------------------------------------------------ load

    def snapshot(self, instance: InstanceId, now: float, num_steps: int, step_s: float) -> InstanceSnapshot:
        """What the scheduler sees of this instance."""
        pool = self._kv.block_pool
        return InstanceSnapshot.of(
            self._snapshots(),
            instance=instance,
            time_s=now,
            num_blocks=pool.num_gpu_blocks - 1,  # one is the null block
            num_free_blocks=pool.get_num_free_blocks(),
            block_size=self.block_size,
            max_num_seqs=self._scheduler.max_num_running_reqs,
            num_preemptions=self.num_preemptions,
            num_steps=num_steps,
            step_s=step_s,
        )

    def _snapshots(self) -> Iterator[RequestSnapshot]:
        scheduler = self._scheduler
        for request in scheduler.running:
            yield self._snapshot(request, Phase.RUNNING)
        for queue in (scheduler.kv_holding_waiting, scheduler.waiting):
            for request in queue:
                yield self._snapshot(request, Phase.WAITING)
        for request_id in self._frozen:
            if (request := scheduler.requests.get(request_id)) is not None:
                yield self._snapshot(request, Phase.FROZEN)
        for request in self._reserved.values():
            yield self._snapshot(request, Phase.INCOMING)

    def _snapshot(self, request: Request, phase: Phase) -> RequestSnapshot:
        num_blocks = len(self._kv.coordinator.get_blocks(request.request_id)[0]) if phase is not Phase.WAITING else 0
        return RequestSnapshot.of(
            request_id=request.request_id,
            phase=phase,
            priority=request.priority,
            num_tokens=request.num_tokens,
            num_computed=request.num_computed_tokens,
            num_blocks=num_blocks,
            block_size=self.block_size,
        )

    def holdings(self) -> dict[str, Any]:
        """What is held here, for leak checks."""
        pool = self._kv.block_pool
        return {
            "requests": sorted(self._scheduler.requests),
            "frozen": sorted(self._frozen),
            "parked": sorted(self._parked),
            "reserved": sorted(self._reserved),
            "free_blocks": pool.get_num_free_blocks(),
            "num_blocks": pool.num_gpu_blocks - 1,
        }

    # ------------------------------------------------------------------ small

    def _block_ids(self, request_id: RequestId) -> list[int]:
        return [block.block_id for block in self._kv.coordinator.get_blocks(request_id)[0]]

    def _share(self, request_id: RequestId) -> float:
        """Share of the time for a copy: all of it if nobody else decodes here."""
        others = any(r.request_id != request_id for r in self._scheduler.running)
        return self._copy_share if others else 1.0

    def set_copy_share(self, share: float | None) -> None:
        """Share of the time for copies while others decode; None: as configured."""
        self._copy_share = self._config.copy_share if share is None else share
