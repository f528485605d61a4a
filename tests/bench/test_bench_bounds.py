"""Bounds: what no simulated run may better."""

from __future__ import annotations

import pytest

from arriero.bench.bounds import idle_request_s, least_instance_hours
from arriero.sim.profiles import PAPER, load_profile
from arriero.sim.report import summarize
from arriero.sim.simulator import Simulator, SimulatorConfig, engine_config, scheduler_config
from arriero.workload.workload import Arrival, Workload

PROFILE = load_profile(PAPER)


def simulated(arrivals: list[Arrival]) -> dict[str, float]:
    config = SimulatorConfig(engine=engine_config(PROFILE), scheduler=scheduler_config("round_robin"))
    summary = summarize(Simulator(config, Workload("few", arrivals)).run())
    return {"e2e_s": summary["e2e_s"]["mean"], "instance_hours": summary["instance_hours"]}


def test_a_request_on_an_idle_instance_takes_as_long_as_in_the_simulator() -> None:
    arrivals = [
        Arrival(arrival_s=1000.0 * n, prompt_tokens=p, output_tokens=o)
        for n, (p, o) in enumerate([(5, 900), (2000, 1)])
    ]
    assert simulated(arrivals)["e2e_s"] == pytest.approx(idle_request_s(arrivals, PROFILE))


@pytest.mark.parametrize("num", [1, 12, 60])
def test_no_run_needs_fewer_instance_hours(num: int) -> None:
    arrivals = [Arrival(arrival_s=0.0, prompt_tokens=400, output_tokens=600) for _ in range(num)]
    bound, hours = least_instance_hours(arrivals, PROFILE), simulated(arrivals)["instance_hours"]
    assert bound < hours
    if num == 60:
        assert bound > 0.6 * hours, "memory was full most of the time"
