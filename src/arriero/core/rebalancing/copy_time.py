"""How long moves take, learned from those that were."""

from __future__ import annotations

import math

_KEPT = 0.8  # of what was learned, with each new move
_LEAST_SPREAD = 0.1  # of the sizes, relative to their mean, from which a slope can be told


class CopyTime:
    """Seconds of a move as ``fixed + per_block * blocks``: a least-squares line through past moves, the newest counting
    most.

    What a move costs whatever its size (messages, and waiting for steps at both ends) is most of the time of a small
    one. Where all were of one size, time counts as proportional to blocks: that is the more careful.
    """

    def __init__(self) -> None:
        # Decayed sums over the moves: of 1, blocks, seconds, blocks squared, blocks times seconds.
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def learn(self, num_blocks: int, seconds: float) -> None:
        """A move of ``num_blocks`` KV blocks, 1 or more, took ``seconds``."""
        self._n = _KEPT * self._n + 1
        self._x = _KEPT * self._x + num_blocks
        self._y = _KEPT * self._y + seconds
        self._xx = _KEPT * self._xx + num_blocks * num_blocks
        self._xy = _KEPT * self._xy + num_blocks * seconds

    def most_blocks(self, seconds: float) -> float:
        """The largest move that ends within ``seconds``; infinity before the first was seen, or where size is free."""
        if not self._n:
            return math.inf
        fixed, per_block = self._line()
        return max(0.0, seconds - fixed) / per_block if per_block > 0 else math.inf

    def _line(self) -> tuple[float, float]:
        mean, mean_s = self._x / self._n, self._y / self._n
        proportional = mean_s / mean
        variance = self._xx / self._n - mean * mean
        if variance < (_LEAST_SPREAD * mean) ** 2:
            return 0.0, proportional
        slope = (self._xy / self._n - mean * mean_s) / variance
        per_block = min(max(slope, 0.0), proportional)
        return mean_s - per_block * mean, per_block
