"""vLLM's structs as they look on the wire, without vLLM.

Structs are arrays in vLLM's field order (`tests/sim/test_wire_contract.py` holds them against the real ones);
sampling parameters are a map that omits defaults; the ready response is a map. Fields that the simulated
engine has no use for are ``Any``: whatever they hold is passed over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from arriero.core.errors import ProtocolError
from arriero.core.types import RequestId
from arriero.sim.sequence import FinishReason, Job

VLLM_DEFAULT_MAX_TOKENS = 16
"""`SamplingParams.max_tokens` where the map omits it."""


class EngineCoreRequest(msgspec.Struct, array_like=True, omit_defaults=True):
    """A request, from the front end to an instance."""

    request_id: str
    prompt_token_ids: list[int] | None
    mm_features: Any
    sampling_params: dict[str, Any] | None
    pooling_params: Any
    arrival_time: float
    lora_request: Any
    cache_salt: Any
    data_parallel_rank: Any
    prompt_embeds: Any = None
    prompt_is_token_ids: Any = None
    client_index: int = 0
    current_wave: int = 0
    priority: int = 0
    trace_headers: Any = None
    resumable: bool = False
    external_req_id: str | None = None
    reasoning_ended: Any = None
    reasoning_parser_kwargs: Any = None
    abort_immediately: bool = False
    session_id: Any = None
    kv_hints: Any = None


class _Sampling(msgspec.Struct, rename={"eos_token_id": "_eos_token_id"}):
    """Of vLLM's sampling parameters, those that the simulated engine looks at."""

    max_tokens: int | None = VLLM_DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    eos_token_id: int | None = None
    ignore_eos: bool = False


class EngineCoreOutput(msgspec.Struct, array_like=True, omit_defaults=True):
    """What a step did for one request."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: Any = None
    new_prompt_logprobs_tensors: Any = None
    pooling_output: Any = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    events: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    trace_headers: Any = None
    prefill_stats: Any = None
    routed_experts: Any = None
    num_nans_in_logits: int = 0
    mm_cache_miss_hashes: Any = None
    new_sampling_mask: Any = None
    spec_decode_metrics: Any = None
    prompt_token_id_logprobs: Any = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class UtilityResult:
    """The value that a utility call returned; on the wire ``[type information or None, value]``."""

    def __init__(self, result: Any = None) -> None:
        self.result = result


class UtilityOutput(msgspec.Struct, array_like=True):
    """The outcome of a utility call."""

    call_id: int
    failure_message: str | None = None
    result: UtilityResult | None = None


class EngineCoreOutputs(msgspec.Struct, array_like=True, omit_defaults=True):
    """A message from an instance to the front end."""

    engine_index: int = 0
    outputs: list[EngineCoreOutput] = []
    scheduler_stats: Any = None
    timestamp: float = 0.0
    utility_output: UtilityOutput | None = None
    finished_requests: set[str] | None = None
    wave_complete: int | None = None
    start_wave: int | None = None
    weight_version: str | None = None

    def __post_init__(self) -> None:
        if self.timestamp == 0.0:
            self.timestamp = time.monotonic()


@dataclass
class EngineCoreReadyResponse:
    """An instance's first message: it has started."""

    max_model_len: int
    num_gpu_blocks: int
    block_size: int
    dp_stats_address: str | None
    dtype: str
    vllm_version: str
    world_size: int
    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    decode_context_parallel_size: int
    data_parallel_rank: int
    max_num_seqs: int
    max_num_batched_tokens: int
    instance_id: str
    supports_lora: bool
    max_loras: int
    mamba_block_size: int | None = None
    kv_cache_size_tokens: int | None = None
    kv_cache_max_concurrency: float | None = None
    kv_events_config: Any = None
    weight_transfer_backend: str | None = None
    enable_sleep_mode: bool = False
    supports_draft_weight_updates: bool = False
    effective_attention_block_size: int | None = None


# ---------------------------------------------------------------------- bytes


def _to_wire(obj: Any) -> Any:
    if isinstance(obj, UtilityResult):
        return None, obj.result
    raise TypeError(f"{type(obj).__name__} has no wire format")


