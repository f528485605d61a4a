"""vLLM's own scheduler, held to a target for the time between two tokens; what a step takes is made up."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.core.config import StepConfig

pytest.importorskip("vllm")

from scheduled import Engine, make_engine

from arriero.vllm.step_limits import StepLimits, limit_steps

TARGET = StepConfig(itl_target_s=0.2)
EARLY = 3  #: prompts until the model of a step is right


def limited(engine: Engine, config: StepConfig = TARGET) -> Engine:
    """With its clock."""
    StepLimits(engine.scheduler, config, lambda: engine.has_moves, lambda: engine.now_s)
    return engine


def settled(engine: Engine) -> Engine:
    """A stream decodes, and some prompts have been computed beside it."""
    engine.add("stream", 20, 4000)
    engine.step()
    engine.step()
    for number in range(EARLY):
        engine.add(f"early-{number}", 300, 1)
        while f"early-{number}" in engine.scheduler.requests:
            engine.step()
    engine.steps.clear()
    return engine


def test_a_stream_gets_a_token_in_every_step_and_steps_take_the_target() -> None:
    engine = settled(limited(make_engine()))
    engine.add("long", 2000, 1)
    while "long" in engine.scheduler.requests:
        engine.step()
    assert all(tokens["stream"] == 1 for tokens, _ in engine.steps)
    assert sum(tokens.get("long", 0) for tokens, _ in engine.steps) == 2000
    *most, _ = [took for tokens, took in engine.steps if "long" in tokens]
    assert most == pytest.approx([0.2] * len(most), rel=0.15)


def test_without_limits_the_prompt_is_one_step_that_keeps_the_stream_waiting() -> None:
    engine = settled(make_engine())
    engine.add("long", 2000, 1)
    engine.step()
    assert engine.steps == [({"stream": 1, "long": 2000}, pytest.approx(2.049))]


def test_a_prompt_that_nobody_waits_for_is_computed_in_steps_of_a_second() -> None:
    engine = settled(limited(make_engine()))
    engine.scheduler.finish_requests(["stream"], 7)
    engine.add("long", 2000, 1)
    while "long" in engine.scheduler.requests:
        engine.step()
    *most, _ = [took for _, took in engine.steps]
    assert most == pytest.approx([TARGET.prompt_step_s] * len(most), rel=0.15)
    assert 1 <= len(most) <= 2


def test_a_request_that_moves_does_not_wait_for_the_end_of_a_whole_prompt() -> None:
    engine = settled(limited(make_engine()))
    engine.scheduler.finish_requests(["stream"], 7)
    engine.has_moves = True
    engine.add("long", 2000, 1)
    engine.step()
    engine.has_moves = False
    engine.step()
    part, more = engine.steps
    assert part[1] == pytest.approx(TARGET.itl_target_s, rel=0.15)
    assert more[1] == pytest.approx(TARGET.prompt_step_s, rel=0.15)


def test_streams_that_stand_behind_a_prompt_come_along() -> None:
    """As those do that have moved in: they are the last of the running list."""
    engine = settled(limited(make_engine()))
    engine.add("long", 2000, 1)
    engine.step()
    running = engine.scheduler.running
    running.sort(key=lambda r: r.request_id)  # the prompt first
    assert [r.request_id for r in running] == ["long", "stream"]
    tokens = engine.step()
    assert tokens["stream"] == 1
    assert tokens["long"] > TARGET.least_prompt_tokens


def test_several_prompts_share_one_limit() -> None:
    engine = settled(limited(make_engine()))
    for number in range(4):
        engine.add(f"p{number}", 400, 1)
    while any(name.startswith("p") for name in engine.scheduler.requests):
        engine.step()
    assert all(took <= 0.2 * 1.15 for _, took in engine.steps)
    assert all(tokens["stream"] == 1 for tokens, _ in engine.steps)


@pytest.mark.parametrize(("flags", "most"), [({"long_prefill_token_threshold": 40}, 40), ({}, 200)])
def test_what_the_user_set_holds_too_and_is_there_again_after_each_step(flags: dict[str, Any], most: int) -> None:
    engine = settled(limited(make_engine(**flags)))
    before = engine.scheduler.scheduler_config.long_prefill_token_threshold
    assert before == flags.get("long_prefill_token_threshold", 0)
    engine.add("long", 1000, 1)
    assert engine.step()["long"] <= most
    assert engine.scheduler.scheduler_config.long_prefill_token_threshold == before
    assert engine.scheduler.max_num_scheduled_tokens == 4096


def test_steps_that_overlap_are_timed_from_one_end_to_the_next() -> None:
    engine = limited(make_engine(overlapping=True))
    engine.add("stream", 20, 4000)
    engine.step()
    engine.add("long", 1000, 1)
    under_way: Any = None
    for _ in range(60):
        planned = engine.scheduler.schedule()
        if under_way is not None:
            engine.finish(under_way)
        under_way = planned
        if "long" not in engine.scheduler.requests:
            engine.add("long", 1000, 1)
    took = [seconds for tokens, seconds in engine.steps if tokens.get("long", 0) > 60]  # the last part is what is left
    assert took[-12:-1] == pytest.approx([0.2] * 11, rel=0.15)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (StepConfig(itl_target_s=0), lambda engine: None),
        (TARGET, lambda engine: setattr(engine.scheduler, "need_mamba_block_aligned_split", True)),
        (TARGET, lambda engine: setattr(engine.scheduler.scheduler_config, "enable_chunked_prefill", False)),
    ],
    ids=["no target", "state at block ends", "whole prompts"],
)
def test_a_scheduler_that_cannot_be_limited_is_left_as_it_is(config: StepConfig, change: Any) -> None:
    engine = make_engine()
    change(engine)
    assert limit_steps(engine, config, lambda: False) is None
    assert "schedule" not in vars(engine.scheduler)
    assert "update_from_output" not in vars(engine.scheduler)


def test_a_scheduler_that_can_be_limited_is() -> None:
    engine = make_engine()
    assert limit_steps(engine, TARGET, lambda: False) is not None
    assert "schedule" in vars(engine.scheduler)


def test_a_step_that_was_never_taken_in_is_forgotten() -> None:
    """Neither its time nor its end counts for the steps after it."""
    engine = settled(limited(make_engine()))
    engine.add("first", 2000, 1)
    before = engine.step()["first"]
    engine.scheduler.schedule()  # its worker failed
    engine.now_s += 100.0
    for _ in range(4):
        tokens = engine.step()
    assert tokens["first"] == pytest.approx(before, rel=0.15)
