"""Fidelity: what the front end adds is found in served times, and errors are those of the simulator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arriero.bench import fidelity
from arriero.bench.fidelity import Plan, as_served, compare, held_still, simulate, targets_of
from arriero.bench.replay import Seen
from arriero.bench.served import Served, in_service
from arriero.sim.fit import StepPoint
from arriero.sim.network import NetworkConfig
from arriero.sim.profiles import Profile
from arriero.sim.step_time import StepTimeModel

MODEL = StepTimeModel(a_mem=0.0, a=12.0, b=0.4, c=3e-4, d=0.3, e=0.0025, host_ms=0.0)
PROFILE = Profile(name="p", step_time=MODEL, kv_tokens=8192, kv_bytes_per_token=1024, block_size=32)
PLAN = Plan(
    trace="azure2023_conv_200.csv",
    requests=20,
    load=0.5,
    longest_prompt=200,
    longest_output=50,
    instances=2,
    max_num_seqs=16,
    max_num_batched_tokens=2048,
    itl_target_s=0.2,
    kv_cache_memory_bytes=100 << 20,
    flags=[],
)


def served(host_ms: float, each_ms: float, request_ms: float, speed: float = 1.0) -> Served:
    decodes = [
        StepPoint((), b, 200 * b, speed * (MODEL.step_ms((), b, 200 * b) + host_ms + each_ms * b)) for b in (1, 4, 16)
    ]
    prefills = [
        StepPoint(((p, 0),), 0, 0, speed * (MODEL.step_ms(((p, 0),), 0, 0) + request_ms)) for p in (32, 256, 900)
    ]
    return Served(decodes=decodes, prefills=prefills)


def test_the_front_end_s_share_of_a_step_is_found() -> None:
    model, _ = in_service(MODEL, [served(1.5, 0.6, 0.0), served(1.5, 0.6, 0.0)])
    assert (model.host_ms, model.d) == (pytest.approx(1.5), pytest.approx(0.9))
    assert replace(model, host_ms=0.0, d=MODEL.d) == MODEL


def test_a_front_end_that_seems_to_speed_steps_up_counts_as_none() -> None:
    assert in_service(MODEL, [served(-2.0, -0.1, 0.0)]) == (MODEL, 0.0)


def test_what_a_request_costs_before_its_first_step_is_found() -> None:
    assert in_service(MODEL, [served(0.0, 0.0, 7.0)]) == (MODEL, pytest.approx(7.0))


def test_what_neighbours_cost_each_token_of_a_prompt_is_found() -> None:
    seen = served(1.5, 0.6, 7.0)
    slowed = [replace(p, ms=p.ms + 0.2 * p.prefills[0][0]) for p in seen.prefills]
    decodes = [replace(p, ms=p.ms + 0.2 * p.num_decodes) for p in seen.decodes]  # they are tokens of a step, too
    model, cost_ms = in_service(MODEL, [Served(decodes=decodes, prefills=slowed)])
    assert model.b == pytest.approx(MODEL.b + 0.2)
    assert (model.host_ms, model.d, cost_ms) == (pytest.approx(1.5), pytest.approx(0.9), pytest.approx(7.0 - 1.5))


def test_drift_is_the_typical_change_of_the_machine_s_speed() -> None:
    before = served(0.0, 0.0, 0.0)
    assert before.drift(served(0.0, 0.0, 0.0, speed=1.04), MODEL) == pytest.approx(0.04)
    assert before.drift(served(0.0, 0.0, 0.0, speed=0.9), MODEL) == pytest.approx(0.1)
    busy = served(1.0, 0.5, 5.0)
    assert busy.drift(served(1.0, 0.5, 5.0, speed=1.04), MODEL) == pytest.approx(0.04)


def test_drift_does_not_ask_for_the_same_points_twice() -> None:
    before, after = served(0.0, 0.0, 0.0), served(0.0, 0.0, 0.0, speed=1.1)
    assert before.drift(replace(after, decodes=after.decodes[1:]), MODEL) == pytest.approx(0.1)


def test_the_simulator_is_asked_for_the_plan_s_requests_as_their_clients_see_them() -> None:
    without, with_cost = (simulate(PROFILE, PLAN, PLAN.workload(MODEL), "round_robin", cost) for cost in (0.0, 10.0))
    assert len(without) == 20
    for a, b in zip(without, with_cost, strict=True):
        assert (b["ttft_s"] - a["ttft_s"], b["e2e_s"] - a["e2e_s"]) == (pytest.approx(0.01), pytest.approx(0.01))
        assert b.get("tpot_s") == a.get("tpot_s")


def test_the_trace_is_stretched_to_what_the_machine_can_do() -> None:
    rate = PLAN.workload(MODEL).rate
    slower = replace(MODEL, a=2 * MODEL.a, b=2 * MODEL.b, c=2 * MODEL.c, d=2 * MODEL.d, e=2 * MODEL.e)
    assert PLAN.workload(slower).rate == pytest.approx(rate / 2)
    assert replace(PLAN, load=0.25).workload(MODEL).rate == pytest.approx(rate / 2)


def test_the_profile_in_service_holds_what_both_calibrations_say() -> None:
    network = NetworkConfig(bytes_per_s=1e9)
    sample = {"before": served(1.0, 0.5, 5.0), "after": served(1.0, 0.5, 5.0), "network": network}
    profile, cost_ms = as_served(PROFILE, sample)
    assert (profile.network, profile.kv_tokens) == (network, PROFILE.kv_tokens)
    # A lone request's time to its first token holds the step's own share of the front end, too.
    assert (profile.step_time.host_ms, cost_ms) == (pytest.approx(1.0), pytest.approx(5.0 - 1.0))


def seen(e2e_s: float) -> Seen:
    return Seen(
        arrival_s=0.0,
        prompt_tokens=10,
        output_tokens=10,
        late_s=0.0,
        ttft_s=e2e_s / 10,
        tpot_s=e2e_s / 20,
        silence_s=0.1,
        e2e_s=e2e_s,
        silence_at_s=0.0,
    )


def simulated(e2e_s: float) -> dict[str, float]:
    return {"ttft_s": e2e_s / 10, "tpot_s": e2e_s / 20, "e2e_s": e2e_s}


def test_errors_are_the_simulator_s_over_the_real_figure() -> None:
    compared = compare([seen(1.0), seen(2.0)], [simulated(1.1), simulated(1.9)])
    assert compared["mape"] == pytest.approx((0.1 + 0.05) / 2)
    assert compared["e2e_s"]["error"]["mean"] == pytest.approx(0.0)
    off = compare([seen(1.0)], [simulated(1.2)])
    assert off["ttft_s"]["error"] == pytest.approx({"mean": 0.2, "p50": 0.2, "p99": 0.2})


def test_a_target_for_each_figure_of_each_policy() -> None:
    def sample(policy: str, factor: float, drift: float) -> dict[str, Any]:
        compared = compare([seen(1.0)], [simulated(factor)])
        return {"policy": policy, "drift": drift, "speed_drift": drift, "compared": compared}

    good, bad = sample("round_robin", 1.08, 0.01), sample("arriero", 1.2, 0.06)
    assert all(t.met for t in targets_of([good]))
    assert not any(t.met for t in targets_of([bad]))
    assert len(targets_of([good, bad])) == 18


@pytest.mark.parametrize(
    ("change", "still"),
    [({}, True), ({"drift": 0.06}, False), ({"speed_drift": 0.06}, False), ({"machine_stalled_s": 1.5}, False)],
)
def test_a_replay_counts_if_the_machine_held_still(change: dict[str, float], still: bool) -> None:
    assert held_still({"drift": 0.04, "speed_drift": 0.04, "machine_stalled_s": 0.0, **change}) is still


def test_samples_of_another_plan_or_of_an_unknown_speed_are_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fidelity, "calibrated", lambda *_: PROFILE)
    monkeypatch.setattr(fidelity, "run", lambda policy, *_: {"policy": policy, "speed_drift": 0.0})
    monkeypatch.setattr(fidelity, "targets_of", lambda _: [])
    monkeypatch.setattr(fidelity, "table", lambda _: [])
    given = ["--model", "some", "--policies"]
    assert fidelity.main([*given, "round_robin"]) == 0
    assert fidelity.main([*given, "arriero"]) == 0
    kept = json.loads(fidelity.RESULT.read_text())
    assert [sample["policy"] for sample in kept["samples"]] == ["round_robin", "arriero"]
    assert fidelity.main([*given, "arriero", "--load", "0.4"]) == 1
    assert "another plan" in capsys.readouterr().err
    del kept["samples"][0]["speed_drift"]
    fidelity.RESULT.write_text(json.dumps(kept))
    assert fidelity.main([*given, "arriero"]) == 1
    assert "say --fresh" in capsys.readouterr().err
