"""`make bench-policies` and `make bench-scheduler`, on loads of a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from arriero.bench import policies, policies_page, scheduler
from arriero.bench.policies import (
    MAIN,
    POINTS,
    PRIORITIES,
    RATES,
    SCALING,
    Run,
    front,
    hours_at,
    rows_of,
    simulate,
    targets_of,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docs" / "img").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_point_for_all_policies_has_figures_and_says_which_targets_are_met() -> None:
    samples = [simulate(Run(POINTS[0], policy, 1, 60)) for policy in MAIN]
    assert [r["policy"] for r in rows_of(samples)] == MAIN
    names = [t.name for t in targets_of(samples)]
    assert "M-M 7.8: prefill P99, infaas / llumnix" in names
    assert "M-M 7.8: preemption loss, arriero / infaas" in names


def test_priorities_are_compared_with_the_same_requests_of_which_nobody_is_told() -> None:
    point = PRIORITIES[0]
    ignored = replace(point, name=f"{point.name}, ignored", ignored=True)
    samples = [simulate(Run(p, "arriero", 1, 80)) for p in (point, ignored)]
    high = [s["by_priority"]["-1"]["e2e_s"]["mean"] for s in samples]
    speed_up = next(t for t in targets_of(samples) if "speed-up" in t.name)
    assert speed_up.value == pytest.approx(high[1] / high[0])
    assert f"(with an idle instance for each: {high[1] / samples[1]['idle_request_s']:.2f})" in speed_up.name


def test_a_cluster_that_scales_costs_less_than_one_that_does_not() -> None:
    scaled = simulate(Run(SCALING[0], "arriero", 1, 100))
    assert 0 < scaled["instance_hours"] < 16 * scaled["duration_s"] / 3600


def test_equal_latency_is_sought_along_the_curve_and_never_beyond_its_ends() -> None:
    curve = front([(3.0, 10.0), (2.0, 100.0), (2.5, 200.0), (4.0, 1.0)])
    assert curve == [(2.0, 100.0), (3.0, 10.0), (4.0, 1.0)]
    assert hours_at(curve, 1000.0) == 2.0
    assert hours_at(curve, 10**1.5) == pytest.approx(2.5)
    assert hours_at(curve, 1.0) == pytest.approx(4.0)
    assert hours_at(curve, 0.5) is None


def test_the_best_rate_is_told_beside_the_point() -> None:
    rates = [p for p in RATES if p.workload == "M-M"][:2]
    samples = [simulate(Run(p, policy, 1, 40)) for p in rates for policy in ("infaas", "llumnix")]
    (best,) = targets_of(samples)
    assert best.name.startswith("M-M: prefill P99, infaas / llumnix, at its best rate (")


def test_results_are_appended_and_become_a_page_with_pictures(folder: Path) -> None:
    common = ["--requests", "40", "--seeds", "1", "--processes", "1"]
    for policy in MAIN:
        assert policies.main(["--sets", "points", "scaling", "--policies", policy, "--append", *common]) == 0
    result = json.loads(Path("results/policies.json").read_text())
    assert len(result["samples"]) == len(MAIN) * (len(POINTS) + len(SCALING))
    assert policies_page.main() == 0
    text = Path("docs/benchmarks.md").read_text()
    assert all(f"### {p.name}" in text for p in POINTS)
    assert "| arriero (1 seed) |" in text
    assert {p.name for p in Path("docs/img").iterdir()} == {"policies.png", "scaling.png"}
    assert "scaling.png" in text
    assert "scaling.png" not in policies_page.page({**result, "rows": result["rows"][:4]}, "make bench-policies")


def test_decisions_are_measured_by_the_number_of_instances(folder: Path) -> None:
    assert scheduler.main(["--instances", "2", "12", "--running", "5", "--dispatches", "20", "--rounds", "3"]) == 0
    result = json.loads(Path("results/scheduler.json").read_text())
    assert [(s["policy"], s["instances"]) for s in result["samples"]] == [
        (policy, num) for policy in ("arriero", "llumnix") for num in (2, 12)
    ]
    assert all(s["dispatch_p50_us"] > 0 and s["round_p99_ms"] > 0 for s in result["samples"])
