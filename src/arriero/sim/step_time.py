"""How long an engine's step takes."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from arriero.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeModel:
    """Roofline of one step, in milliseconds:

        t = max(a_mem, a + b*(P+B)) + c*sum(P_i*(C_i + P_i/2)) + d*B + e*S + host_ms

    P: new prefill tokens in the step, P_i those of chunk i and C_i the tokens of its request computed
    before; B: decoding sequences; S: the sum of their contexts. ``a_mem`` is reading the weights, ``a +
    b*(P+B)`` the arithmetic. With ``knots``, measured points ``(P+B, ms)`` replace the first term. With
    ``separate``, for fits of prefill and decode steps apart, it is ``a_mem`` without prefill tokens, else
    ``max(a_mem, a + b*P)``.

    The default is like a small model on one CPU core: about 12 ms for a decode step of one sequence.
    """

    a_mem: float = 10.6
    a: float = 10.6
    b: float = 0.45
    c: float = 3.5e-4
    d: float = 0.2
    e: float = 0.0025
    host_ms: float = 0.5
    knots: tuple[tuple[float, float], ...] = ()
    separate: bool = False
    scale: float = 1.0  #: multiplies the whole

    def __post_init__(self) -> None:
        for name in ("a_mem", "a", "b", "c", "d", "e", "host_ms", "scale"):
            if getattr(self, name) < 0:
                raise ConfigError(f"step time: {name}={getattr(self, name)!r} is invalid: it must be 0 or more")
        xs = [x for x, _ in self.knots]
        if len(xs) == 1 or sorted(set(xs)) != xs:
            raise ConfigError(f"step time: knots={self.knots!r} are invalid: give two or more, by rising tokens")

    def step_ms(self, prefills: Iterable[tuple[int, int]], num_decodes: int, context_tokens: int) -> float:
        """Milliseconds of a step.

        ``prefills``: (new tokens, tokens computed before) of each chunk; ``context_tokens``: the sum over
        the ``num_decodes`` decoding sequences.
        """
        num_prefill, attention = 0, 0.0
        for new, computed in prefills:
            num_prefill += new
            attention += new * (computed + new / 2)
        return self.scale * (
            self._linear_ms(num_prefill, num_decodes)
            + self.c * attention
            + self.d * num_decodes
            + self.e * context_tokens
            + self.host_ms
        )

    def _linear_ms(self, num_prefill: int, num_decodes: int) -> float:
        if self.separate:
            return max(self.a_mem, self.a + self.b * num_prefill) if num_prefill else self.a_mem
        num_tokens = num_prefill + num_decodes
        if not self.knots:
            return max(self.a_mem, self.a + self.b * num_tokens)
        after = bisect.bisect_left(self.knots, (num_tokens, float("-inf")))
        (x0, y0), (x1, y1) = self.knots[min(max(after, 1), len(self.knots) - 1) - 1 :][:2]
        return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)


LLAMA_7B_A10 = StepTimeModel(a_mem=34.5, a=4.5, b=0.203, c=1.02e-5, d=0.286, e=9.9e-4, host_ms=0.0)
"""The testbed of Llumnix (OSDI'24), fitted to its figure 10."""
