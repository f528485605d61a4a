"""What might come over a socket: right messages, almost right ones, and rubbish."""

from __future__ import annotations

import os
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from arriero.core.messages import Op
from arriero.wire import LLUMLET_METHOD, PARKED_WAVE, SNAPSHOT_CALL_ID

EXAMPLES = os.environ.get("ARRIERO_FUZZ_EXAMPLES")
"""Set by `make fuzz`: so many cases of each kind, other ones each time. `make test` tries the same few."""

tried = settings(
    max_examples=int(EXAMPLES or 60),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)

names = st.sampled_from(["r1", "r2", "m1", "m2", "", "r" * 300, "\x00", "é"])
numbers = st.integers(-(2**63), 2**64 - 1) | st.integers(-2, 40)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | names | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
tokens = st.lists(st.integers(0, 50), max_size=30)


def some_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A map with some of the fields, each as it should be or anything else."""
    return st.fixed_dictionaries({}, optional={name: right | plain for name, right in fields.items()})


sampling = some_of(
    {
        "max_tokens": st.none() | st.integers(0, 50),
        "min_tokens": st.integers(0, 50),
        "seed": st.none() | st.integers(0, 9),
        "stop_token_ids": st.none() | tokens,
        "ignore_eos": st.booleans(),
        "_eos_token_id": st.none() | st.integers(0, 50),
    }
)
requests = st.tuples(
    names | plain,
    tokens | plain,
    st.none() | plain,
    sampling | plain,
    st.none() | plain,
    st.floats(0, 1e9) | plain,
    st.none() | plain,
    st.none(),
    st.none(),
    st.none(),
    st.none(),
    st.just(0) | plain,
    st.sampled_from([0, PARKED_WAVE]) | plain,
    st.integers(-5, 5) | plain,
)
operations = st.tuples(
    st.sampled_from([op.value for op in Op]) | names,
    some_of(
        {
            "migration_id": names,
            "request_id": names,
            "num_tokens": st.integers(0, 100),
            "first": st.integers(0, 5),
            "end": st.integers(0, 5),
            "epoch": st.integers(-1, 3),
            "known": st.integers(0, 5),
            "output_token_ids": tokens,
            "num_output_tokens": st.integers(0, 30),
            "num_computed_tokens": st.integers(0, 100),
            "due_s": st.floats(0, 1e9),
            "with_blocks": st.booleans(),
            "ticket": some_of({"kind": st.just("shm"), "name": names, "num_bytes": numbers, "staging": numbers}),
        }
    ),
)
calls = st.tuples(
    st.just(0) | plain,
    st.integers(0, 99) | plain,
    st.sampled_from([LLUMLET_METHOD, "arriero_check", "list_loras", "no_such_method"]) | plain,
    st.tuples(operations.map(msgspec.msgpack.encode)) | st.lists(plain, max_size=3) | plain,
)
rubbish = st.binary(max_size=200)


def encoded(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """The bytes of values; or with a few of them lost or changed."""
    whole = values.map(msgspec.msgpack.encode)
    return whole | st.builds(_damaged, whole, st.integers(0, 500), st.integers(0, 4), st.binary(max_size=4)) | rubbish


def _damaged(data: bytes, place: int, lost: int, put: bytes) -> bytes:
    place %= len(data) + 1
    return data[:place] + put + data[place + lost :]


to_an_instance = st.one_of(
    st.tuples(st.just(b"\x00"), encoded(requests)),
    st.tuples(st.just(b"\x01"), encoded(st.lists(names, max_size=3) | plain)),
    st.tuples(st.just(b"\x03"), encoded(calls)),
    st.lists(rubbish, min_size=1, max_size=3).map(tuple),
)

outputs = st.tuples(
    st.integers(0, 2) | plain,
    st.lists(st.tuples(names, tokens) | plain, max_size=3) | plain,
    st.none() | plain,
    st.floats(0, 1e9) | plain,
    st.none()
    | st.tuples(st.sampled_from([SNAPSHOT_CALL_ID, 1, 2]) | plain, st.none() | names, st.tuples(st.none(), plain))
    | plain,
)
from_an_instance = st.lists(encoded(outputs) | rubbish, min_size=1, max_size=3)
