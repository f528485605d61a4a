"""How many prompt tokens an engine's next step may compute, so that the streams that decode in it do not stand still.

A step is as long for the requests that decode in it as for the prompts that it computes: with vLLM's usual budget a
burst of prompts keeps every stream of the instance waiting for its next token for as long as thousands of prompt tokens
take. Prompts are computed in parts that fit into a target for the time between two tokens instead, and decodes go along
with each part (stall-free batching: Sarathi-Serve, OSDI'24, section 4.2; there the budget is profiled beforehand, here
the steps tell it). The same holds while a request moves in or out: each stage of its move waits for the end of a step.

Where neither is so, a step still takes about a second at most: a request that arrives, or the first message of a move,
waits for its end, and on a slow core thousands of prompt tokens take half a minute.
"""

from __future__ import annotations

from collections.abc import Callable

from arriero.core.config import StepConfig

_DECODE_WEIGHT = 0.1  # of the last step without prompt tokens in the moving average
_MEMORY = 0.9  # of what is known, kept from one step with prompt tokens to the next


class StepBudget:
    """Learns from an instance's steps how long a prompt token takes."""

    def __init__(self, config: StepConfig, has_moves: Callable[[], bool]) -> None:
        """``has_moves``: whether a request moves to the instance or away; asked only where no request decodes."""
        self._config = config
        self._has_moves = has_moves
        self._decode_s = 0.0  # a step without prompt tokens, moving average; 0: not seen yet
        self._prompt_s = 0.0  # what steps with prompt tokens took beyond that, a fading sum
        self._prompt_tokens = 0.0  # the tokens of these, a fading sum

    def step_ended(self, num_prompt_tokens: int, took_s: float) -> None:
        """A step with so many prompt tokens took ``took_s`` seconds."""
        if num_prompt_tokens:
            self._prompt_s = _MEMORY * self._prompt_s + max(0.0, took_s - self._decode_s)
            self._prompt_tokens = _MEMORY * self._prompt_tokens + num_prompt_tokens
        elif self._decode_s:
            self._decode_s += _DECODE_WEIGHT * (took_s - self._decode_s)
        else:
            self._decode_s = took_s

    def prompt_tokens(self, num_decodes: int) -> int | None:
        """The most prompt tokens for a step in which ``num_decodes`` requests decode; None: what the engine takes.

        Where decodes alone take much of the target, prompts get a multiple of their time all the same: nobody starves.
        """
        target_s = self._config.itl_target_s
        if not target_s or self._prompt_s <= 0:
            return None
        if not (num_decodes or self._has_moves()):
            target_s = max(target_s, self._config.prompt_step_s)
        spare_s = max(target_s - self._decode_s, self._config.prompts_to_decodes * self._decode_s)
        return max(self._config.least_prompt_tokens, int(spare_s * self._prompt_tokens / self._prompt_s))
