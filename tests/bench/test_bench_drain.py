"""The figures of the drain benchmark: what is claimed of which samples."""

from __future__ import annotations

from typing import Any

from arriero.bench.drain import row_of, targets_of


def drain(engine: str, to_go: int, emptied_s: float, *, failed: int = 0) -> dict[str, Any]:
    return {
        "engine": engine,
        "what": "drain",
        "to_go": to_go,
        "emptied_s": emptied_s,
        "total_s": emptied_s + 0.5,
        "failed": failed,
    }


def test_a_drain_is_flat_quick_and_fails_nobody() -> None:
    drains = [drain("sim", 100, 1.0), drain("sim", 2000, 1.2), drain("sim", 100, 1.0), drain("sim", 2000, 1.4)]
    targets = targets_of(drains, [{"engine": "sim", "failed": 0}])
    assert [(t.name, round(t.value, 3), t.met) for t in targets] == [
        ("sim: drain, slowest", 1.9, True),
        ("sim: time to empty, 2000 tokens to go over 100", 1.3, True),
        ("sim: failed requests", 0, True),
    ]


def test_each_engine_has_its_own_claims_and_one_failure_misses_one() -> None:
    drains = [drain("sim", 100, 1.0), drain("vllm", 100, 3.0), drain("vllm", 2000, 6.0, failed=1)]
    targets = {t.name: t.met for t in targets_of(drains, [{"engine": "vllm", "failed": 2}])}
    assert targets == {
        "sim: drain, slowest": True,
        "sim: time to empty, 100 tokens to go over 100": True,
        "sim: failed requests": True,
        "vllm: drain, slowest": False,
        "vllm: time to empty, 2000 tokens to go over 100": False,
        "vllm: failed requests": False,
    }


def test_a_row_shows_what_a_person_compares() -> None:
    row = row_of({**drain("sim", 100, 1.0), "events": "many"})
    assert (row["engine"], row["to_go"], row["emptied_s"], row["failed"]) == ("sim", 100, 1.0, 0)
    assert "events" not in row