def _from_wire(kind: type, obj: Any) -> Any:
    if kind is UtilityResult:
        return UtilityResult(obj[1])
    return obj


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_outputs = msgspec.msgpack.Decoder(EngineCoreOutputs, dec_hook=_from_wire)
_requests = msgspec.msgpack.Decoder(EngineCoreRequest, ext_hook=lambda code, data: None)
_ids = msgspec.msgpack.Decoder(list[str])
_calls = msgspec.msgpack.Decoder(tuple[Any, int, str, list[Any]], ext_hook=lambda code, data: None)


class SimCodec:
    """A front end's codec (`arriero.frontend.links.Codec`) for instances of any kind, without vLLM."""

    def encode(self, obj: Any) -> list[bytes]:
        """Frames of a request, a list of ids or a utility call."""
        return [_encoder.encode(obj)]

    def decode_outputs(self, frames: Sequence[Any]) -> EngineCoreOutputs:
        """What an instance sent."""
        return _decode(_outputs, frames[0])  # type: ignore[no-any-return]

    def is_self_contained(self, request: Any) -> bool:
        """A prompt is all there is."""
        return True

    def error_outputs(self, engine_index: int, request_ids: Sequence[RequestId]) -> EngineCoreOutputs:
        """Outputs that end these requests with an error."""
        outputs = [EngineCoreOutput(r, [], finish_reason=FinishReason.ERROR) for r in request_ids]
        return EngineCoreOutputs(engine_index=engine_index, outputs=outputs, finished_requests=set(request_ids))


def encode(obj: Any) -> bytes:
    """Any struct of this file, or plain values."""
    return _encoder.encode(obj)


def decode_request(data: Any) -> EngineCoreRequest:
    """The payload of an ADD. Raises ProtocolError."""
    return _decode(_requests, data)  # type: ignore[no-any-return]


def decode_ids(data: Any) -> list[RequestId]:
    """The payload of an ABORT. Raises ProtocolError."""
    return _decode(_ids, data)  # type: ignore[no-any-return]


def decode_call(data: Any) -> tuple[int, str, list[Any]]:
    """The payload of a UTILITY: call id, method, arguments. Raises ProtocolError."""
    _, call_id, method, arguments = _decode(_calls, data)
    return call_id, method, arguments


def _decode(decoder: Any, data: Any) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, IndexError) as error:
        raise ProtocolError(f"malformed message: {error}") from error


# ---------------------------------------------------------------------- requests


def SimRequest(
    request_id: RequestId,
    prompt_token_ids: Sequence[int],
    max_tokens: int | None = VLLM_DEFAULT_MAX_TOKENS,
    seed: int | None = None,
    priority: int = 0,
    **sampling: Any,
) -> EngineCoreRequest:
    """A request for tests; further arguments are sampling parameters by vLLM's names."""
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        mm_features=None,
        sampling_params={"max_tokens": max_tokens, "seed": seed, **sampling},
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        priority=priority,
        external_req_id=request_id,
    )


def to_job(request: EngineCoreRequest) -> Job:
    """What the request asks of the simulated engine. Raises ProtocolError if it has no prompt tokens."""
    if request.prompt_token_ids is None:
        raise ProtocolError(f"request {request.request_id} has no prompt tokens: the simulated engine needs them")
    try:
        params = msgspec.convert(request.sampling_params or {}, _Sampling)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"request {request.request_id} has unusable sampling parameters: {error}") from error
    return Job(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        max_tokens=1 if request.pooling_params is not None else params.max_tokens,
        min_tokens=params.min_tokens,
        seed=params.seed,
        priority=request.priority,
        arrival_s=request.arrival_time,
        stop_token_ids=frozenset(params.stop_token_ids or ()),
        eos_token_id=params.eos_token_id,
        ignore_eos=params.ignore_eos,
        unmovable=_unmovable(request),
    )


def _unmovable(request: EngineCoreRequest) -> str | None:
    if request.pooling_params is not None:
        return "it is a pooling request"
    if request.resumable:
        return "its input is still streaming in"
    if request.mm_features:
        return "it has multi-modal input"
    return None
