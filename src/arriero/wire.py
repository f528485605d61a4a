"""Bytes of the llumlet protocol: what travels inside vLLM's UTILITY calls. msgpack, never pickle."""

from __future__ import annotations

from typing import Any

import msgspec

from arriero.core.errors import ProtocolError
from arriero.core.messages import OPERATIONS, Answer, Message
from arriero.core.types import InstanceSnapshot

PARKED_WAVE = -1
"""`current_wave` of a request that must wait for its RESERVE instead of being scheduled.

vLLM uses that field only among data-parallel MoE ranks, where it counts from 0.
"""

SNAPSHOT_CALL_ID = -0xA110
"""`call_id` of an unasked utility output that carries an instance snapshot."""

LLUMLET_METHOD = "arriero_llumlet"
"""Name of the utility method that takes an encoded operation and returns an encoded answer."""

_MESSAGES: dict[str, type[Message]] = {op.value: kind for kind, op in OPERATIONS.items()}
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # the last: nested too deep
_encoder = msgspec.msgpack.Encoder()
_answers = msgspec.msgpack.Decoder(Answer)
_snapshots = msgspec.msgpack.Decoder(InstanceSnapshot)
_operations = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])


def encode_message(message: Message) -> bytes:
    """One operation as bytes."""
    return _encoder.encode((OPERATIONS[type(message)].value, message))


def decode_message(data: bytes) -> Message:
    """The operation in ``data``. Raises ProtocolError on anything else."""
    try:
        name, body = _operations.decode(data)
        return msgspec.msgpack.decode(body, type=_MESSAGES[name])
    except (*_MALFORMED, KeyError) as error:
        raise ProtocolError(f"malformed llumlet operation ({len(data)} bytes): {error}") from error


def encode_answer(answer: Answer) -> bytes:
    """One answer as bytes."""
    return _encoder.encode(answer)


def decode_answer(data: bytes) -> Answer:
    """The answer in ``data``. Raises ProtocolError on anything else."""
    return _decode(_answers, data)  # type: ignore[no-any-return]


def encode_snapshot(snapshot: InstanceSnapshot) -> bytes:
    """One snapshot as bytes."""
    return _encoder.encode(snapshot)


def decode_snapshot(data: bytes) -> InstanceSnapshot:
    """The snapshot in ``data``. Raises ProtocolError on anything else."""
    return _decode(_snapshots, data)  # type: ignore[no-any-return]


def _decode(decoder: Any, data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except _MALFORMED as error:
        raise ProtocolError(f"malformed message ({len(data)} bytes): {error}") from error
