"""Paged KV memory: who owns which block, and what stands in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from arriero.core.errors import ConfigError, ConflictError, ProtocolError
from arriero.core.types import RequestId
from arriero.sim.tokens import Entries

FREED = 0xDB
"""Every byte of a free block: what is read after it was freed is wrong for sure."""


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens, allocated to owners in the order of their tokens.

    ``contents`` is ``uint8 [num_blocks, block_bytes]``; a token's entry is 8 bytes at the start of its share
    of the block, and again at the end, so that half a copy shows. None without contents.
    """

    def __init__(self, num_blocks: int, block_size: int, block_bytes: int, *, with_contents: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"num_blocks={num_blocks}, block_size={block_size} are invalid: both must be 1 or more")
        if block_bytes < 8 * block_size or block_bytes % (8 * block_size):
            raise ConfigError(
                f"block_bytes={block_bytes} is invalid: it must be a multiple of 8 bytes x block_size={block_size}"
            )
        self.num_blocks, self.block_size, self.block_bytes = num_blocks, block_size, block_bytes
        self.contents: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        if with_contents:
            self.contents = np.full((num_blocks, block_bytes), FREED, dtype=np.uint8)
            self._words = self.contents.view(np.uint64).reshape(num_blocks, block_size, -1)
        self._free = deque(range(num_blocks))
        self._owned: dict[RequestId, list[int]] = {}

    # ------------------------------------------------------------------ ownership

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_size)

    def blocks_of(self, owner: RequestId) -> Sequence[int]:
        """The owner's blocks, first token first; empty if it owns none."""
        return self._owned.get(owner, ())

    def missing(self, owner: RequestId, num_tokens: int) -> int:
        """Blocks that the owner lacks for ``num_tokens`` tokens."""
        return max(0, self.num_blocks_for(num_tokens) - len(self.blocks_of(owner)))

    def fits(self, owner: RequestId, num_tokens: int) -> bool:
        """Whether :meth:`allocate` would succeed."""
        return self.missing(owner, num_tokens) <= self.num_free

    def allocate(self, owner: RequestId, num_tokens: int) -> None:
        """Give the owner blocks for ``num_tokens`` tokens in all. Raises ConflictError, and changes nothing."""
        missing = self.missing(owner, num_tokens)
        if missing > self.num_free:
            raise ConflictError(f"{missing} more KV blocks are needed, {self.num_free} are free")
        if missing:
            self._owned.setdefault(owner, []).extend(self._free.popleft() for _ in range(missing))

    def free(self, owner: RequestId) -> None:
        """Take back all of the owner's blocks. Idempotent."""
        blocks = self._owned.pop(owner, None)
        if blocks:
            if self.contents is not None:
                self.contents[blocks] = FREED
            self._free.extend(blocks)

    def check_integrity(self, owners: Collection[RequestId]) -> None:
        """Raise ProtocolError unless every block is free or owned, once, and only ``owners`` own any."""
        seen = sorted([*self._free, *(b for blocks in self._owned.values() for b in blocks)])
        if seen != list(range(self.num_blocks)):
            raise ProtocolError(f"blocks are lost or shared: {len(seen)} are accounted for, {self.num_blocks} exist")
        strangers = self._owned.keys() - set(owners)
        if strangers:
            raise ProtocolError(f"blocks are owned by requests that are not here: {sorted(strangers)}")

    # ------------------------------------------------------------------ contents

    def write(self, owner: RequestId, first: int, entries: Sequence[int]) -> None:
        """Write the entries of the owner's tokens ``[first, first + len(entries))``."""
        at = self._locate(owner, first, first + len(entries))
        words = np.array(entries, dtype=np.uint64)
        self._words[(*at, 0)] = words
        self._words[(*at, -1)] = words

    def read(self, owner: RequestId, first: int, end: int) -> Entries:
        """The entries of the owner's tokens ``[first, end)``, as they stand in its blocks."""
        at = self._locate(owner, first, end)
        head, tail = self._words[(*at, 0)], self._words[(*at, -1)]
        entries: Entries = head + (head - tail) * np.uint64(2)  # equal to both if they agree, else to neither
        return entries

    def _locate(self, owner: RequestId, first: int, end: int) -> tuple[Any, Any]:
        positions = np.arange(first, end)
        blocks = np.array(self.blocks_of(owner), dtype=np.intp)
        return blocks[positions // self.block_size], positions % self.block_size
