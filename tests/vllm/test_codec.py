"""vLLM's wire as the front end reads it: data, never code; and whatever else comes in is an error, not a crash."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from arriero.core.errors import ProtocolError
from arriero.vllm.codec import VllmCodec
from arriero.vllm.compat import EngineCoreOutput, EngineCoreOutputs, UtilityOutput, UtilityResult

repeatable = settings(deadline=None, derandomize=True, database=None)


class Planted:
    """Whoever unpickles it touches a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def outputs_with(value: Any) -> bytes:
    """Outputs of an instance with ``value`` as the result of a utility call."""
    return msgspec.msgpack.encode([0, [], None, 0.0, [7, None, [None, value]]])


@pytest.fixture(params=[None, "0", "1"])
def insecure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user allows vLLM's own sockets."""
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    if request.param is not None:
        monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", request.param)


@pytest.mark.usefixtures("insecure")
@pytest.mark.parametrize("code", [1, 2])
def test_a_planted_pickle_is_not_opened(tmp_path: Path, code: int) -> None:
    marker = tmp_path / "opened"
    planted = msgspec.msgpack.Ext(code, (pickle, cloudpickle)[code - 1].dumps(Planted(marker)))
    with pytest.raises(ProtocolError, match=f"msgpack type {code}"):
        VllmCodec().decode_outputs([outputs_with(planted)])
    assert not marker.exists()
    pickle.loads(planted.data)
    assert marker.exists()  # it would have been noticed


@pytest.mark.usefixtures("insecure")
def test_no_type_is_imported_by_name() -> None:
    """A result may say what it is to be made into: vLLM imports that module if it is allowed to."""
    frames = [msgspec.msgpack.encode([0, [], None, 0.0, [7, None, [["antigravity", "fly"], {"a": 1}]]])]
    try:
        outputs = VllmCodec().decode_outputs(frames)
    except (TypeError, msgspec.ValidationError):
        return
    assert outputs.utility_output.result.result == {"a": 1}


def test_a_worker_s_method_is_called_by_name_only(tmp_path: Path) -> None:
    from arriero.vllm.engine import ArrieroEngineCore

    called: list[Any] = []
    executor = SimpleNamespace(collective_rpc=lambda *args: called.append(args) or ["done"])
    engine = ArrieroEngineCore.__new__(ArrieroEngineCore)
    engine.model_executor = executor
    with pytest.raises(ProtocolError, match="not a pickled function"):
        engine.collective_rpc(cloudpickle.dumps(Planted(tmp_path / "opened")))
    assert called == []
    assert engine.collective_rpc("check_health", 1.0) == ["done"]
    assert called == [("check_health", 1.0, (), None)]


def test_outputs_come_back_as_they_were_sent() -> None:
    codec = VllmCodec()
    sent = EngineCoreOutputs(engine_index=1, outputs=[EngineCoreOutput("r", [1, 2])])
    assert codec.decode_outputs(codec.encode(sent)) == sent
    result = UtilityOutput(7, result=UtilityResult({"blocks": [1, 2]}))
    back = codec.decode_outputs(codec.encode(EngineCoreOutputs(utility_output=result)))
    assert back.utility_output.result.result == {"blocks": [1, 2]}


@repeatable
@given(st.binary(max_size=300))
def test_any_bytes_are_outputs_or_an_error(data: bytes) -> None:
    decode(data)


@repeatable
@given(st.data())
def test_damaged_outputs_are_outputs_or_an_error(data: st.DataObject) -> None:
    codec = VllmCodec()
    whole = bytes(codec.encode(EngineCoreOutputs(outputs=[EngineCoreOutput("request", list(range(20)))]))[0])
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:place] + data.draw(st.binary(max_size=3)) + whole[place + data.draw(st.integers(0, 3)) :]
    decode(damaged)


def decode(data: bytes) -> None:
    try:
        decoded = VllmCodec().decode_outputs([data])
    except (ProtocolError, msgspec.MsgspecError, UnicodeDecodeError, TypeError, ValueError, IndexError, RecursionError):
        return  # the links log it and go on
    assert isinstance(decoded, EngineCoreOutputs)
