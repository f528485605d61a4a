"""The simulated engine's structs against vLLM's own: same fields, same bytes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from arriero.core.errors import ProtocolError
from arriero.sim import wire
from arriero.sim.sequence import FinishReason
from arriero.sim.wire import SimCodec, SimRequest, decode_call, decode_request, to_job
from arriero.wire import PARKED_WAVE

codec = SimCodec()


def as_map(data: bytes) -> Any:
    """Sampling parameters as the simulated engine's decoder finds them."""
    return msgspec.msgpack.decode(data, ext_hook=lambda code, value: None)


# ---------------------------------------------------------------------- without vLLM


def test_a_request_survives_the_wire() -> None:
    request = SimRequest("r1", [5, 6, 7], max_tokens=9, seed=4, priority=-2, stop_token_ids=[11], min_tokens=2)
    request.current_wave = PARKED_WAVE
    (frame,) = codec.encode(request)
    decoded = decode_request(frame)
    assert decoded == request
    job = to_job(decoded)
    assert (job.request_id, list(job.prompt_token_ids), job.max_tokens) == ("r1", [5, 6, 7], 9)
    assert (job.seed, job.priority, job.stop_token_ids, job.min_tokens) == (4, -2, frozenset({11}), 2)
    assert job.unmovable is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pooling_params": {}}, "pooling"),
        ({"resumable": True}, "streaming"),
        ({"mm_features": [{"modality": "image"}]}, "multi-modal"),
    ],
)
def test_what_cannot_move_says_why(change: dict[str, Any], reason: str) -> None:
    request = msgspec.structs.replace(SimRequest("r1", [1]), **change)
    unmovable = to_job(decode_request(codec.encode(request)[0])).unmovable
    assert unmovable is not None
    assert reason in unmovable


def test_a_request_without_tokens_is_refused() -> None:
    request = msgspec.structs.replace(SimRequest("r1", [1]), prompt_token_ids=None)
    with pytest.raises(ProtocolError, match="no prompt tokens"):
        to_job(decode_request(codec.encode(request)[0]))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02\x03", codec.encode({"a": 1})[0]])
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        decode_request(data)


def test_error_outputs_end_requests() -> None:
    outputs = codec.decode_outputs(codec.encode(codec.error_outputs(3, ["a", "b"])))
    assert outputs.engine_index == 3
    assert [(o.request_id, o.new_token_ids, o.finished) for o in outputs.outputs] == [("a", [], True), ("b", [], True)]
    assert outputs.outputs[0].finish_reason is FinishReason.ERROR
    assert str(outputs.outputs[0].finish_reason) == "error"
    assert outputs.utility_output is None


def test_a_utility_result_survives_the_wire() -> None:
    sent = wire.EngineCoreOutputs(utility_output=wire.UtilityOutput(7, result=wire.UtilityResult(b"bytes")))
    utility = codec.decode_outputs(codec.encode(sent)).utility_output
    assert utility is not None
    assert utility.result is not None
    assert (utility.call_id, utility.failure_message, utility.result.result) == (7, None, b"bytes")


def test_the_simulated_engine_imports_neither_vllm_nor_torch() -> None:
    code = "import sys, arriero.sim.process; assert not {'vllm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------- against vLLM


@pytest.fixture(scope="module")
def vllm_engine() -> Any:
    return pytest.importorskip("vllm.v1.engine", reason="vLLM is not installed: its structs cannot be compared")


@pytest.fixture(scope="module")
def serial(vllm_engine: Any) -> Any:
    return pytest.importorskip("vllm.v1.serial_utils")


@pytest.mark.parametrize("name", ["EngineCoreRequest", "EngineCoreOutput", "UtilityOutput", "EngineCoreOutputs"])
def test_fields_are_vllms_in_vllms_order(vllm_engine: Any, name: str) -> None:
    ours, theirs = getattr(wire, name), getattr(vllm_engine, name)
    assert ours.__struct_fields__ == theirs.__struct_fields__
    assert ours.__struct_config__.array_like is theirs.__struct_config__.array_like is True


def test_the_ready_response_is_vllms(vllm_engine: Any) -> None:
    theirs = [f.name for f in dataclasses.fields(vllm_engine.EngineCoreReadyResponse)]
    assert [f.name for f in dataclasses.fields(wire.EngineCoreReadyResponse)] == theirs


def test_finish_reasons_are_vllms(vllm_engine: Any) -> None:
    assert [(r.value, str(r)) for r in FinishReason] == [(r.value, str(r)) for r in vllm_engine.FinishReason]


