"""What a cluster sustains: by bisection, the highest rate or the fewest instances at which latency targets are met."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from arriero.core.errors import ConfigError
from arriero.sim.report import latencies
from arriero.sim.simulator import SimulationResult

_MAX_DOUBLINGS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Upper bounds of a percentile of the latencies of all requests, in seconds; None: does not matter."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    percentile: float = 99.0

    def __post_init__(self) -> None:
        if self.ttft_s is None and self.tpot_s is None:
            raise ConfigError("no target is given: add --ttft SECONDS, --tpot SECONDS or both")
        for flag, value in (("--ttft", self.ttft_s), ("--tpot", self.tpot_s)):
            if value is not None and not value > 0:
                raise ConfigError(f"{flag} {value} is invalid: it must be more than 0 seconds")
        if not 0 < self.percentile <= 100:
            raise ConfigError(f"--percentile {self.percentile} is invalid: it must be in (0, 100]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One simulation of a sweep: latencies at the targets' percentile, infinite if no request finished."""

    rate: float  #: requests a second
    num_instances: int
    ttft_s: float
    tpot_s: float
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All points in the order of their making; ``best`` is None if no point met the targets."""

    points: list[Point]
    best: Point | None


def judge(result: SimulationResult, rate: float, targets: Targets) -> Point:
    """What a simulation comes to under the targets."""
    found = [latencies(record) for record in result.records if not record.rejected]
    ttft_s = _percentile([f["ttft_s"] for f in found], targets.percentile, math.inf)
    tpot_s = _percentile([f["tpot_s"] for f in found if "tpot_s" in f], targets.percentile, 0.0 if found else math.inf)
    met = all(bound is None or value <= bound for value, bound in ((ttft_s, targets.ttft_s), (tpot_s, targets.tpot_s)))
    return Point(rate=rate, num_instances=result.config.num_instances, ttft_s=ttft_s, tpot_s=tpot_s, met=met)


def _percentile(values: list[float], percentile: float, nothing: float) -> float:
    return float(np.percentile(values, percentile)) if values else nothing


def highest_rate(measure: Callable[[float], Point], start: float, precision: float) -> Sweep:
    """The highest rate that meets the targets, to a share of ``precision``, presuming that all lower ones do.

    From ``start`` it is doubled or halved until the answer changes, then the interval is halved on a logarithmic scale.
    """
    points = [measure(start)]
    factor = 2.0 if points[0].met else 0.5
    while points[-1].met is points[0].met and len(points) < _MAX_DOUBLINGS:
        points.append(measure(points[-1].rate * factor))
    low, high = sorted((points[-2], points[-1]), key=lambda p: p.rate)
    while low.met and not high.met and high.rate > low.rate * (1 + precision):
        middle = measure(math.sqrt(low.rate * high.rate))
        points.append(middle)
        low, high = (middle, high) if middle.met else (low, middle)
    met = [p for p in points if p.met]
    return Sweep(points=points, best=max(met, key=lambda p: p.rate, default=None))


def fewest_instances(measure: Callable[[int], Point], most: int) -> Sweep:
    """The fewest instances that meet the targets, presuming that more of them do, too; at most ``most`` are tried."""
    points, low, high = [measure(1)], 0, 1  # more than `low` are needed; `high` meet them, once one has
    while not points[-1].met and high < most:
        low, high = high, min(2 * high, most)
        points.append(measure(high))
    reachable = points[-1].met
    while reachable and high - low > 1:
        middle = (low + high) // 2
        points.append(measure(middle))
        low, high = (low, middle) if points[-1].met else (middle, high)
    met = [p for p in points if p.met]
    return Sweep(points=points, best=min(met, key=lambda p: p.num_instances, default=None))


def as_json(sweep: Sweep) -> dict[str, Any]:
    """Plain values; what is infinite is None."""
    points = [_plain(point) for point in sweep.points]
    return {"best": None if sweep.best is None else _plain(sweep.best), "points": points}


def _plain(point: Point) -> dict[str, Any]:
    values = {"rate": point.rate, "num_instances": point.num_instances, "ttft_s": point.ttft_s, "tpot_s": point.tpot_s}
    return {**{k: v if math.isfinite(v) else None for k, v in values.items()}, "met": point.met}
