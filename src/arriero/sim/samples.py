"""What the memory of a simulated cluster looks like at a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arriero.core.types import InstanceId
from arriero.sim.fast_reports import head_demand
from arriero.sim.virtual_instance import VirtualInstance


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory at one moment, in blocks, of the instances that were there.

    ``fragmented``: what the heads of queues wait for and would get if the free memory of all instances were one,
    served from the smallest demand up (Llumnix, OSDI'24, section 6.3): free memory that is in the wrong place.
    """

    time_s: float
    instances: tuple[InstanceId, ...]
    used: tuple[int, ...]  #: of each of them
    fragmented: int
    num_waiting: int  #: in the instances, and in the scheduler's queue


def take_sample(present: Sequence[VirtualInstance], num_queued: int, now: float) -> Sample:
    """Of the instances ``present``, with ``num_queued`` requests in the scheduler's queue."""
    used = tuple(instance.num_used_blocks() for instance in present)
    free = sum(instance.engine.config.num_blocks for instance in present) - sum(used)
    fragmented = 0
    for demand in sorted(filter(None, (head_demand(instance.engine) for instance in present))):
        if fragmented + demand > free:
            break
        fragmented += demand
    num_waiting = num_queued + sum(len(instance.engine.waiting) for instance in present)
    return Sample(now, tuple(instance.instance for instance in present), used, fragmented, num_waiting)
