"""Preemptions as load reports show them, and whether a move could have avoided each.

A preemption *could have been avoided by a move* if, in the last reports before it, another instance had more KV blocks
free, and not promised to a prompt that it computes, than the smallest request that decoded in the victim's instance
takes with its next token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from arriero.core.types import InstanceId, InstanceSnapshot, Phase, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """An instance took the blocks of a request, and what was known then."""

    request_id: RequestId
    smallest_blocks: int | None  #: of the requests that decoded there, with the next token; None: none did
    roomiest: InstanceId | None  #: of the other instances that take requests; None: there was none
    free_blocks: int  #: of ``roomiest``, less what its running requests' prompts will take

    @property
    def avoidable(self) -> bool:
        """Whether a move could have avoided it."""
        return self.smallest_blocks is not None and self.free_blocks > self.smallest_blocks


def newly_preempted(
    before: InstanceSnapshot, after: InstanceSnapshot, others: Iterable[InstanceSnapshot]
) -> list[Preempted]:
    """Requests that ran in one report of an instance and wait in the next one, where it has preempted any.

    ``others``: the last reports of the instances that take requests; that of the instance itself is passed over.
    """
    if after.num_preemptions == before.num_preemptions:
        return []
    running = [r for r in before.requests if r.phase is Phase.RUNNING]
    ran = {r.request_id for r in running}
    sizes = [-(-(r.num_tokens + 1) // before.block_size) for r in running if not r.prefill_tokens]
    elsewhere = (s for s in others if s.instance != before.instance)
    roomiest = max(elsewhere, key=lambda s: (s.num_unclaimed_blocks, -s.instance), default=None)
    return [
        Preempted(
            request_id=r.request_id,
            smallest_blocks=min(sizes, default=None),
            roomiest=None if roomiest is None else roomiest.instance,
            free_blocks=0 if roomiest is None else max(0, roomiest.num_unclaimed_blocks),
        )
        for r in after.requests
        if r.phase is Phase.WAITING and r.request_id in ran
    ]
