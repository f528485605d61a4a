"""FastEngine: the scheduling rule of `sim/batch.py` on bare counts, and many decode steps at a time.

For the simulator only. Blocks are counted, not numbered; tokens are counted, not made. While all that runs only
decodes and nobody finishes, comes or lacks a block, each step is like the one before with one token more in every
context: such steps are planned as one :class:`Segment`, whose step ends are summed one by one, so that their times
are bit for bit those of single steps. A test holds both against :class:`arriero.sim.engine.SimEngine`.
"""

from __future__ import annotations

import bisect
from dataclasses import replace
from operator import attrgetter

from arriero.core.errors import ConflictError
from arriero.core.preemption import Preemption, Standing
from arriero.core.types import InstanceId, Phase, RequestId
from arriero.sim.config import SimEngineConfig
from arriero.sim.fast_sequence import FastSequence, Segment
from arriero.sim.prefix_cache import PrefixCache, Share
from arriero.sim.step_limits import StepLimits

_PLACE = attrgetter("place")
_ENTRY = attrgetter("entry_number")


class FastEngine:
    """One engine. ``prefill_first``: as vLLM v0 did it, prompts are computed whole, in steps of their own."""

    def __init__(self, config: SimEngineConfig, *, instance: InstanceId = 0, prefill_first: bool = False) -> None:
        self.config = config
        self.block_size = config.block_size
        self.num_free = config.num_blocks
        self.num_steps = 0
        self.step_s = 0.0  #: how long the last finished step took
        self.begun_s = 0.0  #: the segment in flight
        self.num_preemptions = 0
        self.num_looked_up = 0  #: tokens of admitted requests that were looked for in the prefix cache
        self.num_hit = 0  #: those of them that were there
        self.cache = PrefixCache(config.num_blocks) if config.prefix_caching else None
        self.slow_down = 1.0  #: factor on the time of steps that begin
        self.live: dict[RequestId, FastSequence] = {}
        self.frozen: dict[RequestId, FastSequence] = {}
        self.reserved: dict[RequestId, FastSequence] = {}
        self.waiting: list[FastSequence] = []
        self.running: list[FastSequence] = []
        self.preempted: list[FastSequence] = []  #: since somebody emptied the list
        self.segment: Segment | None = None
        self.instance = instance
        self._prefill_first = prefill_first
        self._numbers = 0
        self.limits = StepLimits(config)
        self._preemption = Preemption(config.preemption) if config.preemption is not None else None
        self._model = config.step_time
        self._linear_ms = replace(config.step_time, c=0, d=0, e=0, host_ms=0, scale=1)
        self._linear: dict[int, float] = {}

    # ------------------------------------------------------------------ coming and going

    def add(self, sequence: FastSequence) -> None:
        """Queue a new request. Raises ConflictError if it can never run here."""
        longest = self.config.max_model_len
        if not 1 <= sequence.num_prompt < sequence.num_prompt + sequence.num_wanted <= longest:
            raise ConflictError(
                f"{sequence.num_prompt} + {sequence.num_wanted} tokens are too many or too few: "
                f"prompt and output are 1 or more each, and at most {longest} together"
            )
        if self.cache is not None and sequence.share is None:
            sequence.share = Share(())
        self.live[sequence.request_id] = sequence
        self.enqueue(sequence)

    def enqueue(self, sequence: FastSequence, *, front: bool = False) -> None:
        """Into the queue: by arrival, or at the front. Under priority scheduling always by priority."""
        self._numbers += 1
        if self.config.priority_scheduling:
            sequence.place = (sequence.priority, sequence.arrival_s, self._numbers)
        elif front:
            sequence.place = (-1, -self._numbers)
        else:
            sequence.place = (0, sequence.arrival_s, self._numbers)
        self.requeue(sequence)

    def requeue(self, sequence: FastSequence) -> None:
        """Back to the place in the queue that it had."""
        sequence.phase = Phase.WAITING
        bisect.insort(self.waiting, sequence, key=_PLACE)

    def run(self, sequence: FastSequence) -> None:
        """Into the running list, as the newest."""
        self._numbers += 1
        sequence.entry_number = self._numbers
        self.rerun(sequence)

    def rerun(self, sequence: FastSequence) -> None:
        """Back to the place in the running list that it had."""
        sequence.phase = Phase.RUNNING
        bisect.insort(self.running, sequence, key=_ENTRY)

    def remove(self, sequence: FastSequence) -> None:
        """Out of the queue or the running list; it keeps its blocks."""
        (self.running if sequence.phase is Phase.RUNNING else self.waiting).remove(sequence)

    def free(self, sequence: FastSequence) -> None:
        """Take back its blocks."""
        if self.cache is None:
            self.num_free += sequence.num_blocks
        else:
            assert sequence.share is not None
            num_full = sequence.num_computed // self.block_size
            self.num_free += self.cache.let_go(sequence.share, sequence.num_blocks, num_full)
        sequence.num_blocks = 0

    def allocate(self, sequence: FastSequence, num_tokens: int) -> None:
        """Give it blocks for ``num_tokens`` tokens in all. Raises ConflictError, and changes nothing."""
        missing = -(-num_tokens // self.block_size) - sequence.num_blocks
        if missing > self.num_free:
            raise ConflictError(f"{missing} more KV blocks are needed, {self.num_free} are free")
        if missing > 0:
            self.num_free -= missing
            sequence.num_blocks += missing
            if self.cache is not None:
                self.cache.take(missing)

    def note_computed(self, sequence: FastSequence, num_tokens: int) -> None:
        """Its first ``num_tokens`` tokens are computed, or will be with the planned step: others may hit them."""
        if self.cache is not None:
            assert sequence.share is not None
            self.cache.computed(sequence.share, num_tokens // self.block_size)

    def drop(self, request_id: RequestId) -> bool:
        """Forget a live request and free its blocks. Returns whether it was here. Not while a step is in flight."""
        sequence = self.live.pop(request_id, None)
        if sequence is None:
            return False
        if self.frozen.pop(request_id, None) is None:
            self.remove(sequence)
        self.free(sequence)
        return True

    def lose_all(self) -> None:
        """Forget all requests, and the step in flight."""
        self.segment = None
        for request_id in list(self.live):
            self.drop(request_id)
        for sequence in self.reserved.values():
            self.free(sequence)
        self.reserved.clear()

    @property
    def num_places_held(self) -> int:
        """Places in the batch of requests that are frozen, or reserved with blocks."""
        if not self.frozen and not self.reserved:
            return 0
        frozen = sum(s.thaws_to is Phase.RUNNING for s in self.frozen.values())
        return frozen + sum(s.num_blocks > 0 for s in self.reserved.values())

    # ------------------------------------------------------------------ steps

    def begin(self, now: float, max_steps: int = 1) -> Segment | None:
        """Decide the next batch, and keep it for up to ``max_steps`` steps; None if nothing can run."""
        assert self.segment is None, "the steps in flight have not been finished"
        before = self.num_preemptions
        chunks = self._plan()
        if not chunks:
            return None
        num_decodes = context = 0
        prefills: list[tuple[int, int]] = []
        awaited = False
        for sequence, num_tokens in chunks:
            computed = sequence.num_computed
            if num_tokens == 1 and computed:
                num_decodes += 1
                context += computed + 1
                awaited = awaited or sequence.awaited
            else:
                prefills.append((num_tokens, computed))
        if prefills:
            ms = self._model.step_ms(prefills, num_decodes, context)
            ends = [now + ms / 1000 * self.slow_down]
        else:
            # After a preemption nobody is admitted, but in the next step somebody may be.
            alike = not awaited and num_decodes == len(self.running) and self.num_preemptions == before
            ends = self._decode_ends(now, num_decodes, context, self._num_alike(max_steps) if alike else 1)
        self.segment = Segment(ends, chunks, sum([n for n, _ in prefills]))
        self.begun_s = now
        return self.segment

    def _decode_ends(self, now: float, num_decodes: int, context: int, num_steps: int) -> list[float]:
        """Ends of ``num_steps`` decode steps; the sum is taken as :meth:`StepTimeModel.step_ms` takes it."""
        model = self._model
        linear = self._linear.get(num_decodes)
        if linear is None:
            linear = self._linear[num_decodes] = self._linear_ms.step_ms([], num_decodes, 0)
        fixed, e, host, scale = linear + model.d * num_decodes, model.e, model.host_ms, model.scale
        slow_down = self.slow_down
        ends = []
        for _ in range(num_steps):
            now = now + scale * (fixed + e * context + host) / 1000 * slow_down
            ends.append(now)
            context += num_decodes
        return ends

    def _num_alike(self, max_steps: int) -> int:
        """For how many steps the running sequences can go on, the first of which is planned: none ends but with the
        last, and no block is lacking. Waiting ones stay out, since memory only shrinks.
        """
        running, size = self.running, self.block_size
        num_steps = min(max_steps, min(s.num_wanted - s.num_output for s in running))
        if self.num_free >= len(running) * (num_steps // size + 1):
            return num_steps
        # Sequence i takes its next block in step r_i (2 is the one after the planned one), then every `size` steps.
        next_blocks = sorted(min(s.num_blocks * size - s.num_computed, size) for s in running)
        periods, rest = divmod(self.num_free, len(running))
        return min(num_steps, periods * size + next_blocks[rest])

    def cut(self, now: float) -> bool:
        """End the segment with the step that is in flight at ``now``. Returns whether that shortened it."""
        assert self.segment is not None
        ends = self.segment.ends
        num_steps = bisect.bisect_left(ends, now) + 1
        if num_steps >= len(ends):
            return False
        del ends[num_steps:]
        return True

    def finish(self) -> tuple[list[FastSequence], list[FastSequence]]:
        """Apply the steps in flight. Returns the awaited sequences that got a token, and those that ended."""
        assert self.segment is not None, "no step is in flight"
        segment, self.segment = self.segment, None
        num_steps, size = len(segment.ends), self.block_size
        self.step_s = self.took_s(segment, num_steps)
        self.num_steps += num_steps
        if self.limits.has_target:
            self.limits.ended(segment.num_prompt_tokens, (self.took_s(segment, n + 1) for n in range(num_steps)))
        heard: list[FastSequence] = []
        ended: list[FastSequence] = []
        for sequence, num_tokens in segment.chunks:
            computed = sequence.num_computed = sequence.num_computed + num_tokens * num_steps
            if computed < sequence.num_prompt + sequence.num_output:
                continue
            sequence.num_output += num_steps
            if num_steps > 1 and (missing := -(-computed // size) - sequence.num_blocks) > 0:
                self.num_free -= missing
                sequence.num_blocks += missing
                if self.cache is not None:
                    self.cache.take(missing)
            if sequence.awaited:
                sequence.awaited = False
                heard.append(sequence)
            if sequence.num_output >= sequence.num_wanted:
                ended.append(sequence)
        for sequence in ended:
            self.drop(sequence.request_id)
        return heard, ended

    def took_s(self, segment: Segment, number: int) -> float:
        """Seconds that step ``number`` (from 1) of the segment took."""
        return segment.ends[number - 1] - (segment.ends[number - 2] if number > 1 else self.begun_s)

    # ------------------------------------------------------------------ the rule, as in sim/batch.py

    def _plan(self) -> list[tuple[FastSequence, int]]:
        if self._prefill_first:
            chunks: list[tuple[FastSequence, int]] = []
            self._admit_waiting(chunks, self.config.max_num_batched_tokens)
            if chunks:
                return chunks
        while True:
            before = self.num_preemptions
            budget, part = self.limits.of(self._num_decodes) if self.limits.has_target else self.limits.whole
            chunks = self._continue_running(budget, part)
            if self.num_preemptions == before and self.waiting and not self._prefill_first:
                self._admit_waiting(chunks, budget - sum([n for _, n in chunks]))
            if chunks or self.num_preemptions == before:
                return chunks

    @property
    def _num_decodes(self) -> int:
        return sum([s.num_prompt + s.num_output - s.num_computed == 1 for s in self.running])

    def _continue_running(self, budget: int, part: int) -> list[tuple[FastSequence, int]]:
        chunks: list[tuple[FastSequence, int]] = []
        size, cache = self.block_size, self.cache
        for sequence in self.running[:]:
            if budget == 0:
                break
            if sequence.phase is not Phase.RUNNING:
                continue  # preempted a moment ago
            num_tokens = sequence.num_prompt + sequence.num_output - sequence.num_computed
            if num_tokens > 1:
                num_tokens = min(num_tokens, budget, part)
            missing = -(-(sequence.num_computed + num_tokens) // size) - sequence.num_blocks
            if missing > 0:
                if missing > self.num_free:
                    victims = self._make_room(sequence, missing)
                    budget += sum(n for s, n in chunks if s in victims)
                    chunks = [(s, n) for s, n in chunks if s not in victims]
                    if sequence in victims:
                        if self._preemption is None:
                            break  # as vLLM does
                        continue
                self.num_free -= missing
                sequence.num_blocks += missing
                if cache is not None:
                    cache.take(missing)
            if cache is not None and sequence.num_computed < sequence.num_prompt:
                self.note_computed(sequence, sequence.num_computed + num_tokens)
            chunks.append((sequence, num_tokens))
            budget -= num_tokens
        return chunks

    def _make_room(self, sequence: FastSequence, missing: int) -> list[FastSequence]:
        """Preempt until ``missing`` blocks are free, or ``sequence`` itself had to go. Returns the victims."""
        victims: list[FastSequence] = []
        while sequence not in victims and missing > self.num_free:
            victims.append(self._victim())
            self._preempt(victims[-1])
        return victims

    def _victim(self) -> FastSequence:
        if self._preemption is not None:
            return self._preemption.victim(self.running, _standing)
        if self.config.priority_scheduling:
            return max(self.running, key=lambda s: (s.priority, s.arrival_s, s.entry_number))
        return self.running[-1]

    def _preempt(self, victim: FastSequence) -> None:
        self.running.remove(victim)
        if victim.share is not None:
            num_blocks = victim.num_computed // self.block_size
            victim.share.make_private(victim.request_id, num_blocks)
            self.note_computed(victim, victim.num_computed)
        self.free(victim)
        victim.num_computed = 0
        victim.num_preemptions += 1
        victim.awaited = True
        self.num_preemptions += 1
        self.preempted.append(victim)
        self.enqueue(victim, front=True)

    def _admit_waiting(self, chunks: list[tuple[FastSequence, int]], budget: int) -> None:
        max_running, rule = self.config.max_num_seqs - self.num_places_held, self._preemption
        while self.waiting and budget > 0 and len(self.running) < max_running:
            line = self.waiting[:1] if rule is None else rule.line(self.waiting, _standing)
            for sequence in line:
                if self._admit(sequence, chunks, budget):
                    budget -= chunks[-1][1]
                    break
            else:
                return

    def _admit(self, sequence: FastSequence, chunks: list[tuple[FastSequence, int]], budget: int) -> bool:
        """Start ``sequence`` with up to ``budget`` tokens. Returns whether it fits."""
        size, wanted = self.block_size, sequence.num_prompt + sequence.num_output
        found, num_found, num_revived = self._look_up(sequence, wanted)
        computed = num_found * size
        num_tokens = min(wanted - computed, budget)
        if self._prefill_first and num_tokens < wanted - computed:
            if chunks:
                return False
            num_tokens = wanted - computed
        whole = self.config.admit_whole_prompt or self._prefill_first
        num_blocks = -(-(wanted if whole else computed + num_tokens) // size)
        if self._preemption is not None:
            num_blocks += self._preemption.reserve_blocks(_standing(sequence), len(self.running))
        if num_blocks - num_found + num_revived > self.num_free:
            return False
        if num_found:
            assert self.cache is not None
            assert sequence.share is not None
            self.num_free -= self.cache.hold(sequence.share, found)
            sequence.num_blocks, sequence.num_computed = num_found, computed
            self.num_hit += computed
        self.num_looked_up += wanted
        self.allocate(sequence, computed + num_tokens)
        self.note_computed(sequence, computed + num_tokens)
        self.waiting.remove(sequence)
        self.run(sequence)
        chunks.append((sequence, num_tokens))
        return True

    def _look_up(self, sequence: FastSequence, num_tokens: int) -> tuple[list[int], int, int]:
        """The hit in the prefix cache: blocks by segment, their sum, and how many of them are free now."""
        if self.cache is None:
            return [], 0, 0
        assert sequence.share is not None
        found, num_revived = self.cache.find(sequence.share.segments, (num_tokens - 1) // self.block_size)
        return found, sum(found), num_revived


def _standing(sequence: FastSequence) -> Standing:
    return Standing(sequence.priority, sequence.num_tokens, sequence.num_output, sequence.num_preemptions)
