"""The wire: what is encoded comes back equal, and whatever else comes in is a ProtocolError and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.core import messages as protocol
from arriero.core.errors import ProtocolError
from arriero.core.messages import OPERATIONS, Answer, Commit, Load, Message, Op
from arriero.core.types import InstanceSnapshot, Phase, RequestSnapshot
from arriero.wire import (
    PARKED_WAVE,
    SNAPSHOT_CALL_ID,
    decode_answer,
    decode_message,
    decode_snapshot,
    encode_answer,
    encode_message,
    encode_snapshot,
)

repeatable = settings(deadline=None, derandomize=True, database=None)

Decode = Callable[[bytes], Any]
DECODERS: dict[str, Decode] = {"message": decode_message, "answer": decode_answer, "snapshot": decode_snapshot}

text = st.text(max_size=20)
whole = st.integers(-(2**63), 2**64 - 1)
tickets = st.recursive(
    st.none() | st.booleans() | whole | st.floats(allow_nan=False) | text | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    str: text,
    int: whole,
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    Any: tickets,
    Op: st.sampled_from(Op),
    bytes: st.binary(max_size=50),
    bytes | None: st.none() | st.binary(max_size=50),
    Phase: st.sampled_from(Phase),
    Phase | None: st.none() | st.sampled_from(Phase),
    tuple[int, ...]: st.lists(whole, max_size=5).map(tuple),
    tuple[tuple[int, int], ...]: st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 9)), max_size=3).map(tuple),
}


def instances_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any value of a dataclass, by its annotations: a field of a new kind breaks these tests until it is listed."""
    hints = get_type_hints(kind)
    return st.builds(kind, **{f.name: VALUES[hints[f.name]] for f in dataclasses.fields(kind)})


VALUES[tuple[RequestSnapshot, ...]] = st.lists(instances_of(RequestSnapshot), max_size=4).map(tuple)

messages = st.one_of([instances_of(kind) for kind in OPERATIONS])
encoded = st.one_of(
    messages.map(encode_message),
    instances_of(Answer).map(encode_answer),
    instances_of(InstanceSnapshot).map(encode_snapshot),
)


def nested(depth: int) -> msgspec.Raw:
    return msgspec.Raw(b"\x91" * depth + b"\x01")


def decoded_or_refused(decode: Decode, data: bytes) -> None:
    """Whatever the bytes, only these two outcomes; any other exception fails the test."""
    outcome: object
    try:
        outcome = decode(data)
    except ProtocolError as error:
        outcome = error
    assert isinstance(outcome, Message | Answer | InstanceSnapshot | ProtocolError)


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", OPERATIONS, ids=lambda kind: kind.__name__)
def test_every_operation_comes_back_as_it_was_sent(kind: type[Message]) -> None:
    @repeatable
    @given(instances_of(kind))
    def round_trip(message: Message) -> None:
        back = decode_message(encode_message(message))
        assert type(back) is kind
        assert back == message

    round_trip()


@repeatable
@given(instances_of(Answer))
def test_every_answer_comes_back_as_it_was_sent(answer: Answer) -> None:
    assert decode_answer(encode_answer(answer)) == answer


@repeatable
@given(instances_of(InstanceSnapshot))
def test_every_snapshot_comes_back_as_it_was_sent(snapshot: InstanceSnapshot) -> None:
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


def test_every_operation_of_the_protocol_can_be_sent() -> None:
    kinds = [k for k in vars(protocol).values() if isinstance(k, type) and issubclass(k, Message)]
    assert {Message, *OPERATIONS} == set(kinds)
    assert sorted(OPERATIONS.values()) == sorted(Op)


def test_sampler_state_and_tickets_stay_bytes() -> None:
    """In JSON they would come back as text."""
    commit = Commit(
        migration_id="m", request_id="r", first=0, end=1, ticket=[b"\xff"], known=0, output_token_ids=(),
        num_output_tokens=0, num_computed_tokens=0, sampler_state=b"\xff\x00", untold=b"\xff",
    )  # fmt: skip
    assert decode_message(encode_message(commit)) == commit


