"""`make bench-sim`: the race is run, and what is written says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.bench import sim


def test_the_simulator_agrees_with_vidur_and_says_what_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sim.main(["--sizes", "100,400", "--repeats", "1", "--looking-requests", "100"]) == 0
    result = json.loads((tmp_path / "results" / "sim.json").read_text())
    agreement = [t for t in result["targets"] if "off vidur" in t["name"]]
    assert [t["met"] for t in agreement] == [True] * 4
    assert {t["unit"] for t in result["targets"]} >= {"%", "x", "GiB"}
    (sample,) = result["samples"]
    assert [point["num_requests"] for point in sample["scale"]] == [100, 400]
    assert all(point["peak_gib"] > 0 for point in sample["scale"] + sample["looking"])
    assert {point["policy"] for point in sample["looking"]} == {"arriero", "round_robin"}
    assert "The race against vidur" in capsys.readouterr().out
