"""Use every costly feature once before traffic comes: the first JSON grammar, logprobs or seeded sample
of an engine takes a second or two, and a request that moves in would pay for it in its pause.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from arriero.vllm.compat import EngineCoreRequest, SamplingParams, StructuredOutputsParams

logger = logging.getLogger(__name__)

_MAX_STEPS = 400
_PROMPT_TOKENS = 256


def warm_up(engine: Any) -> None:
    """Run short requests through the engine's own scheduler; outputs go nowhere.

    A feature that fails here (no tokenizer, no grammar backend) is left for its first user.
    """
    if engine.vllm_config.model_config.runner_type != "generate":
        return
    for number, params in enumerate(_features()):
        try:
            _run(engine, f"arriero-warm-up-{number}", params)
        except Exception:
            logger.warning("warm-up with %s failed; the first such request will be slow", params, exc_info=True)
    engine.reset_prefix_cache()


def time_a_prompt(engine: Any) -> None:
    """Compute a prompt, so that a step budget knows what its tokens take before the first prompt of a client comes."""
    config = engine.vllm_config
    num_tokens = min(_PROMPT_TOKENS, config.model_config.max_model_len // 2)
    _run(engine, "arriero-warm-up-prompt", SamplingParams(max_tokens=4, temperature=0.0), num_tokens)
    engine.reset_prefix_cache()


def _features() -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=4, temperature=0.0),
        SamplingParams(max_tokens=4, temperature=1.0, seed=1, top_k=10, top_p=0.9, logprobs=1),
        SamplingParams(max_tokens=4, temperature=0.0, frequency_penalty=0.1, repetition_penalty=1.1),
        SamplingParams(
            max_tokens=4, temperature=0.0, structured_outputs=StructuredOutputsParams(json={"type": "object"})
        ),
    ]


def _run(engine: Any, request_id: str, params: SamplingParams, num_tokens: int = 8) -> None:
    if params.structured_outputs is not None:
        params.structured_outputs._backend = "xgrammar"
    request = own_request(engine, request_id, list(range(1, num_tokens + 1)), params)
    request.prefill_stats = None
    engine.scheduler.add_request(request)
    for _ in range(_MAX_STEPS):
        if not engine.scheduler.has_requests():
            return
        engine.step_fn()
        if request.use_structured_output and not request.num_computed_tokens:
            time.sleep(0.02)  # the grammar compiles on another thread
    engine.abort_requests([request_id])


def own_request(engine: Any, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> Any:
    """A request that no client has sent, in the form of the engine's scheduler."""
    params.update_from_generation_config({}, eos_token_id=None)
    message = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    request, _ = engine.preprocess_add_request(message)
    return request
