"""Holds the steps of vLLM's scheduler to a target for the time between two tokens, see core/step_budget.py."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from arriero.core.config import StepConfig
from arriero.core.step_budget import StepBudget


class StepLimits:
    """Stands before and behind a scheduler's steps: bounds the prompt tokens of each, and sees how long it took."""

    def __init__(
        self,
        scheduler: Any,
        config: StepConfig,
        has_moves: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``has_moves``: whether a request moves to this instance or away."""
        self._scheduler = scheduler
        self._schedule = scheduler.schedule
        self._update = scheduler.update_from_output
        self._budget = StepBudget(config, has_moves)
        self._clock = clock
        self._scheduled: deque[tuple[Any, float]] = deque()  # steps under way, and when each was put together
        self._updated_s = 0.0
        scheduler.schedule = self.schedule
        scheduler.update_from_output = self.update_from_output

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As the scheduler's."""
        num_decodes = self._num_decodes()
        limit = self._budget.prompt_tokens(num_decodes)
        with nullcontext() if limit is None else self._bounds(num_decodes, limit):
            planned = self._schedule(*args, **kwargs)
        self._scheduled.append((planned, self._clock()))
        return planned

    def _num_decodes(self) -> int:
        """Requests that get a token in the next step; among them those that have just moved in with their KV."""
        scheduler = self._scheduler
        return sum(not r.is_prefill_chunk for r in scheduler.running) + len(scheduler.kv_holding_waiting)

    @contextmanager
    def _bounds(self, num_decodes: int, limit: int) -> Iterator[None]:
        """Of a step with at most ``limit`` prompt tokens. No request takes more, so decodes behind one come too."""
        scheduler, config = self._scheduler, self._scheduler.scheduler_config
        whole = scheduler.max_num_scheduled_tokens
        part, adaptive = config.long_prefill_token_threshold, scheduler.adaptive_long_prefill_threshold
        scheduler.max_num_scheduled_tokens = min(whole, num_decodes * (1 + scheduler.num_spec_tokens) + limit)
        config.long_prefill_token_threshold = min(part, limit) if part > 0 and not adaptive else limit
        scheduler.adaptive_long_prefill_threshold = False
        try:
            yield
        finally:
            scheduler.max_num_scheduled_tokens = whole
            config.long_prefill_token_threshold, scheduler.adaptive_long_prefill_threshold = part, adaptive

    def update_from_output(self, planned: Any, *args: Any, **kwargs: Any) -> Any:
        """As the scheduler's. A step that ran behind another began when that one ended."""
        outputs = self._update(planned, *args, **kwargs)
        now = self._clock()
        while self._scheduled:
            step, scheduled_s = self._scheduled.popleft()
            if step is planned:
                if planned.total_num_scheduled_tokens:
                    self._budget.step_ended(_num_prompt_tokens(planned), now - max(scheduled_s, self._updated_s))
                break
        self._updated_s = now
        return outputs


def _num_prompt_tokens(planned: Any) -> int:
    """Tokens of a step beyond those that give its requests their next ones."""
    drafted = sum(len(tokens) for tokens in planned.scheduled_spec_decode_tokens.values())
    num_tokens: int = planned.total_num_scheduled_tokens
    return max(0, num_tokens - len(planned.num_scheduled_tokens) - drafted)


def limit_steps(engine: Any, config: StepConfig, has_moves: Callable[[], bool]) -> StepLimits | None:
    """Hold the steps of ``engine``, a vLLM ``EngineCore``, to ``config``; ``has_moves`` as for :class:`StepLimits`.

    None, and nothing is changed, without a target or where prompts cannot be cut anywhere: without chunked prefill, in
    models whose state is kept at block ends only, and where an image must be in one part.
    """
    scheduler, vllm_config = engine.scheduler, engine.vllm_config
    whole_images = vllm_config.model_config.is_multimodal_model and scheduler.scheduler_config.disable_chunked_mm_input
    if (
        not config.itl_target_s
        or vllm_config.model_config.runner_type != "generate"
        or not scheduler.scheduler_config.enable_chunked_prefill
        or scheduler.need_mamba_block_aligned_split
        or whole_images
    ):
        return None
    return StepLimits(scheduler, config, has_moves)
