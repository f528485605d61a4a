"""The rules of core/preemption.py in vLLM's own scheduler."""

from __future__ import annotations

import random
from typing import Any

import pytest

from arriero.core.config import PreemptionConfig

pytest.importorskip("vllm")

from scheduled import BLOCK, Engine, make_engine
from vllm.v1.core.sched.interface import PauseState

from arriero.sim.config import SimEngineConfig
from arriero.sim.engine import SimEngine
from arriero.sim.sequence import Job
from arriero.sim.step_time import StepTimeModel
from arriero.vllm.preemption import rule_memory


def _ruled(**flags: Any) -> Engine:
    engine = make_engine(**flags)
    assert rule_memory(engine, PreemptionConfig()) is not None
    return engine


def _preempted(engine: Engine) -> set[str]:
    return {name for name, request in engine.scheduler.requests.items() if request.num_preemptions}


def _run_until_preempted(engine: Engine) -> set[str]:
    while not (names := _preempted(engine)):
        engine.step()
    return names


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_smallest_gives_way(policy: str) -> None:
    """vLLM would take the last."""
    engine = _ruled(num_blocks=1 + 12, max_model_len=12 * BLOCK, scheduling_policy=policy)
    engine.add("small", 2 * BLOCK, 5 * BLOCK)
    engine.add("large", 6 * BLOCK, 5 * BLOCK)
    assert _run_until_preempted(engine) == {"small"}


def test_without_the_rules_vllm_preempts_as_ever() -> None:
    engine = make_engine(num_blocks=1 + 12, max_model_len=12 * BLOCK)
    assert rule_memory(engine, None) is None
    engine.add("small", 2 * BLOCK, 5 * BLOCK)
    engine.add("large", 6 * BLOCK, 5 * BLOCK)
    assert _run_until_preempted(engine) == {"large"}


def test_one_that_has_begun_goes_on_before_a_large_one_that_does_not_fit() -> None:
    engine = _ruled(num_blocks=1 + 24, max_model_len=24 * BLOCK)
    scheduler = engine.scheduler
    for name, num_blocks in (("stays", 9), ("small", 3), ("large", 8)):
        engine.add(name, num_blocks * BLOCK - 8, 100)
    engine.step()
    for name in ("small", "large"):  # the large one is the first in the queue then
        scheduler.running.remove(scheduler.requests[name])
        scheduler._preempt_request(scheduler.requests[name], 0.0)
    engine.add("filler", 8 * BLOCK, 100)
    scheduler.waiting.remove_requests([scheduler.requests["filler"]])
    scheduler.waiting.prepend_request(scheduler.requests["filler"])
    assert "filler" in engine.step(), "it is new, and at the head"
    assert [r.request_id for r in scheduler.waiting] == ["large"], "the small one fits beside them"
    assert {r.request_id for r in scheduler.running} == {"stays", "filler", "small"}


