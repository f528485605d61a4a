"""A load means the same on machines of different speed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arriero.bench.calibration import rate_of, work_ms
from arriero.sim.step_time import StepTimeModel
from arriero.workload.workload import Arrival

MODEL = StepTimeModel(a_mem=20.0, a=12.0, b=0.4, c=3e-4, d=0.3, e=0.0025, host_ms=0.0)
ARRIVALS = [Arrival(0.0, 100, 40), Arrival(1.0, 900, 10)]


def test_a_machine_of_half_the_speed_gets_half_the_rate_and_twice_the_instances_twice() -> None:
    rate = rate_of(0.8, ARRIVALS, 2, MODEL)
    assert rate_of(0.8, ARRIVALS, 2, replace(MODEL, scale=2.0)) == pytest.approx(rate / 2)
    assert rate_of(0.8, ARRIVALS, 4, MODEL) == pytest.approx(2 * rate)
    assert rate_of(0.4, ARRIVALS, 2, MODEL) == pytest.approx(rate / 2)


def test_a_full_load_is_all_the_time_of_the_instances() -> None:
    busy_s = sum(work_ms(MODEL, a.prompt_tokens, a.output_tokens) for a in ARRIVALS) / 1e3
    assert len(ARRIVALS) / rate_of(1.0, ARRIVALS, 1, MODEL) == pytest.approx(busy_s)


def test_a_longer_prompt_and_a_longer_answer_are_more_work() -> None:
    assert work_ms(MODEL, 100, 40) < work_ms(MODEL, 200, 40) < work_ms(MODEL, 200, 80)
