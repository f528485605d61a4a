"""When requests arrive: renewal processes. Randomness comes in as a seeded generator."""

from __future__ import annotations

import numpy as np

from arriero.core.errors import ConfigError


def poisson_arrivals(num_requests: int, rate: float, rng: np.random.Generator) -> list[float]:
    """``num_requests`` arrival times in seconds, at ``rate`` a second. Raises ConfigError."""
    return gamma_arrivals(num_requests, rate, 1.0, rng)


def gamma_arrivals(num_requests: int, rate: float, cv: float, rng: np.random.Generator) -> list[float]:
    """Arrival times in seconds with gaps of mean ``1 / rate`` and coefficient of variation ``cv``.

    The gaps are Gamma(shape = 1 / cv**2, scale = cv**2 / rate); ``cv`` 1 is the Poisson process, more is
    burstier (Llumnix, OSDI'24, section 6.1). Raises ConfigError.
    """
    if num_requests < 0:
        raise ConfigError(f"num_requests={num_requests} is invalid: it must be 0 or more")
    if not rate > 0:
        raise ConfigError(f"rate={rate!r} is invalid: it must be more than 0 requests a second")
    if not cv > 0:
        raise ConfigError(f"cv={cv!r} is invalid: it must be more than 0 (1 is Poisson)")
    gaps = rng.gamma(1 / cv**2, cv**2 / rate, size=num_requests)
    times: list[float] = np.cumsum(gaps).tolist()
    return times