def test_the_marks_are_numbers_that_vllm_never_uses() -> None:
    """It counts waves from 0, and its call ids are the upper half of a UUID."""
    assert PARKED_WAVE < 0
    assert SNAPSHOT_CALL_ID < 0


# ---------------------------------------------------------------------- malformed


@repeatable
@given(st.sampled_from(sorted(DECODERS)), st.binary(max_size=60))
def test_noise_is_refused_and_raises_nothing_else(decoder: str, data: bytes) -> None:
    decoded_or_refused(DECODERS[decoder], data)


@repeatable
@given(st.sampled_from(sorted(DECODERS)), encoded, st.data())
def test_a_message_with_wrong_bytes_in_it_raises_nothing_else(decoder: str, data: bytes, draw: st.DataObject) -> None:
    """Also a message of one kind where another kind is expected."""
    damaged = bytearray(data)
    for at in draw.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
        damaged[at] = draw.draw(st.integers(0, 255))
    decoded_or_refused(DECODERS[decoder], bytes(damaged))


@repeatable
@given(messages, st.data())
def test_a_truncated_operation_is_refused_wherever_it_is_cut(message: Message, data: st.DataObject) -> None:
    whole_message = encode_message(message)
    with pytest.raises(ProtocolError):
        decode_message(whole_message[: data.draw(st.integers(0, len(whole_message) - 1))])


@repeatable
@given(instances_of(Answer), st.data())
def test_a_truncated_answer_is_refused_wherever_it_is_cut(answer: Answer, data: st.DataObject) -> None:
    whole_answer = encode_answer(answer)
    with pytest.raises(ProtocolError):
        decode_answer(whole_answer[: data.draw(st.integers(0, len(whole_answer) - 1))])


@repeatable
@given(instances_of(InstanceSnapshot), st.data())
def test_a_truncated_snapshot_is_refused_wherever_it_is_cut(snapshot: InstanceSnapshot, data: st.DataObject) -> None:
    whole_snapshot = encode_snapshot(snapshot)
    with pytest.raises(ProtocolError):
        decode_snapshot(whole_snapshot[: data.draw(st.integers(0, len(whole_snapshot) - 1))])


@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",  # nothing
        b"\xc1",  # never used by msgpack
        b"\x80",  # an empty map
        b"\x92\xa2\xff\xfe\x80",  # a name that is no UTF-8
        b"\x92\xa8nonsense\x80",  # an operation that there is not
        b"\x92\xa4load\x80",  # an operation without its fields
        b"\x93\xa4drop\x80\x80",  # one part too many
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 items that do not come
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc7\x0c\xff" + b"\xff" * 12,  # a time outside the calendar
    ],
)
def test_typical_damage_is_refused(decoder: str, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        DECODERS[decoder](data)


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_answer(encode_answer(Answer(migration_id="m", op=Op.COPY)) + b"\x00")


def test_a_value_nested_too_deep_is_refused_instead_of_breaking_the_stack() -> None:
    deep = nested(100_000)
    load = Load(migration_id="m", request_id="r", first=0, end=1, ticket=deep, known=0)
    with pytest.raises(ProtocolError):
        decode_message(encode_message(load))
    with pytest.raises(ProtocolError):
        decode_message(b"\x92\xa4drop" + bytes(deep))
    with pytest.raises(ProtocolError):
        decode_answer(encode_answer(Answer(migration_id="m", op=Op.COPY, ticket=deep)))


def test_a_field_of_the_wrong_type_is_refused_with_its_name() -> None:
    body = {"migration_id": "m", "request_id": "r", "num_tokens": "many"}
    with pytest.raises(ProtocolError, match="num_tokens"):
        decode_message(msgspec.msgpack.encode(("reserve", body)))
