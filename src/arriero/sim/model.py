"""The model of a simulated engine: writes KV entries, picks tokens, and knows when a sequence ends."""

from __future__ import annotations

from collections.abc import Collection

from arriero.sim.blocks import BlockPool
from arriero.sim.config import SimEngineConfig
from arriero.sim.sequence import FinishReason, Job, Sequence
from arriero.sim.tokens import attend, chain, mix, next_token


class SimModel:
    """Works on the blocks of ``pool``; see `sim/tokens.py` for what it computes."""

    def __init__(self, config: SimEngineConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool

    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        """Write the entries of the next tokens; the chain goes on from what stands in the blocks."""
        first, end = sequence.num_computed, sequence.num_computed + num_tokens
        self._crash_if_poisoned(sequence.tokens(first, end), end)
        if self._config.with_contents:
            request_id = sequence.request_id
            previous = int(self._pool.read(request_id, first - 1, first)[0]) if first else 0
            self._pool.write(request_id, first, chain(previous, sequence.tokens(first, end)))
        sequence.num_computed = end

    def _crash_if_poisoned(self, tokens: Collection[int], length: int) -> None:
        config = self._config
        if config.crash_token_id in tokens or length == config.crash_length:
            raise RuntimeError(f"crash_token_id={config.crash_token_id} or crash_length={config.crash_length} was met")

    def sample(self, sequence: Sequence) -> tuple[int, FinishReason | None, int | None]:
        """Append the next token; returns it, why the sequence ends with it if so, and the stop token if any."""
        attention, token_id = mix(sequence.num_tokens), 0
        if self._config.with_contents:
            attention = attend(self._pool.read(sequence.request_id, 0, sequence.num_tokens))
            token_id = next_token(attention, sequence.sampler or 0, self._config.vocab_size)
        if sequence.sampler is not None:
            sequence.sampler = mix(sequence.sampler)
        eos = self._eos(sequence.job)
        if eos is not None and mix(~attention) < self._config.eos_probability * 2**64:
            token_id = eos
        sequence.output_token_ids.append(token_id)
        return token_id, *self._end(sequence, token_id, eos)

    def _eos(self, job: Job) -> int | None:
        if job.ignore_eos:
            return None
        if job.eos_token_id is None and self._config.eos_probability:
            return self._config.eos_token_id
        return job.eos_token_id

    def _end(self, sequence: Sequence, token_id: int, eos: int | None) -> tuple[FinishReason | None, int | None]:
        """vLLM's ``check_stop``: the end token, stop tokens, then lengths."""
        job, num_output = sequence.job, len(sequence.output_token_ids)
        if num_output >= job.min_tokens:
            if token_id == eos:
                return FinishReason.STOP, None
            if token_id in job.stop_token_ids:
                return FinishReason.STOP, token_id
        if sequence.num_tokens >= self._config.max_model_len or num_output == job.max_tokens:
            return FinishReason.LENGTH, None
        return None, None
