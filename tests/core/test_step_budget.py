"""The budget of a step: from what steps took, as many prompt tokens as fit beside the decodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.config import StepConfig
from arriero.core.errors import ConfigError
from arriero.core.step_budget import StepBudget

seconds = st.floats(1e-4, 2.0)
steps = st.lists(st.tuples(st.integers(0, 4096), seconds), max_size=40)


def told(config: StepConfig, *seen: tuple[int, float], has_moves: bool = False) -> StepBudget:
    """A budget that has seen steps: (prompt tokens, seconds)."""
    budget = StepBudget(config, lambda: has_moves)
    for step in seen:
        budget.step_ended(*step)
    return budget


@given(steps, st.floats(0.01, 3.0))
def test_where_nobody_waits_prompts_may_take_longer(seen: list[tuple[int, float]], longer_s: float) -> None:
    config = StepConfig(itl_target_s=0.2, prompt_step_s=longer_s)
    alike = StepConfig(itl_target_s=max(0.2, longer_s))
    assert told(config, *seen).prompt_tokens(0) == told(alike, *seen).prompt_tokens(4)


def test_prompts_that_nobody_waits_for_get_a_second() -> None:
    budget = told(StepConfig(), (0, 0.05), (100, 0.15))  # 50 ms of decodes, 1 ms a prompt token
    assert budget.prompt_tokens(0) == pytest.approx(950, abs=1)


@given(steps, st.integers(0, 64), st.booleans())
def test_without_a_target_prompts_take_the_whole_step(
    seen: list[tuple[int, float]], num_decodes: int, has_moves: bool
) -> None:
    assert told(StepConfig(itl_target_s=0), *seen, has_moves=has_moves).prompt_tokens(num_decodes) is None


@given(st.lists(seconds, max_size=5))
def test_before_a_prompt_was_computed_nothing_is_known_and_nothing_limited(decodes: list[float]) -> None:
    assert told(StepConfig(), *((0, s) for s in decodes)).prompt_tokens(4) is None


@given(steps, st.integers(1, 64), st.integers(1, 300))
def test_prompts_are_never_starved(seen: list[tuple[int, float]], num_decodes: int, least: int) -> None:
    limit = told(StepConfig(least_prompt_tokens=least), *seen).prompt_tokens(num_decodes)
    assert limit is None or limit >= least


def test_prompts_get_what_the_decodes_leave_of_the_target() -> None:
    budget = told(StepConfig(itl_target_s=0.2), (0, 0.05), (100, 0.15))  # 50 ms of decodes, 1 ms a prompt token
    assert budget.prompt_tokens(4) == pytest.approx(150, abs=1)


@given(steps)
def test_a_move_waits_no_longer_for_a_step_than_a_stream(seen: list[tuple[int, float]]) -> None:
    assert told(StepConfig(), *seen, has_moves=True).prompt_tokens(0) == told(StepConfig(), *seen).prompt_tokens(4)


def test_where_decodes_take_most_of_the_target_prompts_take_a_multiple_of_their_time() -> None:
    for ratio in (1.0, 3.0):
        budget = told(StepConfig(itl_target_s=0.2, prompts_to_decodes=ratio), (0, 0.3), (100, 0.4))
        assert budget.prompt_tokens(4) == pytest.approx(300 * ratio, abs=1)


@given(st.floats(0.002, 0.09), st.floats(1e-4, 3e-3), st.floats(0.1, 0.5))
def test_steps_that_follow_the_budget_take_the_target(decode_s: float, token_s: float, target_s: float) -> None:
    budget = told(StepConfig(itl_target_s=target_s), (0, decode_s), (2048, 2 * (decode_s + 2048 * token_s)))
    took = 0.0
    for _ in range(200):
        limit = budget.prompt_tokens(4)
        assert limit is not None
        took = decode_s + limit * token_s
        budget.step_ended(limit, took)
    aim_s = max(target_s, (1 + StepConfig().prompts_to_decodes) * decode_s)
    assert aim_s - 2 * token_s - 1e-3 <= took
    assert took <= max(aim_s, decode_s + StepConfig().least_prompt_tokens * token_s) + 1e-3


def test_a_model_that_slows_down_is_followed() -> None:
    budget = told(StepConfig(prompts_to_decodes=1), (0, 0.05), *[(100, 0.1)] * 50)
    before = budget.prompt_tokens(4)
    for _ in range(100):
        budget.step_ended(0, 0.1)
        budget.step_ended(100, 0.3)
    after = budget.prompt_tokens(4)
    assert before is not None
    assert after is not None
    assert after == pytest.approx(50, abs=2)
    assert after < before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("itl_target_s", -0.1),
        ("itl_target_s", float("nan")),
        ("prompts_to_decodes", 0),
        ("prompt_step_s", 0),
        ("least_prompt_tokens", 0),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        StepConfig(**{field: value})  # type: ignore[arg-type]
