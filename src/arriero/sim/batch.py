"""Continuous batching as vLLM's scheduler does it: who computes how many tokens in the next step."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass

from arriero.core.preemption import Preemption, Standing
from arriero.core.types import Phase
from arriero.sim.blocks import BlockPool
from arriero.sim.config import SimEngineConfig
from arriero.sim.sequence import Sequence
from arriero.sim.step_limits import StepLimits


@dataclass(frozen=True, slots=True)
class Chunk:
    """``num_tokens`` tokens of ``sequence`` in a step, after the ``num_computed`` that it has."""

    sequence: Sequence
    num_computed: int
    num_tokens: int

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1 and self.num_computed > 0


class Batch:
    """The waiting queue, the running list and the rule that moves requests between them.

    Running requests go first, in the order of their admission; the waiting ones follow while there are
    tokens, places and blocks. Who finds no block preempts the last (or least urgent) running request, or who gives way
    by `core/preemption.py`: it is freed, returns to the front of the queue and is computed anew.
    """

    def __init__(self, config: SimEngineConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._numbers = itertools.count(1)
        self.num_preemptions = 0
        self.limits = StepLimits(config)
        self._preemption = Preemption(config.preemption) if config.preemption is not None else None

    @property
    def waiting(self) -> ReadOnly[Sequence]:
        """In queue order."""
        return self._waiting

    @property
    def running(self) -> ReadOnly[Sequence]:
        """In the order of admission."""
        return self._running

    # ------------------------------------------------------------------ coming and going

    def enqueue(self, sequence: Sequence, *, front: bool = False) -> None:
        """Into the queue: by arrival, or at the front. Under priority scheduling always by priority."""
        number = next(self._numbers)
        if self._config.priority_scheduling:
            sequence.place = (sequence.job.priority, sequence.job.arrival_s, number)
        elif front:
            sequence.place = (-1, -number)
        else:
            sequence.place = (0, sequence.job.arrival_s, number)
        self.requeue(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Back to the place in the queue that it had."""
        sequence.phase = Phase.WAITING
        bisect.insort(self._waiting, sequence, key=lambda s: s.place)

    def run(self, sequence: Sequence) -> None:
        """Into the running list, as the newest."""
        sequence.entry_number = next(self._numbers)
        self.rerun(sequence)

    def rerun(self, sequence: Sequence) -> None:
        """Back to the place in the running list that it had."""
        sequence.phase = Phase.RUNNING
        bisect.insort(self._running, sequence, key=lambda s: s.entry_number)

    def remove(self, sequence: Sequence) -> None:
        """Out of the queue or the running list; it keeps its blocks."""
        (self._running if sequence.phase is Phase.RUNNING else self._waiting).remove(sequence)

    # ------------------------------------------------------------------ the rule

    def plan(self, num_places_held: int) -> list[Chunk]:
        """The next step; empty if nothing can run.

        ``num_places_held``: of ``max_num_seqs``, taken by requests that are frozen or coming in.
        """
        while True:
            before = self.num_preemptions
            budget, part = self.limits.of(sum(s.num_tokens - s.num_computed == 1 for s in self._running))
            chunks = self._continue_running(budget, part)
            if self.num_preemptions == before:
                budget -= sum(c.num_tokens for c in chunks)
                self._admit_waiting(chunks, budget, self._config.max_num_seqs - num_places_held)
            if chunks or self.num_preemptions == before:
                return chunks

    def _continue_running(self, budget: int, part: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self._running):
            if budget == 0:
                break
            if sequence.phase is not Phase.RUNNING:
                continue  # preempted a moment ago
            num_tokens = sequence.num_tokens - sequence.num_computed
            if num_tokens > 1:
                num_tokens = min(num_tokens, budget, part)
            victims = self._make_room(sequence, sequence.num_computed + num_tokens)
            budget += sum(c.num_tokens for c in chunks if c.sequence in victims)
            chunks = [c for c in chunks if c.sequence not in victims]
            if sequence in victims:
                if self._preemption is None:
                    break  # as vLLM does
                continue
            self._pool.allocate(sequence.request_id, sequence.num_computed + num_tokens)
            chunks.append(Chunk(sequence, sequence.num_computed, num_tokens))
            budget -= num_tokens
        return chunks

    def _make_room(self, sequence: Sequence, num_tokens: int) -> list[Sequence]:
        """Preempt until ``num_tokens`` fit, or ``sequence`` itself had to go. Returns the victims."""
        victims: list[Sequence] = []
        while sequence not in victims and not self._pool.fits(sequence.request_id, num_tokens):
            victims.append(self._victim())
            self._preempt(victims[-1])
        return victims

    def _victim(self) -> Sequence:
        if self._preemption is not None:
            return self._preemption.victim(self._running, _standing)
        if self._config.priority_scheduling:
            return max(self._running, key=lambda s: (s.job.priority, s.job.arrival_s, s.entry_number))
        return self._running[-1]

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self._pool.free(victim.request_id)
        victim.num_computed = 0
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.enqueue(victim, front=True)

    def _admit_waiting(self, chunks: list[Chunk], budget: int, max_running: int) -> None:
        rule = self._preemption
        while self._waiting and budget > 0 and len(self._running) < max_running:
            line = self._waiting[:1] if rule is None else rule.line(self._waiting, _standing)
            for sequence in line:
                if self._admit(sequence, chunks, budget):
                    budget -= chunks[-1].num_tokens
                    break
            else:
                return

    def _admit(self, sequence: Sequence, chunks: list[Chunk], budget: int) -> bool:
        """Start ``sequence`` with up to ``budget`` tokens. Returns whether it fits."""
        num_tokens = min(sequence.num_tokens, budget)
        must_fit = sequence.num_tokens if self._config.admit_whole_prompt else num_tokens
        if self._preemption is not None:
            num_left = self._preemption.reserve_blocks(_standing(sequence), len(self._running))
            must_fit += num_left * self._config.block_size
        if not self._pool.fits(sequence.request_id, must_fit):
            return False
        self._pool.allocate(sequence.request_id, num_tokens)
        self._waiting.remove(sequence)
        self.run(sequence)
        chunks.append(Chunk(sequence, 0, num_tokens))
        return True


def _standing(sequence: Sequence) -> Standing:
    num_output = len(sequence.output_token_ids)
    return Standing(sequence.job.priority, sequence.num_tokens, num_output, sequence.num_preemptions)