def test_one_that_was_preempted_waits_until_the_others_have_room_to_grow() -> None:
    engine = _ruled(num_blocks=1 + 12, max_model_len=12 * BLOCK)
    engine.add("small", 2 * BLOCK, 5 * BLOCK)
    engine.add("large", 6 * BLOCK, 5 * BLOCK)
    _run_until_preempted(engine)
    scheduler = engine.scheduler
    while "small" not in {r.request_id for r in scheduler.running}:
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        engine.step()
    needs = -(-scheduler.requests["small"].num_tokens // BLOCK)
    assert free >= needs + len(scheduler.running) - 1
    assert scheduler.requests["small"].num_preemptions == 1


def test_a_new_request_behind_the_preempted_keeps_its_place() -> None:
    engine = _ruled(num_blocks=1 + 12, max_model_len=12 * BLOCK)
    engine.add("small", 2 * BLOCK, 5 * BLOCK)
    engine.add("large", 6 * BLOCK, 5 * BLOCK)
    _run_until_preempted(engine)
    engine.add("new", 11 * BLOCK, 5)
    engine.add("tiny", 3, 5)
    engine.step()
    assert [r.request_id for r in engine.scheduler.waiting] == ["small", "new", "tiny"]


def test_nobody_starts_in_a_step_for_which_somebody_gave_way() -> None:
    """As in vLLM: who runs is served first, and what is left is seen in the next step."""
    engine = _ruled(num_blocks=1 + 12, max_model_len=12 * BLOCK, scheduling_policy="priority")
    engine.add("small", 4 * BLOCK - 8, 5 * BLOCK)
    engine.add("large", 7 * BLOCK, 5 * BLOCK)
    engine.step()
    engine.add("urgent", 2 * BLOCK, 5, priority=-1)
    while not _preempted(engine):
        step = engine.step()
    assert step == {"large": 1}
    assert "urgent" in engine.step()


def test_a_paused_engine_preempts_nobody() -> None:
    engine = _ruled(num_blocks=1 + 12, max_model_len=12 * BLOCK)
    engine.add("small", 2 * BLOCK, 5 * BLOCK)
    engine.add("large", 6 * BLOCK, 5 * BLOCK)
    scheduler, pool = engine.scheduler, engine.scheduler.kv_cache_manager.block_pool
    while pool.get_num_free_blocks() or all(r.num_tokens % BLOCK != 1 for r in scheduler.running):
        engine.step()
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not engine.step()
    assert not _preempted(engine)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.step()
    assert _preempted(engine) == {"small"}, "it was about to"


def test_whom_vllm_preempts_itself_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing of what the step takes were foreseen."""
    engine = make_engine(num_blocks=1 + 16, max_model_len=16 * BLOCK)
    rules = rule_memory(engine, PreemptionConfig())
    assert rules is not None
    for name, num_blocks in (("small", 2), ("large", 6), ("last", 3)):
        engine.add(name, num_blocks * BLOCK, 6 * BLOCK)
    assert _run_until_preempted(engine) == {"small"}, "so somebody who has begun waits, and the queue is not vLLM's"
    monkeypatch.setattr(rules, "_lacking", dict)
    while "last" not in _preempted(engine):
        engine.step()
    assert [r.request_id for r in engine.scheduler.waiting] == ["last", "small"]
    while engine.scheduler.requests:
        engine.step()


def test_nobody_gives_way_to_a_request_whose_last_token_is_under_way() -> None:
    """With two steps under way, "ends" would take a block in the next one, if there were one."""
    engine = _ruled(num_blocks=1 + 4, max_model_len=4 * BLOCK, overlapping=True)
    engine.add("stays", 2 * BLOCK + 1, BLOCK - 3)
    engine.add("ends", 10, 7)
    planned = [engine.scheduler.schedule()]
    while engine.scheduler.requests:
        planned.append(engine.scheduler.schedule())
        engine.finish(planned.pop(0))
        assert not _preempted(engine)


def test_nobody_gives_way_to_a_prompt_whose_next_part_fits() -> None:
    engine = _ruled(num_blocks=1 + 14, max_model_len=14 * BLOCK, long_prefill_token_threshold=BLOCK)
    engine.add("grows", 6 * BLOCK - 8, 100)
    for _ in range(6):
        engine.step()
    engine.add("long", 8 * BLOCK, 5)
    for _ in range(4):
        assert engine.step() == {"grows": 1, "long": BLOCK}
    assert not _preempted(engine)


def test_a_new_request_at_the_head_starts_if_its_prefix_is_in_the_cache() -> None:
    """Its prompt alone would not fit, and somebody who has begun waits, for whom there is no room."""
    engine = _ruled(num_blocks=1 + 12, max_model_len=12 * BLOCK, enable_prefix_caching=True)
    scheduler = engine.scheduler
    engine.add("stays", 7 * BLOCK, 100)
    engine.add("other", 3 * BLOCK, 100, first=1000)
    engine.step()
    scheduler.running.remove(scheduler.requests["other"])
    scheduler._preempt_request(scheduler.requests["other"], 0.0)
    engine.add("alike", 7 * BLOCK + 4, 5)
    scheduler.waiting.remove_requests([scheduler.requests["alike"]])
    scheduler.waiting.prepend_request(scheduler.requests["alike"])
    assert "alike" in engine.step()


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_all_end_whatever_is_preempted(policy: str, overlapping: bool) -> None:
    rng = random.Random(5)
    engine = _ruled(num_blocks=1 + 14, max_model_len=14 * BLOCK, scheduling_policy=policy, overlapping=overlapping)
    for number in range(40):
        engine.add(f"r{number}", rng.randint(1, 6 * BLOCK), rng.randint(1, 7 * BLOCK))
    planned, num_preemptions = [engine.scheduler.schedule()], 0
    while engine.scheduler.requests or planned:
        num_preemptions += len(planned[0].preempted_req_ids)
        if overlapping:
            planned.append(engine.scheduler.schedule())
        engine.finish(planned.pop(0))
        if not overlapping and engine.scheduler.requests:
            planned.append(engine.scheduler.schedule())
        if overlapping and not engine.scheduler.requests:
            break
    assert num_preemptions > 5
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 14


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("tokens", [32, 4096])
def test_the_simulated_engine_takes_the_same_steps(seed: int, policy: str, tokens: int) -> None:
    rng, num_blocks = random.Random(seed), 20
    engine = _ruled(
        num_blocks=1 + num_blocks,
        max_model_len=num_blocks * BLOCK,
        max_num_batched_tokens=tokens,
        scheduling_policy=policy,
    )
    simulated = SimEngine(
        SimEngineConfig(
            num_blocks=num_blocks,
            block_size=BLOCK,
            max_num_seqs=8,
            max_num_batched_tokens=tokens,
            priority_scheduling=policy == "priority",
            preemption=PreemptionConfig(),
            with_contents=False,
            step_time=StepTimeModel(a=10.0),
        )
    )
    for number in range(25):
        name, prompt, output = f"r{number}", rng.randint(1, 6 * BLOCK), rng.randint(1, 6 * BLOCK)
        priority = rng.randint(-1, 1) if policy == "priority" else 0
        engine.add(name, prompt, output, priority)
        simulated.add(
            Job(
                request_id=name,
                prompt_token_ids=range(prompt),
                max_tokens=output,
                ignore_eos=True,
                priority=priority,
                arrival_s=number,
            )
        )
    now, num_preemptions = 0.0, 0
    while simulated.has_requests:
        step = simulated.begin_step(now)
        assert step is not None
        expected = {chunk.sequence.request_id: chunk.num_tokens for chunk in step.chunks}
        assert engine.step() == expected
        now = step.ends_s
        simulated.finish_step(now)
        num_preemptions = simulated.snapshot(now).num_preemptions
    assert num_preemptions
    assert not engine.scheduler.requests
