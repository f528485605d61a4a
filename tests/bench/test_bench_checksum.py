"""bench-checksum: a small run measures every kind, and its table says what the samples say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.bench import checksum
from arriero.bench.checksum import Sample


def test_a_run_measures_every_kind_and_writes_it_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checksum, "NUM_LAYERS", 2)
    assert checksum.main(["--blocks", "1", "3", "--rounds", "2"]) == 0
    written = json.loads((tmp_path / "results/checksum.json").read_text())
    assert {(s["num_blocks"], s["operation"], s["kind"]) for s in written["samples"]} == {
        (n, o, k) for n in (1, 3) for o in ("gather", "scatter") for k in ("none", "xxh3_64", "crc32")
    }
    assert len(written["targets"]) == 2


def test_shares_are_of_medians() -> None:
    taken = {"none": (1.0, 2.0, 90.0), "xxh3_64": (2.0, 2.5, 3.0), "crc32": (6.0, 6.0, 6.0)}
    samples = [Sample(2, "gather", kind, ms) for kind, times in taken.items() for ms in times]
    (row,) = checksum.summarise(samples)
    assert (row["copy_ms"], row["xxh3_64_share"], row["crc32_share"]) == (2.0, 0.25, 2.0)
