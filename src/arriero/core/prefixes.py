"""Which instances hold which prefixes: a guess from what was sent and moved where, bounded by their memory."""

from __future__ import annotations

from collections import OrderedDict

from arriero.core.types import Dispatchable, InstanceId

MAX_BLOCKS = 1 << 16
"""Remembered of an instance at most; all that bounds it where its memory is not known."""


class PrefixMap:
    """Block hash -> the instances that hold the block, as far as is known.

    A block's hash covers its whole prefix, so the longest known prefix is found from its end. Of an instance, so many
    tokens are remembered as its memory holds; those not heard of for longest are forgotten first, and of a prompt its
    last block first: the order in which vLLM v1 takes blocks that nobody uses.
    """

    def __init__(self) -> None:
        self._holders: dict[int, dict[InstanceId, None]] = {}
        self._held: dict[InstanceId, OrderedDict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def find(self, request: Dispatchable) -> tuple[dict[InstanceId, None], int]:
        """The instances with the longest known prefix of the prompt, the last to get it last; and its tokens."""
        hashes = request.block_hashes
        for number in range(len(hashes), 0, -1):
            holders = self._holders.get(hashes[number - 1])
            if holders:
                return holders, request.num_hashed_tokens * number // len(hashes)
        return {}, 0

    def sent(self, request: Dispatchable, instance: InstanceId, max_tokens: int | None) -> None:
        """``instance``, whose memory is ``max_tokens`` (None: not known), will hold the prompt's blocks."""
        hashes = request.block_hashes
        if not hashes:
            return
        held = self._held.setdefault(instance, OrderedDict())
        for block_hash in reversed(hashes):
            held[block_hash] = None
            held.move_to_end(block_hash)
            holders = self._holders.setdefault(block_hash, {})
            holders.pop(instance, None)
            holders[instance] = None
        most = MAX_BLOCKS
        if max_tokens is not None:
            most = min(most, max_tokens * len(hashes) // max(1, request.num_hashed_tokens))
        while len(held) > most:
            self._forget(held.popitem(last=False)[0], instance)

    def forget(self, instance: InstanceId) -> None:
        """The instance is gone."""
        for block_hash in self._held.pop(instance, ()):
            self._forget(block_hash, instance)

    def _forget(self, block_hash: int, instance: InstanceId) -> None:
        holders = self._holders[block_hash]
        del holders[instance]
        if not holders:
            del self._holders[block_hash]
