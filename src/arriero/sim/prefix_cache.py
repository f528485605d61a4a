"""Prefix caching on counts, as vLLM v1 does it: what stays in freed blocks, and who can use it again.

A prompt is a chain of *segments*: an id and the number of full blocks that it stands for. An id names the tokens of its
segment and all before it (a trace's `hash_ids` do), so equal ids mean equal blocks. What follows the segments is
private to its request, which finds it again after a preemption.

    hit:      the longest chain of resident blocks from the first one on, never the one with the last token
    resident: from the moment a chunk with the block is scheduled, until the block is taken for something else
    taken:    blocks that nobody holds: first those that are not full, the latest before all; then the others, the one
              that was freed first goes first; of a request, its last block first

Blocks of a segment are counted from its front, so ``resident`` and what each holder has are single numbers. Two things
are simpler than in vLLM: a block that was computed twice (by two requests at a time) is known once, and what is
left of a segment when one of its holders goes is as fresh as that holder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from arriero.core.errors import ConfigError, ProtocolError
from arriero.workload.workload import PREFIX_BLOCK_TOKENS, Arrival

Key = int | str
"""Of a segment: a trace's id (0 or more), or the name of the request that it is private to."""

Segments = Sequence[tuple[Key, int]]
"""Keys and full blocks, from the first token on."""


@dataclass(slots=True)
class _Segment:
    num_resident: int = 0
    holders: list[int] = field(default_factory=list)  # blocks from the front, of each request that holds some

    @property
    def num_held(self) -> int:
        return max(self.holders, default=0)


@dataclass(slots=True)
class Share:
    """What one request has of the cache: blocks of each of its segments, from the first one on."""

    segments: Segments
    held: list[int] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        """Blocks of segments that the request holds."""
        return sum(self.held)

    def make_private(self, request_id: str, num_blocks: int) -> None:
        """Of its first ``num_blocks`` blocks, ``request_id`` may find those behind the prompt's segments again."""
        shared = [(key, length) for key, length in self.segments if key != request_id]
        rest = num_blocks - sum(length for _, length in shared)
        if rest > 0:
            self.segments = (*shared, (request_id, rest))


def prompt_segments(arrival: Arrival, block_size: int) -> Segments:
    """The segments of a request of a trace. Raises ConfigError if engine blocks straddle those of the trace."""
    if PREFIX_BLOCK_TOKENS % block_size:
        raise ConfigError(
            f"block_size={block_size} does not divide the {PREFIX_BLOCK_TOKENS} tokens of a trace's hash id: "
            "use one that does, or no prefix caching"
        )
    segments, left = [], arrival.prompt_tokens
    for number in arrival.prefix_ids():
        if left < block_size:
            break
        segments.append((number, min(left, PREFIX_BLOCK_TOKENS) // block_size))
        left -= PREFIX_BLOCK_TOKENS
    return tuple(segments)


class PrefixCache:
    """The free blocks of an engine in the order in which they will be taken, and what is resident in all blocks."""

    def __init__(self, num_blocks: int) -> None:
        self._segments: dict[Key, _Segment] = {}
        self._run = -1  # free blocks that nobody can ask for come in runs with negative keys
        self._free: OrderedDict[Key, int] = OrderedDict({self._run: num_blocks})

    # ------------------------------------------------------------------ looking

    def find(self, segments: Segments, max_blocks: int) -> tuple[list[int], int]:
        """The hit, at most ``max_blocks`` long: blocks of each segment; and how many of them nobody holds."""
        found: list[int] = []
        num_free = 0
        for key, num_blocks in segments:
            segment = self._segments.get(key)
            if segment is None or max_blocks <= 0:
                break
            taken = min(num_blocks, segment.num_resident, max_blocks)
            found.append(taken)
            num_free += max(0, taken - segment.num_held)
            max_blocks -= taken
            if taken < num_blocks:
                break
        return found, num_free

    # ------------------------------------------------------------------ holding

    def hold(self, share: Share, found: list[int]) -> int:
        """Use the blocks that were found. Returns how many were free before."""
        assert not share.held
        num_freed = 0
        for (key, _), taken in zip(share.segments, found, strict=False):
            segment = self._segments[key]
            missing = max(0, taken - segment.num_held)
            if missing:
                self._shrink(key, missing)
                num_freed += missing
            segment.holders.append(taken)
        share.held = found
        return num_freed

    def take(self, num_blocks: int) -> None:
        """Take free blocks; what stood in them is forgotten."""
        while num_blocks > 0:
            key, num_free = next(iter(self._free.items()))
            taken = min(num_free, num_blocks)
            num_blocks -= taken
            self._shrink(key, taken)
            segment = self._segments.get(key)
            if segment is not None:
                segment.num_resident -= taken
                if not segment.num_resident:
                    del self._segments[key]

    def computed(self, share: Share, num_blocks: int) -> None:
        """The first ``num_blocks`` blocks of the request are full, or will be with the step that is planned."""
        held = share.held
        for number, (key, length) in enumerate(share.segments):
            if number == len(held):
                held.append(0)
            reached = min(length, num_blocks)
            num_blocks -= reached
            if reached > held[number]:
                segment = self._segments.setdefault(key, _Segment())
                if segment.num_resident == held[number]:  # otherwise somebody else has computed it at the same time
                    if held[number]:
                        segment.holders.remove(held[number])
                    segment.holders.append(reached)
                    segment.num_resident = held[number] = reached
            if num_blocks <= 0:
                break

    def let_go(self, share: Share, num_blocks: int, num_full: int) -> int:
        """The request leaves its ``num_blocks`` blocks, the first ``num_full`` of which are full. Returns how many are
        free now that were not before.
        """
        num_freed = num_blocks - share.num_blocks
        num_other = max(0, num_full - share.num_blocks)  # full, with what nobody asks for: its output, a second copy
        self._add_run(num_freed - num_other, first=True)
        self._add_run(num_other, first=False)
        for (key, _), held in zip(reversed(share.segments[: len(share.held)]), reversed(share.held), strict=True):
            if not held:
                continue
            segment = self._segments[key]
            before = segment.num_held
            segment.holders.remove(held)
            if newly_free := before - segment.num_held:
                num_freed += newly_free
                self._free[key] = segment.num_resident - segment.num_held
                self._free.move_to_end(key)
        share.held = []
        return num_freed

    # ------------------------------------------------------------------ the order

    def _add_run(self, num_blocks: int, *, first: bool) -> None:
        if num_blocks <= 0:
            return
        edge = next(iter(self._free) if first else reversed(self._free), None)
        if isinstance(edge, int) and edge < 0:
            self._free[edge] += num_blocks
            return
        self._run -= 1
        self._free[self._run] = num_blocks
        self._free.move_to_end(self._run, last=not first)

    def _shrink(self, key: Key, num_blocks: int) -> None:
        left = self._free[key] - num_blocks
        if left:
            self._free[key] = left
        else:
            del self._free[key]

    @property
    def num_held(self) -> int:
        """Blocks of segments that somebody holds, each counted once."""
        return sum(segment.num_held for segment in self._segments.values())

    def check_integrity(self, num_free: int) -> None:
        """Raise ProtocolError if the books contradict themselves."""
        if sum(self._free.values()) != num_free:
            raise ProtocolError(f"{sum(self._free.values())} blocks are listed as free, not {num_free}")
        for key, segment in self._segments.items():
            if segment.num_resident - segment.num_held != self._free.get(key, 0):
                raise ProtocolError(f"free blocks of segment {key} are lost or listed twice: {segment}")
