"""Hashes of a prompt's blocks, by which the scheduler knows prefixes again."""

from __future__ import annotations

import zlib

from arriero.vllm.compat import EngineCoreRequest

BLOCK_TOKENS = 64
"""Tokens that a hash stands for, at least: fewer would cost more time for long prompts than they tell."""


def prompt_hashes(request: EngineCoreRequest, block_size: int) -> tuple[tuple[int, ...], int]:
    """One hash for each whole block of the prompt, over all before it, and the tokens that they cover together.

    A block here is the least multiple of the engine's ``block_size`` tokens that is no less than ``BLOCK_TOKENS``.
    Prompts that vLLM's prefix cache tells apart (another adapter, another ``cache_salt``) have different hashes; those
    that do not read it, or are not made of tokens alone, have none. Equal in every process, and a hint: not meant to be
    safe from collisions.
    """
    tokens, params = request.prompt_token_ids, request.params
    if not tokens or request.mm_features or request.prompt_embeds is not None or params.skip_reading_prefix_cache:
        return (), 0
    adapter = request.lora_request.lora_name if request.lora_request is not None else None
    last = zlib.crc32(repr((adapter, request.cache_salt)).encode())
    step = -(-BLOCK_TOKENS // block_size) * block_size
    hashes = []
    for end in range(step, len(tokens) + 1, step):
        last = hash((last, *tokens[end - step : end]))  # of integers alone: the same in every process
        hashes.append(last)
    return tuple(hashes), len(hashes) * step
