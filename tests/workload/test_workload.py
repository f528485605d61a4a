"""Workload classes."""

from __future__ import annotations

import numpy as np
import pytest

from arriero.core.errors import ConfigError
from arriero.workload.workload import CLASSES, Workload, make_workload


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_its_rate_and_its_lengths(name: str) -> None:
    workload = make_workload(name, num_requests=20_000, rate=4.0, seed=1)
    assert workload.rate == pytest.approx(4.0, rel=0.03)
    means = {"S": 128, "M": 256, "L": 512}
    prompt, _, output = name.partition("-")
    if prompt in means:
        assert np.mean([a.prompt_tokens for a in workload.arrivals]) == pytest.approx(means[prompt], rel=0.03)
        assert np.mean([a.output_tokens for a in workload.arrivals]) == pytest.approx(means[output], rel=0.03)


def test_the_same_seed_gives_the_same_workload_and_another_rate_the_same_lengths() -> None:
    first, again, faster, other = (
        make_workload("M-M", num_requests=50, rate=rate, seed=seed) for rate, seed in ((1, 7), (1, 7), (2, 7), (1, 8))
    )
    assert first == again
    assert [a.prompt_tokens for a in first.arrivals] == [a.prompt_tokens for a in faster.arrivals]
    assert [a.prompt_tokens for a in first.arrivals] != [a.prompt_tokens for a in other.arrivals]
    assert [a.prompt_tokens for a in first.arrivals] != [a.output_tokens for a in first.arrivals]


def test_priorities_come_by_their_share() -> None:
    workload = make_workload("S-S", num_requests=20_000, rate=1, priorities={-1: 0.1, 2: 0.3})
    counts = dict(zip(*np.unique([a.priority for a in workload.arrivals], return_counts=True), strict=True))
    assert counts == pytest.approx({-1: 2000, 0: 12_000, 2: 6000}, rel=0.05)


def test_an_empty_workload_has_no_rate() -> None:
    assert Workload("none", []).rate == 0.0
    assert make_workload("S-S", num_requests=0, rate=1).arrivals == []


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="workload 'X-X' is unknown: use one of S-S"):
        make_workload("X-X", num_requests=1, rate=1)
    with pytest.raises(ConfigError, match="shares are 0 or more"):
        make_workload("S-S", num_requests=1, rate=1, priorities={1: 0.7, 2: 0.7})
