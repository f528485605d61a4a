"""Arrival processes: the gaps have the mean and the variation that were asked for."""

from __future__ import annotations

import numpy as np
import pytest

from arriero.core.errors import ConfigError
from arriero.workload.arrivals import gamma_arrivals, poisson_arrivals


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_gaps_have_mean_and_coefficient_of_variation(cv: float) -> None:
    times = gamma_arrivals(200_000, 5.0, cv, np.random.default_rng(1))
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_poisson_counts_in_a_window_have_equal_mean_and_variance() -> None:
    times = np.array(poisson_arrivals(50_000, 10.0, np.random.default_rng(2)))
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(10, rel=0.03)
    assert counts.var() == pytest.approx(10, rel=0.06)


def test_times_rise_and_depend_on_the_generator_alone() -> None:
    first, again, other = (gamma_arrivals(100, 1.0, 4.0, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert first == sorted(first)


@pytest.mark.parametrize(("num", "rate", "cv"), [(-1, 1.0, 1.0), (1, 0.0, 1.0), (1, float("nan"), 1.0), (1, 1.0, 0.0)])
def test_impossible_arrivals_are_refused(num: int, rate: float, cv: float) -> None:
    with pytest.raises(ConfigError, match="is invalid: it must be"):
        gamma_arrivals(num, rate, cv, np.random.default_rng(0))
