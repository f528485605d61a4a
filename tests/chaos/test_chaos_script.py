"""Fault scripts: what they say, and how a wrong one is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from arriero.chaos.script import Action, random_script, read_script
from arriero.core.errors import ConfigError


def script_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "faults.yaml"
    path.write_text(text)
    return path


def test_a_script_names_faults_moments_and_targets(tmp_path: Path) -> None:
    path = script_file(
        tmp_path,
        """
        duration_s: 30
        faults:
          - {at_s: 5, action: kill}
          - {at_tokens: 100, action: stop, target: 1, for_s: 2}
          - {at_event: migration, action: slow_disk}
        """,
    )
    script = read_script(path)
    assert script.duration_s == 30
    assert [(f.action, f.target) for f in script.faults] == [
        (Action.KILL, None),
        (Action.STOP, 1),
        (Action.SLOW_DISK, None),
    ]


def test_json_is_a_script_too(tmp_path: Path) -> None:
    assert read_script(script_file(tmp_path, '{"faults": [{"at_s": 1, "action": "drain"}]}')).duration_s == 60


@pytest.mark.parametrize(
    ("text", "wrong"),
    {
        "faults: [{at_s: 1, action: explode}]": "'explode'",
        "faults: [{action: kill}]": "exactly one of at_s",
        "faults: [{at_s: 1, at_tokens: 2, action: kill}]": "exactly one of at_s",
        "faults: [{at_s: -1, action: kill}]": "0 or more",
        "faults: [{at_s: 1, action: kill, for_s: 1000}]": "at most 60",
        "faults: [{at_s: 1, action: kill, victim: 2}]": "victim",
        "faults: [{at_s: 1, action: kill, target: -2}]": "target -2",
        "{faults: [], duration_s: 99999}": "duration_s=99999",
        "faults: [": "faults.yaml",
    }.items(),
)
def test_a_wrong_script_is_refused_with_what_is_wrong(tmp_path: Path, text: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_script(script_file(tmp_path, text))
    assert wrong in str(refused.value)


def test_a_script_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_script(tmp_path / "missing.yaml")


def test_random_faults_are_the_same_for_the_same_seed_and_leave_the_ends_alone() -> None:
    one, other = (random_script("kill=5,stop=2", duration_s=50, rng=random.Random(7)) for _ in range(2))
    assert one == other
    assert sorted(f.action for f in one.faults) == [Action.KILL] * 5 + [Action.STOP] * 2
    moments = [f.at_s for f in one.faults if f.at_s is not None]
    assert moments == sorted(moments)
    assert all(5 <= moment <= 45 for moment in moments)


@pytest.mark.parametrize("counts", ["explode=1", "kill=many", "kill=-1"])
def test_faults_that_nobody_knows_are_refused(counts: str) -> None:
    with pytest.raises(ConfigError, match="not understood"):
        random_script(counts, duration_s=10, rng=random.Random(0))
