"""vLLM's own scheduler without a model: what a step takes, and what it says, is made up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from arriero.model.bundled import ensure_bundled_model

BLOCK = 16
DECODE_S, PROMPT_S = 0.05, 0.001  # a step, and each prompt token more


@dataclass
class Engine:
    """What our parts know of an engine, and a worker that takes its time."""

    scheduler: Any
    vllm_config: Any
    now_s: float = 0.0
    has_moves: bool = False
    steps: list[tuple[dict[str, int], float]] = field(default_factory=list)  #: tokens of each request, seconds

    @property
    def structured_output_manager(self) -> Any:
        """What knows the grammars."""
        return self.scheduler.structured_output_manager

    def add(self, name: str, num_tokens: int, max_tokens: int, priority: int = 0, first: int = 0) -> None:
        """``first``: token of the prompt, which counts on from there."""
        params, prompt = SamplingParams(max_tokens=max_tokens, ignore_eos=True), list(range(first, first + num_tokens))
        hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler.add_request(Request(name, prompt, params, None, priority=priority, block_hasher=hasher))

    def step_outputs(self) -> list[Any]:
        """A step; returns what the client is told."""
        clients = self.finish(self.scheduler.schedule())
        return [output for outputs in clients.values() for output in outputs.outputs]

    def step(self) -> dict[str, int]:
        """Plan, compute, take in; returns the tokens of each request."""
        planned = self.scheduler.schedule()
        self.finish(planned)
        return dict(planned.num_scheduled_tokens)

    def finish(self, planned: Any) -> dict[int, Any]:
        """Compute, take in; returns what each client is told."""
        tokens: dict[str, int] = planned.num_scheduled_tokens
        took = DECODE_S + PROMPT_S * (sum(tokens.values()) - len(tokens)) if tokens else 0.0
        self.now_s += took
        self.steps.append((dict(tokens), took))
        names = list(tokens)
        done = [self.scheduler.requests[n].num_computed_tokens >= self.scheduler.requests[n].num_tokens for n in names]
        sampled = [[7] if is_done else [] for is_done in done]
        output = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled)
        told: dict[int, Any] = self.scheduler.update_from_output(planned, output)
        return told


def make_engine(*, overlapping: bool = False, num_blocks: int = 2000, **flags: Any) -> Engine:
    """An engine of the bundled model's configuration."""
    init_none_hash(sha256)
    flags = {"max_model_len": 8192, "max_num_batched_tokens": 4096, "max_num_seqs": 8, "block_size": BLOCK} | flags
    flags = {"enable_prefix_caching": False} | flags
    config = AsyncEngineArgs(
        model=str(ensure_bundled_model()), async_scheduling=overlapping, **flags
    ).create_engine_config()
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    config.cache_config.num_gpu_blocks = num_blocks
    kind = AsyncScheduler if overlapping else Scheduler
    return Engine(kind(config, cache, StructuredOutputManager(config), BLOCK, log_stats=True), config)
