"""How long prompts and outputs are: distributions with the figures of Llumnix (OSDI'24), table 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from arriero.core.errors import ConfigError

MAX_TOKENS = 6144
"""Longer draws are cut (the paper's cap)."""


class LengthDistribution(Protocol):
    """A source of lengths in tokens, each in ``[1, MAX_TOKENS]``."""

    def draw(self, num_lengths: int, rng: np.random.Generator) -> list[int]:
        """``num_lengths`` independent lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipfLengths:
    """Ranks ``1 .. 2*mean - 1`` with pmf ``rank**-exponent``; the sample is scaled to ``mean``, rounded up and cut.

    That is how the paper's artifact generates its S, M and L. Scaling comes before cutting, so the cut lowers the mean
    a little.
    """

    mean: int
    exponent: float

    def draw(self, num_lengths: int, rng: np.random.Generator) -> list[int]:
        """See :class:`LengthDistribution`."""
        if num_lengths == 0:
            return []
        ranks = np.arange(1, 2 * self.mean)
        weights = ranks**-self.exponent
        sample = rng.choice(ranks, size=num_lengths, p=weights / weights.sum())
        scaled = np.ceil(sample * (self.mean / sample.mean()))
        lengths: list[int] = np.minimum(scaled, MAX_TOKENS).astype(int).tolist()
        return lengths


_LEVELS = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class QuantileLengths:
    """A quantile function that is log-linear between its values at the levels 0, .5, .8, .95, .99 and 1.

    Between levels p and q with values x and y it has the mean ``(y - x) / ln(y / x)``, hence a closed form for
    the mean of the whole; :func:`fit` chooses the ends so that it is the wanted one.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the continuous distribution, in tokens."""
        segments = zip(itertools.pairwise(_LEVELS), itertools.pairwise(self.values), strict=True)
        return math.fsum((q - p) * _log_mean(x, y) for (p, q), (x, y) in segments)

    def draw(self, num_lengths: int, rng: np.random.Generator) -> list[int]:
        """See :class:`LengthDistribution`."""
        logs = np.interp(rng.random(num_lengths), _LEVELS, np.log(self.values))
        lengths: list[int] = np.clip(np.rint(np.exp(logs)), 1, MAX_TOKENS).astype(int).tolist()
        return lengths


def fit(mean: float, p50: float, p80: float, p95: float, p99: float) -> QuantileLengths:
    """The distribution with these quantiles and this mean.

    The largest value is 1.5 times the 99th percentile and the smallest is solved for; if that would be less
    than 1 token, it is 1 and the largest is solved for. Raises ConfigError if no ends give the mean.
    """
    inner = (p50, p80, p95, p99)

    def with_low(low: float) -> QuantileLengths:
        return QuantileLengths((low, *inner, min(1.5 * p99, MAX_TOKENS)))

    def with_high(high: float) -> QuantileLengths:
        return QuantileLengths((1.0, *inner, high))

    if with_low(1.0).mean <= mean <= with_low(p50).mean:
        return _solve(with_low, 1.0, p50, mean)
    if with_high(p99).mean <= mean <= with_high(MAX_TOKENS).mean:
        return _solve(with_high, p99, MAX_TOKENS, mean)
    raise ConfigError(f"no distribution with quantiles {inner} and lengths in [1, {MAX_TOKENS}] has the mean {mean}")


def _solve(make: Callable[[float], QuantileLengths], low: float, high: float, mean: float) -> QuantileLengths:
    """Bisection: the mean rises with the argument of ``make``."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if make(middle).mean < mean else (low, middle)
    return make(low)


def _log_mean(x: float, y: float) -> float:
    return x if math.isclose(x, y) else (y - x) / math.log(y / x)


LENGTHS: dict[str, LengthDistribution] = {
    "S": ZipfLengths(mean=128, exponent=2.0),
    "M": ZipfLengths(mean=256, exponent=1.5),
    "L": ZipfLengths(mean=512, exponent=1.15),
    "sharegpt-in": fit(306, 74, 348, 1484, 3388),
    "sharegpt-out": fit(500, 487, 781, 988, 1234),
    "burstgpt-in": fit(830, 582, 1427, 2345, 3549),
    "burstgpt-out": fit(271, 243, 434, 669, 964),
}
