"""A workload: who arrives when and wants what. Generated from classes, or read from a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from arriero.core.errors import ConfigError
from arriero.workload.arrivals import gamma_arrivals
from arriero.workload.lengths import LENGTHS

PREFIX_BLOCK_TOKENS = 512
"""Prompt tokens that a trace's hash id stands for; the last one of a prompt may stand for fewer."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, as its client knows it; ``output_tokens`` is what only the future knows."""

    arrival_s: float  #: from the start of the workload
    prompt_tokens: int
    output_tokens: int
    priority: int = 0  #: vLLM's sign: lower number = sooner
    prefix_blocks: tuple[tuple[int, int], ...] = ()  #: inclusive runs of prefix block ids, PREFIX_BLOCK_TOKENS each
    max_tokens: int = 0  #: what the client allowed; 0: not known
    ttft_target_s: float | None = None  #: the first token is wanted so soon after the arrival

    def prefix_ids(self) -> Iterator[int]:
        """Each id, from the first token on."""
        for first, last in self.prefix_blocks:
            yield from range(first, last + 1)

    @property
    def num_prefix_ids(self) -> int:
        """How many :meth:`prefix_ids` gives."""
        return sum(last - first + 1 for first, last in self.prefix_blocks)


@dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals in the order of time."""

    name: str
    arrivals: Sequence[Arrival]

    @property
    def has_prefixes(self) -> bool:
        """Whether it says which prompts begin alike."""
        return any(a.prefix_blocks for a in self.arrivals)

    @property
    def rate(self) -> float:
        """Requests a second, over the time from 0 to the last arrival; 0 if that is no time."""
        last_s = self.arrivals[-1].arrival_s if self.arrivals else 0.0
        return len(self.arrivals) / last_s if last_s > 0 else 0.0


def make_workload(
    name: str,
    *,
    num_requests: int,
    rate: float,
    cv: float = 1.0,
    priorities: Mapping[int, float] | None = None,
    seed: int = 0,
) -> Workload:
    """``num_requests`` of the class ``name`` (a key of CLASSES), at ``rate`` a second.

    ``priorities``: priority -> its share of the requests; what is left of 1 has priority 0. Arrivals, lengths and
    priorities are drawn from separate streams of ``seed``: another rate keeps the lengths. Raises ConfigError.
    """
    if name not in CLASSES:
        raise ConfigError(f"workload {name!r} is unknown: use one of {', '.join(CLASSES)}")
    streams = [np.random.default_rng([seed, stream]) for stream in range(4)]
    times = gamma_arrivals(num_requests, rate, cv, streams[0])
    prompt, output = CLASSES[name]
    prompts, outputs = (
        LENGTHS[kind].draw(num_requests, rng) for kind, rng in zip((prompt, output), streams[1:3], strict=True)
    )
    levels = _draw_priorities(num_requests, priorities or {}, streams[3])
    return Workload(name, [Arrival(*a) for a in zip(times, prompts, outputs, levels, strict=True)])


def _draw_priorities(num_requests: int, shares: Mapping[int, float], rng: np.random.Generator) -> list[int]:
    rest = 1 - sum(shares.values())
    if rest < -1e-9 or any(share < 0 for share in shares.values()):
        raise ConfigError(f"priorities={dict(shares)!r} are invalid: shares are 0 or more and sum to at most 1")
    if not shares:
        return [0] * num_requests
    values, weights = [*shares, 0], np.array([*shares.values(), max(0.0, rest)])
    drawn: list[int] = rng.choice(values, size=num_requests, p=weights / weights.sum()).tolist()
    return drawn


CLASSES: dict[str, tuple[str, str]] = {
    **{f"{p}-{o}": (p, o) for p, o in ("SS", "MM", "LL", "SL", "LS")},
    "sharegpt": ("sharegpt-in", "sharegpt-out"),
    "burstgpt": ("burstgpt-in", "burstgpt-out"),
}
"""Workload class -> distributions of the prompt's and the output's length."""
