"""`arriero calibrate` on a real engine, small enough to be quick; and the simulator takes what it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from arriero.model.bundled import ensure_bundled_model
from arriero.sim.profiles import read_profile

FLAGS = ["--max-model-len", "384", "--max-num-seqs", "4", "--max-num-batched-tokens", "384", "--enforce-eager"]
FLAGS += ["--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20)]


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_profile_is_measured_and_simulated_with(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    command = [sys.executable, "-m", "arriero.cli"]
    calibrate = [*command, "calibrate", str(ensure_bundled_model()), "--output", str(path), *FLAGS]
    done = subprocess.run(calibrate, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mean absolute error" in done.stdout
    profile = read_profile(path)
    assert profile.kv_bytes_per_token == 23_040  # 30 layers, 3 heads of 64, keys and values, two bytes each
    assert profile.kv_tokens == (64 << 20) // (32 * 23_040) * 32 - 32
    longer, shorter = (profile.step_time.step_ms([(n, 0)], 0, 0) for n in (320, 16))
    assert longer > shorter > 0
    simulate = [*command, "simulate", "--profile", str(path), "--workload", "S-S", "--rate", "1"]
    simulate += ["--num-requests", "20", "--instances", "2"]
    assert subprocess.run(simulate, capture_output=True).returncode == 0


def test_a_missing_model_or_folder_is_one_line_and_no_engine_starts(tmp_path: Path) -> None:
    for arguments in (["./absent"], [str(ensure_bundled_model()), "--output", str(tmp_path / "no" / "x.json")]):
        done = subprocess.run(
            [sys.executable, "-m", "arriero.cli", "calibrate", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith("arriero calibrate: ")
