"""What an instance tells of its engine, with vLLM's own scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from arriero.core.config import CopyConfig
from arriero.core.engine_port import Export
from arriero.core.errors import ArrieroError

pytest.importorskip("vllm")

from scheduled import BLOCK, Engine, make_engine
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

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


class _NoCopies:
    """Moves no block."""

    unsupported = None

    def export_rest(self, *_: Any) -> Export:
        return Export(ticket=None)

    def admit(self, *_: Any) -> None:
        pass


def _two_engines(**flags: Any) -> tuple[Engine, VllmEnginePort, Engine, VllmEnginePort]:
    engines = [make_engine(**flags) for _ in range(2)]
    ports = [VllmEnginePort(engine, _NoCopies(), CopyConfig()) for engine in engines]  # type: ignore[arg-type]
    return engines[0], ports[0], engines[1], ports[1]


def _move(name: str, source: Engine, its: VllmEnginePort, destination: Engine, others: VllmEnginePort) -> None:
    """Without blocks; the destination gets a request as the client sent it."""
    request = source.scheduler.requests[name]
    its.freeze(name)
    untold = its.export_rest("m", name, 0, 0, False).untold
    others.park(Request(name, list(request.prompt_token_ids), request.sampling_params, None))
    others.reserve(name, 0)
    others.extend(name, tuple(request.output_token_ids))
    others.admit(name, 0, None, untold)
    its.release(name)
    source.step()


def _told(engine: Engine, name: str) -> tuple[list[str], Any]:
    """What the first output with a token of ``name`` tells its client's statistics."""
    while not (outputs := [o for o in engine.step_outputs() if o.request_id == name]):
        pass
    return [e.type.name for e in outputs[0].events or ()], outputs[0].prefill_stats


def test_what_a_waiting_request_has_not_told_moves_with_it() -> None:
    source, its, destination, others = _two_engines(max_num_seqs=1)
    source.add("runs", 3 * BLOCK, 5)
    source.step()
    source.add("waits", 4 * BLOCK, 5)
    queued_s = source.scheduler.requests["waits"].events[0].timestamp
    _move("waits", source, its, destination, others)
    moved = destination.scheduler.requests["waits"]
    assert [e.timestamp for e in moved.events] == [pytest.approx(queued_s, abs=0.5)]
    names, prompt = _told(destination, "waits")
    assert (names, prompt.num_prompt_tokens) == (["QUEUED", "SCHEDULED"], 4 * BLOCK)


def test_a_preempted_request_that_moves_is_still_counted_as_preempted() -> None:
    """Two requests that grow into memory that holds one and a half."""
    source, its, destination, others = _two_engines(num_blocks=1 + 12, max_model_len=8 * BLOCK)
    source.add("a", 3 * BLOCK, 5 * BLOCK)
    source.add("b", 3 * BLOCK, 5 * BLOCK)
    while not source.scheduler.requests["b"].num_preemptions:
        source.step()
    _move("b", source, its, destination, others)
    assert _told(destination, "b") == (["PREEMPTED", "SCHEDULED"], None), "its prompt was told with its first token"


def test_a_request_that_moves_in_the_middle_of_its_prompt_tells_where_that_came_from() -> None:
    source, its, destination, others = _two_engines(max_num_batched_tokens=64)
    source.add("a", 8 * BLOCK, 5)
    source.step()
    assert source.scheduler.requests["a"].num_computed_tokens == 64
    _move("a", source, its, destination, others)
    names, prompt = _told(destination, "a")
    assert (names, prompt.num_prompt_tokens) == (["QUEUED", "SCHEDULED", "SCHEDULED"], 8 * BLOCK)


@pytest.mark.parametrize(
    ("tokens", "told", "prompt"),
    [((), ["QUEUED", "SCHEDULED"], 3 * BLOCK), ((7, 8), ["SCHEDULED"], None)],
    ids=["before its first token", "after it"],
)
def test_a_replay_tells_what_a_dead_instance_cannot_have_told(
    tokens: tuple[int, ...], told: list[str], prompt: int | None
) -> None:
    _, _, destination, others = _two_engines()
    others.park(Request("a", [1] * 3 * BLOCK, SamplingParams(max_tokens=5), None))
    others.reserve("a", 0)
    others.extend("a", tokens)
    others.admit("a", 0, None, b"")
    names, stats = _told(destination, "a")
    assert (names, stats and stats.num_prompt_tokens) == (told, prompt)


@pytest.mark.parametrize("untold", [b"rubbish", msgspec.msgpack.encode([[], {"no such": 1}])])
def test_rubbish_about_the_past_is_refused(untold: bytes) -> None:
    _, _, destination, others = _two_engines()
    others.park(Request("a", [1, 2, 3], SamplingParams(max_tokens=3), None))
    others.reserve("a", 0)
    with pytest.raises(ArrieroError, match="admit failed"):
        others.admit("a", 0, None, untold)
    others.discard("a")
    assert not destination.scheduler.requests
