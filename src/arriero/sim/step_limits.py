"""How many tokens a simulated engine's step takes: as many as vLLM's budget, or what a target leaves to the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from arriero.core.config import StepConfig
from arriero.core.step_budget import StepBudget
from arriero.sim.config import SimEngineConfig


class StepLimits:
    """As `vllm/step_limits.py` sets them."""

    def __init__(self, config: SimEngineConfig) -> None:
        self.has_target = config.itl_target_s > 0
        self.whole = config.max_num_batched_tokens, config.max_num_batched_tokens
        self.has_moves: Callable[[], bool] = lambda: False  #: whether a request moves in or out; a llumlet knows
        self._budget = StepBudget(StepConfig(itl_target_s=config.itl_target_s), lambda: self.has_moves())

    def of(self, num_decodes: int) -> tuple[int, int]:
        """Tokens of the next step, and the most of them of a request that does not decode."""
        prompt_tokens = self._budget.prompt_tokens(num_decodes)
        if prompt_tokens is None:
            return self.whole
        return min(self.whole[0], num_decodes + prompt_tokens), prompt_tokens

    def ended(self, num_prompt_tokens: int, took_s: Iterable[float]) -> None:
        """Steps with so many prompt tokens each have taken so many seconds."""
        for seconds in took_s:
            self._budget.step_ended(num_prompt_tokens, seconds)
