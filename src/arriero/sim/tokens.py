"""The simulated model: which KV entries a sequence has, and which token follows them.

    entry[i] = mix(entry[i-1] + token[i])                               the KV cache, one entry a token
    next     = mix(sum((2*i + 1) * entry[i]) + draw) mod vocab_size     "attention" over all of it

with 64-bit wrap-around. An entry depends on all tokens before it, and the next token on every entry, as
read back from the blocks: a block that is missing, stale, swapped or only partly copied changes the
tokens. ``draw`` is 0 (greedy), or the state of a seeded sampler, which moves on with each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from arriero.core.errors import ProtocolError

DEFAULT_VOCAB_SIZE = 32_000

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_STATE_BYTES = 8

Entries = np.ndarray[Any, np.dtype[np.uint64]]


def mix(value: int) -> int:
    """splitmix64: scatters 64 bits."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def chain(previous: int, token_ids: Iterable[int]) -> list[int]:
    """The entries of ``token_ids`` that follow the entry ``previous`` (0: the sequence begins)."""
    entries = []
    for token_id in token_ids:
        previous = mix(previous + token_id)
        entries.append(previous)
    return entries


def attend(entries: Entries) -> int:
    """What the model makes of all entries of a sequence."""
    weights = np.arange(1, 2 * len(entries), 2, dtype=np.uint64)
    return int((entries * weights).sum(dtype=np.uint64))


def next_token(attention: int, draw: int, vocab_size: int) -> int:
    """The token that the sampler picks."""
    return mix(attention + draw) % vocab_size


def draw_state(seed: int | None, num_drawn: int = 0) -> int | None:
    """State of a sampler that has drawn ``num_drawn`` tokens; None: greedy, it has none."""
    if seed is None:
        return None
    state = mix(seed)
    for _ in range(num_drawn):
        state = mix(state)
    return state


def pack_state(state: int | None) -> bytes | None:
    """A sampler's state as bytes, for a move."""
    return None if state is None else state.to_bytes(_STATE_BYTES, "little")


def unpack_state(data: bytes) -> int:
    """The way back. Raises ProtocolError."""
    if len(data) != _STATE_BYTES:
        raise ProtocolError(f"a sampler state of {len(data)} bytes arrived: the simulated engine has {_STATE_BYTES}")
    return int.from_bytes(data, "little")


def expected_tokens(
    prompt_token_ids: Sequence[int], seed: int | None, n: int, vocab_size: int = DEFAULT_VOCAB_SIZE
) -> list[int]:
    """The first ``n`` tokens that follow a prompt: the reference that every run must match, moved or not."""
    entry, attention, position = 0, 0, 0
    state = draw_state(seed)
    fresh, tokens = list(prompt_token_ids), []
    for _ in range(n):
        for token_id in fresh:
            entry = mix(entry + token_id)
            attention = (attention + (2 * position + 1) * entry) & _MASK
            position += 1
        tokens.append(next_token(attention, state or 0, vocab_size))
        state = None if state is None else mix(state)
        fresh = tokens[-1:]
    return tokens
