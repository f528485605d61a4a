"""The searches of `arriero sweep`, on made-up clusters and on simulated ones."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.core.errors import ConfigError
from arriero.sim import sweep_cli
from arriero.sim.sweep import Point, Targets, as_json, fewest_instances, highest_rate

AZURE = str(files("arriero") / "data" / "azure2023_conv_200.csv")


def cluster(met: Callable[[float, int], bool]) -> Callable[..., Point]:
    """A measurement that knows the answer."""

    def measure(rate: float = 1.0, num_instances: int = 1) -> Point:
        return Point(rate=rate, num_instances=num_instances, ttft_s=1.0, tpot_s=0.1, met=met(rate, num_instances))

    return measure


@settings(deadline=None, derandomize=True, database=None)
@given(st.floats(1e-3, 1e4), st.floats(1e-2, 1e3), st.floats(0.005, 0.3))
def test_the_highest_rate_is_found_to_the_precision(limit: float, start: float, precision: float) -> None:
    sweep = highest_rate(cluster(lambda rate, _: rate <= limit), start, precision)
    assert sweep.best is not None
    assert limit / (1 + precision) <= sweep.best.rate <= limit
    assert len(sweep.points) < 40


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_fewest_instances_are_found_exactly(needed: int, most: int) -> None:
    sweep = fewest_instances(lambda n: cluster(lambda _, n: n >= needed)(1.0, n), most)
    assert (sweep.best.num_instances if sweep.best else None) == (needed if needed <= most else None)
    tried = [p.num_instances for p in sweep.points]
    assert len(tried) == len(set(tried))
    assert max(tried) <= most


def test_where_no_point_meets_the_targets_there_is_no_best_one() -> None:
    never, always = cluster(lambda *_: False), cluster(lambda *_: True)
    assert highest_rate(never, 4.0, 0.02).best is None
    assert fewest_instances(lambda n: never(1.0, n), 8).best is None
    best = highest_rate(always, 4.0, 0.02).best
    assert best is not None, "a limit that is never reached ends the search, too"
    assert best.rate > 1e6


def test_what_is_infinite_is_none_in_json() -> None:
    point = Point(rate=1.0, num_instances=2, ttft_s=float("inf"), tpot_s=0.5, met=False)
    assert as_json(highest_rate(lambda rate: point, 1.0, 0.5))["points"][0] == {
        "rate": 1.0,
        "num_instances": 2,
        "ttft_s": None,
        "tpot_s": 0.5,
        "met": False,
    }


def test_targets_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="no target is given: add --ttft"):
        Targets()
    with pytest.raises(ConfigError, match="--tpot 0 is invalid"):
        Targets(tpot_s=0)
    with pytest.raises(ConfigError, match="--percentile 101 is invalid"):
        Targets(ttft_s=1, percentile=101)


# ---------------------------------------------------------------------- the command


def sweep(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    sweep_cli.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["sweep", *arguments])
    code: int = args.run(args)
    return code


def test_two_policies_sustain_different_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate that is found meets the target, and the next one that was tried above it does not."""
    arguments = ["--workload", "M-M", "--instances", "3", "--num-requests", "150", "--ttft", "2", "--precision", "0.2"]
    arguments += ["--policy", "round_robin,freeness", "--plot", str(tmp_path / "sweep.png")]
    assert sweep(*arguments, "--json") == 0
    policies = json.loads(capsys.readouterr().out)["policies"]
    assert set(policies) == {"round_robin", "freeness"}
    for found in policies.values():
        assert found["best"]["ttft_s"] <= 2 < min(p["ttft_s"] for p in found["points"] if not p["met"])
        above = [p["rate"] for p in found["points"] if p["rate"] > found["best"]["rate"]]
        assert min(above) <= found["best"]["rate"] * 1.2 + 1e-9
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sweep(*arguments) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "the highest rate with P99 TTFT <= 2 s" in table
    assert f"{policies['freeness']['best']['rate']:.4g}" in table


def test_the_fewest_instances_for_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [AZURE, "--ttft", "1", "--tpot", "0.1", "--policy", "freeness", "--profile", "llama2-7b_a100"]
    assert sweep(*arguments, "--plot", str(tmp_path / "sweep.html")) == 0
    assert "the fewest instances" in " ".join(capsys.readouterr().out.split())
    assert sweep(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)["policies"]["freeness"]
    fewer = [p for p in found["points"] if p["num_instances"] < found["best"]["num_instances"]]
    assert not any(p["met"] for p in fewer)


def test_targets_out_of_reach_are_said_with_what_was_reached(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(AZURE, "--ttft", "0.001", "--max-instances", "3", "--policy", "round_robin") == 1
    assert "none; at 3:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "S-S", "--instances", "2"], "no target is given"),
        (["--workload", "S-S", "--ttft", "1"], "give either --instances"),
        (["--workload", "S-S", "--ttft", "1", "--instances", "2", "--rate", "2"], "give either --instances"),
        ([AZURE, "--ttft", "1", "--instances", "2"], "--rate and --instances are for --workload"),
        ([AZURE, "--ttft", "1", "--max-instances", "0"], "--max-instances 0 is invalid"),
        (["--workload", "S-S", "--ttft", "1", "--instances", "2", "--precision", "0"], "--precision 0.0 is invalid"),
        (["--workload", "S-S", "--ttft", "1", "--instances", "0"], "is invalid"),
        (["--ttft", "1"], "give either a trace or --workload"),
        ([AZURE, "--ttft", "1", "--plot", "x.pdf"], "must end with .png or .html"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("arriero sweep: ")
    assert message in error
    assert error.count("\n") == 1
