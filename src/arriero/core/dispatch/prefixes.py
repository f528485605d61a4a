"""Which instance has seen which prefix: a guess from what was sent where, bounded in size."""

from __future__ import annotations

from collections import OrderedDict

from arriero.core.types import Dispatchable, InstanceId


class PrefixMap:
    """Block hash -> the instance that was sent it last; the hashes not seen for longest are forgotten.

    A block's hash covers its whole prefix, so the longest known prefix is found from its end.
    """

    def __init__(self, capacity: int = 1 << 18) -> None:
        self._capacity = capacity
        self._where: OrderedDict[int, InstanceId] = OrderedDict()

    def __len__(self) -> int:
        return len(self._where)

    def find(self, request: Dispatchable) -> tuple[InstanceId, float] | None:
        """The instance with the longest known prefix of the prompt, and its share of the prompt's full blocks."""
        hashes = request.block_hashes
        for number in range(len(hashes), 0, -1):
            instance = self._where.get(hashes[number - 1])
            if instance is not None:
                return instance, number / len(hashes)
        return None

    def sent(self, request: Dispatchable, instance: InstanceId) -> None:
        """``instance`` will hold the prompt's blocks."""
        for block_hash in request.block_hashes:
            self._where[block_hash] = instance
            self._where.move_to_end(block_hash)
        while len(self._where) > self._capacity:
            self._where.popitem(last=False)
