"""Hashes of a prompt's blocks: equal where vLLM's prefix cache would find the blocks, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from arriero.vllm.client import facts_of
from arriero.vllm.prompt_hashes import prompt_hashes


def request(tokens: list[int] | None, **facts: Any) -> EngineCoreRequest:
    given: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": tokens,
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=3),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(given | facts))


PROMPT = list(range(300))


def test_each_whole_block_has_a_hash_over_all_before_it() -> None:
    hashes, num_tokens = prompt_hashes(request(PROMPT), 16)
    assert (len(hashes), num_tokens) == (4, 256), "blocks of 64 tokens"
    assert prompt_hashes(request(PROMPT[:130]), 16)[0] == hashes[:2]
    assert prompt_hashes(request([9, *PROMPT[1:]]), 16)[0][1] != hashes[1], (
        "the second block is the same, its prefix not"
    )
    assert prompt_hashes(request(PROMPT[:200] + [0] * 100), 16)[0][:3] == hashes[:3]


@pytest.mark.parametrize(("block_size", "want"), [(16, 64), (48, 96), (64, 64), (128, 128), (300, 300)])
def test_a_block_is_made_of_whole_blocks_of_the_engine(block_size: int, want: int) -> None:
    hashes, num_tokens = prompt_hashes(request(list(range(600))), block_size)
    assert num_tokens // len(hashes) == want


def test_what_the_prefix_cache_tells_apart_has_other_hashes() -> None:
    adapter = LoRARequest(lora_name="a", lora_int_id=1, lora_path="/nowhere")
    kinds: list[dict[str, Any]] = [{}, {"cache_salt": "x"}, {"cache_salt": "y"}, {"lora_request": adapter}]
    assert len({prompt_hashes(request(PROMPT, **kind), 16)[0] for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("tokens", "facts"),
    [
        (PROMPT, {"sampling_params": SamplingParams(prompt_logprobs=1)}),
        (PROMPT, {"mm_features": [object()]}),
        (PROMPT, {"prompt_embeds": object()}),
        (None, {}),
        (PROMPT[:63], {}),
    ],
)
def test_a_prompt_that_shares_no_blocks_has_none(tokens: list[int] | None, facts: dict[str, Any]) -> None:
    assert prompt_hashes(request(tokens, **facts), 16) == ((), 0)


def test_another_process_finds_the_same_hashes() -> None:
    """A log that one process wrote is repeated by another."""
    script = "from tests.vllm.test_prompt_hashes import *\nprint(prompt_hashes(request(PROMPT, cache_salt='x'), 16)[0])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == str(prompt_hashes(request(PROMPT, cache_salt="x"), 16)[0])


def test_the_scheduler_is_told_unless_there_is_no_prefix_cache() -> None:
    assert facts_of(request(PROMPT), 128).num_hashed_tokens == 256
    assert len(facts_of(request(PROMPT), 128).block_hashes) == 2
    assert facts_of(request(PROMPT), None).block_hashes == ()
