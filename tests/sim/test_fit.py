"""Fitting a step-time model: what was put in comes out."""

from __future__ import annotations

import random

import pytest

from arriero.core.errors import ConfigError
from arriero.sim.fit import StepPoint, errors_of, fit_step_time
from arriero.sim.step_time import StepTimeModel

LINE = StepTimeModel(a_mem=0.0, a=12.0, b=0.45, c=3.5e-4, d=0.3, e=0.0025, host_ms=0.0)
ROOFLINE = StepTimeModel(a_mem=34.0, a=4.0, b=0.2, c=1e-5, d=0.3, e=1e-3, host_ms=0.0)


def points_of(model: StepTimeModel, noise: float = 0.0) -> list[StepPoint]:
    rng = random.Random(1)
    shapes = [((), b, b * c) for b in (1, 4, 16, 64) for c in (64, 512, 2048)]
    shapes += [(((p, c),), 0, 0) for p in (16, 128, 512, 2048) for c in (0, 1024)]
    shapes += [(((p, 0),), b, 256 * b) for p in (64, 512) for b in (4, 16)]
    return [
        StepPoint(p, b, s, model.step_ms(p, b, s) * (1 + rng.uniform(-noise, noise)))  # type: ignore[arg-type]
        for p, b, s in shapes
    ]


@pytest.mark.parametrize("model", [LINE, ROOFLINE], ids=["line", "roofline"])
def test_exact_steps_give_the_model_back(model: StepTimeModel) -> None:
    fitted, errors = fit_step_time(points_of(model))
    assert errors.worst < 1.0
    for prefills, decodes, context in [(((300, 500),), 0, 0), ((), 8, 4000), (((100, 0),), 8, 4000)]:
        assert fitted.step_ms(prefills, decodes, context) == pytest.approx(
            model.step_ms(prefills, decodes, context), rel=0.02
        )


def test_noise_does_not_make_coefficients_negative_and_shows_in_the_errors() -> None:
    fitted, errors = fit_step_time(points_of(LINE, noise=0.05))
    assert min(fitted.a_mem, fitted.a, fitted.b, fitted.c, fitted.d, fitted.e) >= 0
    assert set(errors.mape) == {"all", "decode", "mixed", "prefill"}
    assert 0.5 < errors.mape["all"] < 5.0
    assert errors.worst >= errors.mape["all"]


def test_errors_are_relative_to_what_was_measured() -> None:
    point = StepPoint(((10, 0),), 0, 0, 100.0)
    assert errors_of(StepTimeModel(a_mem=0.0, a=90.0, b=0.0, c=0.0, host_ms=0.0), [point]).worst == pytest.approx(10)


def test_too_few_steps_and_a_broken_clock_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 measured steps are too few"):
        fit_step_time(points_of(LINE)[:3])
    with pytest.raises(ConfigError, match="took no time"):
        fit_step_time([StepPoint((), 1, 1, 0.0)] * 9)
