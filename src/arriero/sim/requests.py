"""What an arrival of a workload is to the scheduler and to an engine."""

from __future__ import annotations

from arriero.core.types import Dispatchable, RequestId
from arriero.sim.fast_sequence import FastSequence
from arriero.sim.prefix_cache import Share, prompt_segments
from arriero.sim.settings import SimulatorConfig
from arriero.workload.workload import PREFIX_BLOCK_TOKENS, Arrival


class Requests:
    """By the size of the engines, and by what the policy may know."""

    def __init__(self, config: SimulatorConfig) -> None:
        queueing = config.scheduler.queueing
        self._engine = config.engine
        self._knows_ends = queueing is not None and queueing.trusts_max_tokens

    def why_not(self, arrival: Arrival) -> str | None:
        """Why no engine takes the request; None if they do."""
        longest = self._engine.max_model_len
        if arrival.prompt_tokens + arrival.output_tokens <= longest:
            return None
        return f"{arrival.prompt_tokens} + {arrival.output_tokens} tokens are more than max_model_len={longest}"

    def facts(self, request_id: RequestId, arrival: Arrival) -> Dispatchable:
        """What the scheduler is told of a request that is new."""
        hashes = tuple(arrival.prefix_ids()) if self._engine.prefix_caching else ()
        return Dispatchable(
            request_id=request_id,
            num_prompt_tokens=arrival.prompt_tokens,
            max_tokens=self.max_tokens(arrival),
            priority=arrival.priority,
            ttft_target_s=arrival.ttft_target_s,
            block_hashes=hashes,
            num_hashed_tokens=min(arrival.prompt_tokens, len(hashes) * PREFIX_BLOCK_TOKENS),
        )

    def max_tokens(self, arrival: Arrival) -> int:
        """The bound that the client gave, or the model's; for a clairvoyant what nobody else knows: the end."""
        if self._knows_ends:
            return arrival.output_tokens
        longest = self._engine.max_model_len - arrival.prompt_tokens
        return min(arrival.max_tokens, longest) if arrival.max_tokens else longest

    def sequence(self, request_id: RequestId, arrival: Arrival) -> FastSequence:
        """The request, as an engine gets it anew."""
        engine = self._engine
        return FastSequence(
            request_id,
            arrival.prompt_tokens,
            arrival.output_tokens,
            arrival.priority,
            arrival.arrival_s,
            share=Share(prompt_segments(arrival, engine.block_size)) if engine.prefix_caching else None,
        )
