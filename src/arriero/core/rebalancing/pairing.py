"""Who gives and who takes."""

from __future__ import annotations

from collections.abc import Mapping

from arriero.core.config import RebalancingConfig
from arriero.core.types import InstanceId


def pair(freeness: Mapping[InstanceId, float], config: RebalancingConfig) -> list[tuple[InstanceId, InstanceId]]:
    """(source, destination) pairs: lowest freeness below the low threshold with highest above the
    high one, repeatedly (Llumnix, OSDI'24, section 4.4.3). No instance is on both sides.
    """
    order = sorted(freeness, key=lambda i: (freeness[i], i))
    sources = [i for i in order if freeness[i] < config.low_freeness]
    destinations = [i for i in reversed(order) if freeness[i] > config.high_freeness and i not in sources]
    return list(zip(sources, destinations, strict=False))
