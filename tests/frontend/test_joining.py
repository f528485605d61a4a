"""Who may join: instances that differ in what a request's continuation depends on are told why they may not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero import __version__
from arriero.frontend.joining import Membership
from arriero.sim.config import SimEngineConfig
from arriero.sim.process import ready_response
from arriero.sim.wire import encode

repeatable = settings(deadline=None, derandomize=True, database=None)


def says(**changes: Any) -> bytes:
    """The first message of an instance."""
    fields = msgspec.msgpack.decode(encode(ready_response(0, SimEngineConfig())))
    return msgspec.msgpack.encode({**fields, "vllm_version": "0.32.0", **changes})


@pytest.fixture
def membership() -> Membership:
    """One instance is there, and clients were told that requests may have 1,000 tokens."""
    made = Membership()
    assert made.refusal(says(max_model_len=1000)) is None
    made.serve(1000)
    return made


def test_instances_of_one_kind_join(membership: Membership) -> None:
    assert membership.refusal(says(max_model_len=1000, num_gpu_blocks=7, data_parallel_rank=3, max_num_seqs=9)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arriero_version": "0.0.9"}, f"it runs arriero 0.0.9, and the front end {__version__}: install the same"),
        ({"vllm_version": "0.33.0"}, "it runs vLLM 0.33.0, and the others 0.32.0: only the patch version may differ"),
        ({"model": "another"}, "its model is 'another', that of the others 'sim'"),
        ({"dtype": "float32"}, "its dtype is 'float32'"),
        ({"cache_dtype": "fp8"}, "its cache_dtype is 'fp8'"),
        ({"block_size": 64}, "its block_size is 64, that of the others 16"),
        ({"tensor_parallel_size": 2}, "its tensor_parallel_size is 2"),
        ({"max_model_len": 999}, "it takes 999 tokens, and requests may have 1000"),
    ],
)
def test_another_kind_is_refused_and_told_why(membership: Membership, changes: dict[str, Any], reason: str) -> None:
    refusal = membership.refusal(says(**{"max_model_len": 1000, **changes}))
    assert refusal is not None
    assert refusal.startswith(reason)
    assert membership.refusal(says(max_model_len=1000)) is None  # and nothing else has changed


def test_another_patch_version_of_vllm_joins(membership: Membership) -> None:
    """That is what a rolling restart is for."""
    assert membership.refusal(says(max_model_len=1000, vllm_version="0.32.1+cpu")) is None


def test_before_clients_were_told_anything_sizes_may_differ() -> None:
    made = Membership()
    assert made.refusal(says(max_model_len=1000)) is None
    assert made.refusal(says(max_model_len=500)) is None


def test_stock_vllm_is_refused(membership: Membership) -> None:
    fields = msgspec.msgpack.decode(says())
    stock = {k: v for k, v in fields.items() if k not in ("arriero_version", "model", "cache_dtype")}
    assert "cannot be read: Object missing required field `model`" in str(
        membership.refusal(msgspec.msgpack.encode(stock))
    )


@repeatable
@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    assert "cannot be read" in str(Membership().refusal(data))
