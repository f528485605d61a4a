"""vLLM's engine client over a cluster: the one patch of the front end plugs this in."""

from __future__ import annotations

import asyncio
import threading
from http import HTTPStatus
from typing import Any

from arriero.core.errors import ArrieroError
from arriero.core.types import Dispatchable, InstanceId
from arriero.frontend.cluster import Cluster
from arriero.frontend.placements import current_placement
from arriero.frontend.requests import LiveRequest
from arriero.frontend.targets import current_ttft_target_s
from arriero.vllm.compat import AsyncMPClient, BackgroundResources, EngineCoreRequest, GracefulHTTPError
from arriero.vllm.prompt_hashes import prompt_hashes

SHUTDOWN_GRACE_S = 15.0
"""Until instances that do not end by themselves are killed; they need about 2 s on a quiet machine."""


class ClusterClient(AsyncMPClient):
    """An ``EngineCoreClient`` that routes to several engines which come and go.

    Only the surface of ``AsyncMPClient`` is inherited (its utility methods); sockets, routing and the token
    log are the cluster's.
    """

    def __init__(self, vllm_config: Any, cluster: Cluster) -> None:
        self.vllm_config = vllm_config
        self.cluster = cluster
        self.client_count, self.client_index = 1, cluster.links.client_index
        self.engines_running = False
        self.outputs_queue: asyncio.Queue[Any] = asyncio.Queue()
        self.engine_ranks_managed = cluster.instances.ready_ids()
        self.stats_update_address = None
        self._effective_attention_block_sizes: set[int | None] = set()
        self._kv_event_sources: dict[int, Any] = {}
        self._engine_status: dict[int, Any] = {}
        self.resources = BackgroundResources(ctx=None)  # holds no sockets: only the engine_dead flag is used
        self.utility_results: dict[int, Any] = {}
        for instance in cluster.instances:
            self._apply_ready_response(instance.ready_payload)
        cluster.deliver = self._deliver
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        cluster.fail = self._fail
        self.output_processor: Any = None
        """vLLM's, once there is one: it takes a request before it asks for an instance here."""

    # ------------------------------------------------------------------ requests

    @property
    def _hashed_block_size(self) -> int | None:
        """Of the instances' prefix caches; None if they have none."""
        cache = self.vllm_config.cache_config
        return cache.block_size if cache.enable_prefix_caching else None

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Dispatch a request, once there is an instance; clients get 503 if none comes, 429 if too many wait."""
        placement = current_placement()
        try:
            name = request.external_req_id or request.request_id
            facts = facts_of(request, self._hashed_block_size, current_ttft_target_s())
            await self.cluster.intake.admit(request, facts, name, placement.placed)
        except asyncio.CancelledError:
            self._forget(request.request_id)
            raise
        except ArrieroError as error:
            self._forget(request.request_id)
            placement.refused(error)
            raise GracefulHTTPError(str(error), HTTPStatus(error.status)) from error

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """The client has gone, or a stop string was found."""
        if request_ids and not self.resources.engine_dead:
            self.cluster.abort(request_ids)

    def _forget(self, request_id: str) -> None:
        self.output_processor.abort_requests([request_id], internal=True)

    def _fail(self, request: LiveRequest, reason: str) -> bool:
        """Tell the client of a pooling request that it is lost: for such ones vLLM's outputs cannot say it, and its
        output handler would end with an assertion.
        """
        if request.message.pooling_params is None:
            return False
        state = self.output_processor.request_states.get(request.request_id)
        if state is not None and state.queue is not None:
            state.queue.put(GracefulHTTPError(reason, HTTPStatus.SERVICE_UNAVAILABLE))
        self._forget(request.request_id)
        return True

    def _deliver(self, outputs: Any) -> None:
        if outputs.outputs or outputs.scheduler_stats:
            outputs.engine_index = self._rank_of(outputs.engine_index)
            self.outputs_queue.put_nowait(outputs)

    def _rank_of(self, instance: InstanceId) -> int:
        """Under which of its engines vLLM's front end counts an instance: it knows those of the start, by place."""
        return self.cluster.instances.place_of(instance) % len(self.engine_ranks_managed)

    def _ensure_output_queue_task(self) -> None:
        """The cluster's links listen already."""

    # ------------------------------------------------------------------ utilities

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        """Call a utility method of every ready instance."""
        ids = self.cluster.instances.ready_ids()
        return list(await asyncio.gather(*[self.cluster.links.utility(i, method, *args) for i in ids]))

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        """Call a utility method everywhere; the first instance's result stands for all.

        Booleans are joined: true only if it holds on every instance.
        """
        results = await self.call_utility_all_async(method, *args)
        if results and all(isinstance(r, bool) for r in results):
            return all(results)
        return results[0] if results else None

    async def collective_rpc_async(
        self, method: Any, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        """Results of all workers of all instances."""
        per_instance = await self.call_utility_all_async("collective_rpc", method, timeout, args, kwargs)
        return [worker for workers in per_instance for worker in workers]

    # ------------------------------------------------------------------ end

    def finish(self, timeout: float | None) -> None:
        """Let requests run on for ``timeout`` seconds (vLLM's --shutdown-timeout), then cut them. Blocks; called from
        any thread but the event loop's, where there is nothing to wait for.
        """
        if self._loop.is_running() and threading.get_ident() != self._loop_thread and not self.resources.engine_dead:
            asyncio.run_coroutine_threadsafe(self.cluster.shutdown.run(timeout or 0.0), self._loop).result()

    def shutdown(self, timeout: float | None = None) -> None:
        """End all instances; called from any thread, more than once."""
        if not self.resources.engine_dead:
            self.resources.engine_dead = True
            self.cluster.close(SHUTDOWN_GRACE_S)


def facts_of(request: EngineCoreRequest, block_size: int | None, ttft_target_s: float | None = None) -> Dispatchable:
    """What the scheduler needs to know of a request; ``block_size``: of the prefix caches, None if there are none."""
    params = request.sampling_params
    hashes, num_hashed_tokens = prompt_hashes(request, block_size) if block_size else ((), 0)
    return Dispatchable(
        request_id=request.request_id,
        num_prompt_tokens=_num_prompt_tokens(request),
        max_tokens=params.max_tokens if params is not None and params.max_tokens is not None else 1,
        priority=request.priority,
        ttft_target_s=ttft_target_s,
        unmovable=unmovable_reason(request),
        block_hashes=hashes,
        num_hashed_tokens=num_hashed_tokens,
    )


def _num_prompt_tokens(request: EngineCoreRequest) -> int:
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return len(request.prompt_embeds) if request.prompt_embeds is not None else 0


def unmovable_reason(request: EngineCoreRequest) -> str | None:
    """Why this kind of request can't be migrated; None if it can."""
    if request.pooling_params is not None:
        return "pooling requests end after one step"
    if request.resumable:
        return "a session with streaming input has state that a migration does not carry"
    if request.mm_features:
        return "multimodal inputs live in the instance's encoder cache"
    if request.prompt_embeds is not None:
        return "prompt embeddings are not carried"
    params = request.sampling_params
    if params is not None and (params.extra_args or {}).get("kv_transfer_params"):
        return "its KV cache is managed by a KV connector"
    return None
