"""Lets vLLM's scheduler preempt and restart requests by the rules of core/preemption.py.

Before each step: who must give way for the blocks that the running requests need is preempted, as vLLM does it itself;
and vLLM sees only those of its queue that may start now, in that order. Where this foresees less than vLLM then needs,
vLLM preempts by its own rule.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from arriero.core.config import PreemptionConfig
from arriero.core.preemption import Preemption, Standing
from arriero.vllm.compat import FCFSRequestQueue, PauseState, Request
from arriero.vllm.engine_port import unsupported_cache


class MemoryRules:
    """Stands before a scheduler's steps."""

    def __init__(self, scheduler: Any, config: PreemptionConfig) -> None:
        self._scheduler = scheduler
        self._schedule = scheduler.schedule
        self._rule = Preemption(config)
        self._pool = scheduler.kv_cache_manager.block_pool
        self._coordinator = scheduler.kv_cache_manager.coordinator
        scheduler.schedule = self.schedule

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As the scheduler's."""
        scheduler = self._scheduler
        if scheduler._pause_state != PauseState.UNPAUSED:
            return self._schedule(*args, **kwargs)
        some_wait = any(_standing(r).has_begun for r in scheduler.waiting)
        if not some_wait and not self._may_lack():
            return self._schedule(*args, **kwargs)
        lacking = self._lacking()
        num_left = self._pool.get_num_free_blocks() - sum(lacking.values())
        preempted = num_left < 0 and self._make_room(lacking, -num_left)
        if not preempted and not some_wait:
            return self._schedule(*args, **kwargs)
        with self._shown([] if preempted else self._starters(num_left)):
            return self._schedule(*args, **kwargs)

    # ------------------------------------------------------------------ who gives way

    def _may_lack(self) -> bool:
        """Whether the next step could take more blocks than are free; in haste."""
        scheduler = self._scheduler
        most = len(scheduler.running) + scheduler.max_num_scheduled_tokens // scheduler.block_size
        return bool(self._pool.get_num_free_blocks() < most)

    def _lacking(self) -> dict[Request, int]:
        """Blocks that each running request takes with the next step."""
        scheduler = self._scheduler
        size, budget = scheduler.block_size, scheduler.max_num_scheduled_tokens
        part = scheduler.scheduler_config.long_prefill_token_threshold
        found = {}
        for request in scheduler.running:
            computed, placeholders = request.num_computed_tokens, request.num_output_placeholders
            if placeholders and computed + 2 - placeholders >= request.num_prompt_tokens + request.max_tokens:
                continue  # its last token is under way
            num_tokens = min(request.num_tokens_with_spec + placeholders - computed, budget)
            if part > 0:
                num_tokens = min(num_tokens, part)
            if num_tokens > 0:
                budget -= num_tokens
                in_all = min(computed + num_tokens + scheduler.num_lookahead_tokens, scheduler.max_model_len)
                held = len(self._coordinator.get_blocks(request.request_id)[0])
                found[request] = max(0, -(-in_all // size) - held)
        return found

    def _make_room(self, lacking: dict[Request, int], missing: int) -> bool:
        """Preempt until ``missing`` blocks more are free, or no longer lacking. Returns whether anybody was."""
        scheduler, now = self._scheduler, time.monotonic()
        candidates = [r for r in scheduler.running if scheduler._request_blocks_can_be_freed(r)]
        preempted = False
        while missing > 0 and candidates:
            victim = self._rule.victim(candidates, _standing)
            candidates.remove(victim)
            before = self._pool.get_num_free_blocks()
            scheduler.running.remove(victim)
            scheduler._preempt_request(victim, now)
            missing -= self._pool.get_num_free_blocks() - before + lacking.get(victim, 0)
            preempted = True
        return preempted

    # ------------------------------------------------------------------ who goes on

    def _starters(self, num_free: int) -> list[Request]:
        """Who may start in the next step, in order, given what is free; last one of whom that is not sure."""
        scheduler, found = self._scheduler, []
        line, num_running = list(scheduler.waiting), len(scheduler.running)
        budget = scheduler.max_num_scheduled_tokens
        while line and budget > 0:
            for request in self._rule.line(line, _standing):
                num_blocks = -(-request.num_tokens // scheduler.block_size)
                kept = self._rule.reserve_blocks(_standing(request), num_running)
                if num_blocks + kept <= num_free:
                    break
            else:
                if not _standing(line[0]).has_begun:
                    found.append(line[0])  # a hit in the prefix cache may have it fit
                break
            found.append(request)
            line.remove(request)
            num_free, num_running, budget = num_free - num_blocks, num_running + 1, budget - request.num_tokens
        return found

    @contextmanager
    def _shown(self, starters: list[Request]) -> Iterator[None]:
        """vLLM's queue holds only ``starters``; afterwards all that have not started, at their places."""
        scheduler, queue = self._scheduler, self._scheduler.waiting
        scheduler.waiting = shown = FCFSRequestQueue(starters)
        try:
            yield
        finally:
            scheduler.waiting = queue
            left, known = list(shown), set(starters)
            queue.remove_requests(known.difference(left))
            for request in reversed(left):
                if request not in known:  # preempted by vLLM itself
                    queue.prepend_request(request)


def _standing(request: Request) -> Standing:
    return Standing(request.priority, request.num_tokens, request.num_output_tokens, request.num_preemptions)


def rule_memory(engine: Any, config: PreemptionConfig | None) -> MemoryRules | None:
    """Have ``engine``, a vLLM ``EngineCore``, keep the rules. None, and nothing is changed, without ``config`` or where
    blocks are not simply as many as tokens take.
    """
    if (
        config is None
        or engine.vllm_config.model_config.runner_type != "generate"
        or unsupported_cache(engine.scheduler) is not None
    ):
        return None
    return MemoryRules(engine.scheduler, config)
