"""A request that moves while it runs gives the very tokens and logprobs, bit for bit, of one that stays.

Alone, in bf16 if the CPU computes it, and with prompts in the same parts each time: sizes of parts that fit a target
follow the measured speed, and sums of other sizes differ in their last bits, with and without a move.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from arriero.core.errors import ConflictError, NotFoundError, UnmovableError
from arriero.core.types import MigrationMode

from .conftest import Engines, Move

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

ENGINE_FLAGS = ("--itl-target-ms", "0")  # parts of 512 always
ENGINE_FLAGS += ("--max-num-batched-tokens", "512")  # whole steps of a long prompt take 20 s on a slow core

LIVE, STOP, RECOMPUTE = MigrationMode.LIVE, MigrationMode.STOP_AND_COPY, MigrationMode.RECOMPUTE


def sampling(**changes: Any) -> Any:
    from vllm.sampling_params import RequestOutputKind

    from vllm import SamplingParams

    base = {"max_tokens": 110, "temperature": 0.0, "ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
    return SamplingParams(**{**base, **changes})


def json_schema() -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    properties = {"name": {"type": "string", "minLength": 150}, "xs": {"type": "array", "items": {"type": "integer"}}}
    return StructuredOutputsParams(json={"type": "object", "properties": properties, "required": ["name", "xs"]})


def regex() -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(regex=r"([0-9]{3}-){60}END")


FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 1234},
    "seeded, top-k and penalties": {"temperature": 1.1, "top_k": 40, "seed": 5, "repetition_penalty": 1.2},
    "penalties": {"frequency_penalty": 0.6, "presence_penalty": 0.4, "repetition_penalty": 1.1},
    "logprobs": {"logprobs": 3},
    "min tokens": {"ignore_eos": False, "min_tokens": 80, "max_tokens": 100},
    "bad words and logit bias": {"bad_words": ["self", "the"], "logit_bias": {500: 2.0}},
    "prompt logprobs": {"prompt_logprobs": 1},
}


async def compare(engines: Engines, moves: list[Move], prompt: Any = None, **changes: Any) -> None:
    prompt = engines.prompt(400) if prompt is None else prompt
    stayed = await engines.run(prompt, sampling(**changes))
    await engines.forget_prefixes()
    moved = await engines.run(prompt, sampling(**changes), moves)
    assert [m.ok for m in moved.moves] == [True] * len(moves), [m.reason for m in moved.moves]
    assert moved.same_as(stayed)


@pytest.mark.parametrize("feature", FEATURES)
async def test_every_sampling_feature_survives_a_live_move(engines: Engines, feature: str) -> None:
    await compare(engines, [Move(30, 1)], **FEATURES[feature])


@pytest.mark.parametrize("grammar", [json_schema, regex])
async def test_a_grammar_goes_on_where_it_was(engines: Engines, grammar: Any) -> None:
    await compare(
        engines, [Move(30, 1), Move(60, 0)], engines.prompt(120), structured_outputs=grammar(), ignore_eos=False
    )


@pytest.mark.parametrize("mode", [LIVE, STOP])
async def test_a_context_of_many_blocks_arrives_whole(engines: Engines, mode: MigrationMode) -> None:
    await compare(engines, [Move(20, 1, mode)], engines.prompt(3000), max_tokens=50)


async def test_a_request_can_move_again_and_again(engines: Engines) -> None:
    moves = [Move(20, 1), Move(40, 0), Move(60, 1, STOP), Move(80, 0), Move(100, 1), Move(120, 0)]
    await compare(engines, moves, max_tokens=140, temperature=1.0, seed=77)


async def test_a_stop_string_that_spans_the_move_still_stops(engines: Engines) -> None:
    """The move starts a few tokens before the stop string, so that it lands before, in and after it."""
    whole = await engines.run(engines.prompt(400), sampling())
    stop = whole.text[len(whole.text) // 2 :][:16]
    await engines.forget_prefixes()
    stayed = await engines.run(engines.prompt(400), sampling(stop=[stop]))
    outcomes = []
    for lead in range(1, 10):
        await engines.forget_prefixes()
        moved = await engines.run(
            engines.prompt(400), sampling(stop=[stop]), [Move(max(1, len(stayed.tokens) - lead), 1)]
        )
        assert moved.same_as(stayed)
        outcomes += [m.ok for m in moved.moves]
    assert stayed.finish == ("stop", stop)
    assert True in outcomes


async def test_max_tokens_counts_output_tokens_of_both_instances(engines: Engines) -> None:
    run = await engines.run(engines.prompt(300), sampling(max_tokens=47), [Move(20, 1)])
    assert len(run.tokens) == 47
    assert run.finish == ("length", None)


async def test_a_request_may_end_at_any_step_of_its_move(engines: Engines) -> None:
    """The last token may fall before, in or after every stage; the stream is whole each time."""
    whole = await engines.run(engines.prompt(300), sampling(max_tokens=40))
    for max_tokens in range(21, 34):
        run = await engines.run(engines.prompt(300), sampling(max_tokens=max_tokens), [Move(20, 1)])
        assert run.tokens == whole.tokens[:max_tokens]
        assert run.finish == ("length", None)


async def test_a_client_may_leave_at_any_step_of_the_move(engines: Engines) -> None:
    """Wherever the abort falls, no side keeps anything (the leak check of every test)."""
    for delay_ms in (0, 2, 5, 10, 20, 30, 45, 60, 80, 100, 150):
        name = f"leaves-{delay_ms}"
        task = asyncio.create_task(engines.run(engines.prompt(1500), sampling(max_tokens=400), [Move(8, 1)], name))
        while (request_id := engines.internal_id(name)) is None or not engines.cluster.migrations.is_moving(request_id):
            await asyncio.sleep(0.002)
        await asyncio.sleep(delay_ms / 1e3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engines.assert_no_leaks()


async def test_a_recompute_continues_without_the_blocks(engines: Engines) -> None:
    run = await engines.run(engines.prompt(300), sampling(max_tokens=60), [Move(20, 1, RECOMPUTE)])
    assert [m.ok for m in run.moves] == [True], run.moves[0].reason
    assert run.moves[0].num_bytes == 0
    assert len(run.tokens) == 60


async def test_what_cannot_move_says_why_and_runs_on(engines: Engines) -> None:
    name = "stays"
    task = asyncio.create_task(engines.run(engines.prompt(200), sampling(max_tokens=80), name=name))
    while (request_id := engines.internal_id(name)) is None:
        await asyncio.sleep(0.005)
    here = engines.cluster.requests.find(request_id)[0].route
    with pytest.raises(ConflictError, match=f"runs on instance {here} already"):
        await engines.cluster.migrate(request_id, here)
    with pytest.raises(NotFoundError, match="instance 7 is unknown"):
        await engines.cluster.migrate(request_id, 7)
    with pytest.raises(NotFoundError, match="'nobody' is not running"):
        await engines.cluster.migrate("nobody", 1)
    request = engines.cluster.requests.get(request_id)
    assert request is not None
    object.__setattr__(request.facts, "unmovable", "a test says so")
    with pytest.raises(UnmovableError, match="a test says so"):
        await engines.cluster.migrate(request_id, 1 - here)
    assert len((await task).tokens) == 80
