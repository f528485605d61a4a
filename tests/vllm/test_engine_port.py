"""What an instance tells of its engine, with vLLM's own scheduler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from arriero.core.config import CopyConfig

pytest.importorskip("vllm")

from scheduled import BLOCK, make_engine

from arriero.vllm.engine_port import VllmEnginePort

COPIER = SimpleNamespace(unsupported=None)


def test_preemptions_are_counted() -> None:
    """Two requests that grow into memory that holds one and a half."""
    engine = make_engine(num_blocks=1 + 12, max_model_len=8 * BLOCK)
    port = VllmEnginePort(engine, COPIER, CopyConfig())  # type: ignore[arg-type]
    engine.add("a", 3 * BLOCK, 5 * BLOCK)
    engine.add("b", 3 * BLOCK, 5 * BLOCK)
    counts = set()
    while engine.scheduler.requests:
        preempted = sum(r.num_preemptions for r in engine.scheduler.requests.values())
        snapshot = port.snapshot(0, 0.0, 0, 0.0)
        counts.add((preempted, snapshot.num_preemptions))
        engine.step()
    assert counts == {(0, 0), (1, 1)}