def test_what_vllm_encodes_the_simulated_engine_decodes(vllm_engine: Any, serial: Any) -> None:
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=12, seed=3, stop_token_ids=[4, 5], ignore_eos=True, temperature=0.0)
    request = vllm_engine.EngineCoreRequest(
        request_id="r1",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=12.5,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        priority=2,
        current_wave=PARKED_WAVE,
        external_req_id="mine",
    )
    frames = serial.MsgpackEncoder().encode(request)
    decoded = decode_request(frames[0])
    assert (decoded.current_wave, decoded.external_req_id, decoded.client_index) == (PARKED_WAVE, "mine", 0)
    job = to_job(decoded)
    assert (job.request_id, list(job.prompt_token_ids), job.arrival_s, job.priority) == ("r1", [1, 2, 3], 12.5, 2)
    assert (job.max_tokens, job.seed, job.stop_token_ids, job.ignore_eos) == (12, 3, frozenset({4, 5}), True)


def test_omitted_sampling_parameters_mean_vllms_defaults(vllm_engine: Any, serial: Any) -> None:
    from vllm.sampling_params import SamplingParams

    data = serial.MsgpackEncoder().encode(SamplingParams())[0]
    request = msgspec.structs.replace(SimRequest("r1", [1]), sampling_params=as_map(data))
    job = to_job(request)
    assert job.max_tokens == SamplingParams().max_tokens == wire.VLLM_DEFAULT_MAX_TOKENS
    assert (job.seed, job.stop_token_ids, job.ignore_eos, job.min_tokens) == (None, frozenset(), False, 0)


def test_the_end_token_arrives(vllm_engine: Any, serial: Any) -> None:
    from vllm.sampling_params import SamplingParams

    params = SamplingParams()
    params.update_from_generation_config({}, 99)
    data = serial.MsgpackEncoder().encode(params)[0]
    job = to_job(msgspec.structs.replace(SimRequest("r1", [1]), sampling_params=as_map(data)))
    assert job.eos_token_id == params.eos_token_id == 99


def test_what_the_simulated_engine_encodes_vllm_decodes(vllm_engine: Any, serial: Any) -> None:
    decoder = serial.MsgpackDecoder(vllm_engine.EngineCoreOutputs)
    outputs = wire.EngineCoreOutputs(
        engine_index=2,
        outputs=[
            wire.EngineCoreOutput("a", [7]),
            wire.EngineCoreOutput("b", [8], finish_reason=FinishReason.STOP, stop_reason=8),
        ],
        finished_requests={"b"},
    )
    decoded = decoder.decode(codec.encode(outputs))
    assert (decoded.engine_index, decoded.finished_requests, decoded.scheduler_stats) == (2, {"b"}, None)
    assert decoded.timestamp == outputs.timestamp > 0
    assert [(o.request_id, o.new_token_ids, o.finished) for o in decoded.outputs] == [
        ("a", [7], False),
        ("b", [8], True),
    ]
    assert decoded.outputs[1].finish_reason is vllm_engine.FinishReason.STOP
    assert decoded.outputs[1].stop_reason == 8


@pytest.mark.parametrize("value", [b"bytes", ["generate"], True, None, {"open": []}])
def test_utility_results_reach_vllm_and_come_from_it(vllm_engine: Any, serial: Any, value: Any) -> None:
    ours = wire.EngineCoreOutputs(utility_output=wire.UtilityOutput(5, result=wire.UtilityResult(value)))
    theirs = serial.MsgpackDecoder(vllm_engine.EngineCoreOutputs).decode(codec.encode(ours))
    assert theirs.utility_output.call_id == 5
    assert theirs.utility_output.result.result == value
    back = codec.decode_outputs(serial.MsgpackEncoder().encode(theirs))
    assert back.utility_output is not None
    assert back.utility_output.result is not None
    assert back.utility_output.result.result == value


def test_a_utility_call_of_vllms_client_is_understood(serial: Any) -> None:
    frames = serial.MsgpackEncoder().encode((0, 17, "arriero_llumlet", (b"message",)))
    assert decode_call(frames[0]) == (17, "arriero_llumlet", [b"message"])


def test_vllm_decodes_the_ready_response(vllm_engine: Any) -> None:
    from arriero.sim.config import SimEngineConfig
    from arriero.sim.process import ready_response

    data = wire.encode(ready_response(3, SimEngineConfig(num_blocks=100, block_size=8)))
    decoded = msgspec.msgpack.decode(data, type=vllm_engine.EngineCoreReadyResponse)
    assert (decoded.num_gpu_blocks, decoded.block_size, decoded.max_model_len) == (100, 8, 800)
    assert decoded.data_parallel_rank == 3
