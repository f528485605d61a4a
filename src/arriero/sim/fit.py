"""A step-time model from measured steps: non-negative least squares of relative errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arriero.core.errors import ConfigError
from arriero.sim.step_time import StepTimeModel

MIN_POINTS = 8
MIN_GAIN = 0.95  #: a roofline must lower the squared error to this share, or the plain line is kept


@dataclass(frozen=True, slots=True)
class StepPoint:
    """One step that was measured."""

    prefills: tuple[tuple[int, int], ...]  #: (new tokens, tokens computed before) of each chunk
    num_decodes: int
    context_tokens: int  #: of the decoding sequences, summed
    ms: float

    @property
    def num_tokens(self) -> int:
        """P + B of the model."""
        return sum(new for new, _ in self.prefills) + self.num_decodes

    @property
    def kind(self) -> str:
        """Decode, prefill or mixed."""
        return "decode" if not self.prefills else "mixed" if self.num_decodes else "prefill"


@dataclass(frozen=True, slots=True)
class FitErrors:
    """Absolute percentage errors of the fit on its own points; ``mape`` by kind of step, and over all."""

    mape: dict[str, float]
    worst: float


def fit_step_time(points: Sequence[StepPoint]) -> tuple[StepTimeModel, FitErrors]:
    """The model nearest to ``points``, which are weighted by ``1 / ms``. Raises ConfigError.

    Coefficients are 0 or more. ``host_ms`` is 0: what a step costs outside the model cannot be told from
    ``a`` by its time, and is part of it. ``a_mem`` is above ``a`` only if a flat piece fits better.
    """
    if len(points) < MIN_POINTS:
        raise ConfigError(f"{len(points)} measured steps are too few for a fit: {MIN_POINTS} or more are needed")
    if any(point.ms <= 0 for point in points):
        raise ConfigError("a measured step took no time: the clock is broken")
    plain, plain_error = _fit(points, 0)
    best, best_error = plain, MIN_GAIN * plain_error
    for bound in sorted({point.num_tokens for point in points})[1:-1]:
        model, error = _fit(points, bound)
        if error < best_error and model.a_mem > model.a:
            best, best_error = model, error
    return best, errors_of(best, points)


def errors_of(model: StepTimeModel, points: Sequence[StepPoint]) -> FitErrors:
    """How far ``model`` is from ``points``."""
    errors = {point: 100 * abs(_predict(model, point) - point.ms) / point.ms for point in points}
    kinds = sorted({point.kind for point in points})
    mape = {kind: float(np.mean([e for p, e in errors.items() if p.kind == kind])) for kind in kinds}
    return FitErrors({**mape, "all": float(np.mean(list(errors.values())))}, max(errors.values()))


def _predict(model: StepTimeModel, point: StepPoint) -> float:
    return model.step_ms(point.prefills, point.num_decodes, point.context_tokens)


def _fit(points: Sequence[StepPoint], bound: int) -> tuple[StepTimeModel, float]:
    """With steps of up to ``bound`` tokens on the flat piece. Returns the model and its squared relative error."""
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise ConfigError("fitting a profile needs SciPy: pip install 'arriero[calibrate]'") from error
    rows = []
    for point in points:
        flat = point.num_tokens <= bound
        attention = sum(new * (computed + new / 2) for new, computed in point.prefills)
        linear = (1.0, 0.0, 0.0) if flat else (0.0, 1.0, float(point.num_tokens))
        rows.append([*linear, attention, float(point.num_decodes), float(point.context_tokens)])
    design, ms = np.array(rows), np.array([point.ms for point in points])
    scale = np.maximum(
        (design / ms[:, None]).max(axis=0), 1e-300
    )  # columns of one size: nnls has an absolute tolerance
    solution, _ = nnls(design / ms[:, None] / scale, np.ones(len(points)))
    a_mem, a, b, c, d, e = (float(v) for v in solution / scale)
    model = StepTimeModel(a_mem=max(a_mem, a), a=a, b=b, c=c, d=d, e=e, host_ms=0.0)
    return model, sum((_predict(model, p) / p.ms - 1) ** 2 for p in points)
