"""The requests of the soak, of every kind, and what their answers must be."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arriero.bench.client import CHAT, COMPLETIONS, Reply, random_prompt
from arriero.bench.server import SERVED_NAME

LOGPROB_TOLERANCE = 1e-4

Body = dict[str, Any]


# ---------------------------------------------------------------------- the requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request. ``hang_up_after`` tokens the client leaves (in the moved run only)."""

    kind: str
    path: str
    body: Body
    hang_up_after: int | None = None


def make_cases(count: int, seed: int) -> list[Case]:
    """``count`` requests, all kinds in turn; the same for the same seed."""
    rng = random.Random(seed)
    return [_make_case(kind, rng) for kind, _ in zip(itertools.cycle(KINDS), range(count), strict=False)]


def _make_case(kind: str, rng: random.Random) -> Case:
    path, special = KINDS[kind](rng)
    body = {
        "model": SERVED_NAME,
        "max_tokens": rng.randint(40, 120),
        "temperature": 0.0,
        "return_token_ids": True,
        "stream": rng.random() < 0.7,
        **special,
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    return Case(kind=kind, path=path, body=body, hang_up_after=rng.randint(5, 40) if kind == "hang_up" else None)


def _completion(rng: random.Random, **special: Any) -> tuple[str, Body]:
    return COMPLETIONS, {"prompt": random_prompt(rng, rng.randint(8, 400)), "ignore_eos": True, **special}


def _chat(rng: random.Random, **special: Any) -> tuple[str, Body]:
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60)))
    return CHAT, {"messages": [{"role": "user", "content": f"Tell a story with these words: {words}."}], **special}


def _sampled(rng: random.Random) -> Body:
    return {"temperature": rng.choice((0.7, 1.0)), "top_p": 0.95, "seed": rng.randrange(1 << 30)}


def _json(rng: random.Random) -> tuple[str, Body]:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 120, "maxLength": 240}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    return _chat(rng, response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}})


WORDS = ("llama", "mountain", "rope", "saddle", "river", "stone", "bread", "wind", "market", "letter", "bridge", "lamp")

KINDS: dict[str, Callable[[random.Random], tuple[str, Body]]] = {
    "greedy": _completion,
    "seeded": lambda rng: _completion(rng, **_sampled(rng)),
    "chat": _chat,
    "chat_seeded": lambda rng: _chat(rng, **_sampled(rng)),
    "json_schema": _json,
    "logprobs": lambda rng: _completion(rng, logprobs=2),
    "chat_logprobs": lambda rng: _chat(rng, logprobs=True, top_logprobs=2),
    "penalties": lambda rng: _completion(
        rng, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.1, **_sampled(rng)
    ),
    "parallel": lambda rng: _completion(rng, n=2, **_sampled(rng)),
    "stop": lambda rng: _completion(rng, stop=["e", " the"], min_tokens=30, max_tokens=120),
    "hang_up": _completion,
}


# ---------------------------------------------------------------------- answers


def fault(case: Case, reply: Reply) -> str | None:
    """Why the answer is not whole; None if it is."""
    choices = list(reply.choices.values())
    if reply.error is not None:
        return reply.error
    if not reply.is_complete or len(choices) != case.body.get("n", 1):
        return f"it ended after {reply.num_tokens} tokens in {len(choices)} sequences"
    if any(c.finish_reason not in ("stop", "length") for c in choices):
        return f"finish reasons {[c.finish_reason for c in choices]}"
    if reply.usage_tokens != reply.num_tokens:
        return f"{reply.num_tokens} tokens came, the server counts {reply.usage_tokens}"
    return None


def difference(reply: Reply, reference: Reply, *, is_cut: bool = False) -> str | None:
    """How an answer departs from its reference; None if it does not. ``is_cut``: a beginning of it will do."""
    for index, wanted in sorted(reference.choices.items()):
        got = reply.choices.get(index)
        if got is None:
            if is_cut:
                continue
            return f"sequence {index} is missing"
        size = len(got.token_ids) if is_cut else len(wanted.token_ids)
        if got.token_ids != wanted.token_ids[:size]:
            same, came = _num_common(got.token_ids, wanted.token_ids), len(got.token_ids)
            return f"sequence {index}: {same} tokens are equal, {came} came, the reference has {len(wanted.token_ids)}"
        if not (wanted.text.startswith(got.text) if is_cut else got.text == wanted.text):
            return f"sequence {index}: the tokens are equal, the text is not"
        if not is_cut and got.finish_reason != wanted.finish_reason:
            return f"sequence {index}: finish reason {got.finish_reason}, not {wanted.finish_reason}"
        if not is_cut and len(got.logprobs) != len(wanted.logprobs):
            return f"sequence {index}: {len(got.logprobs)} logprobs, not {len(wanted.logprobs)}"
        pairs = zip(got.logprobs, wanted.logprobs, strict=False)
        if far := [f"{a} for {b}" for a, b in pairs if not abs(a - b) <= LOGPROB_TOLERANCE]:
            return f"sequence {index}: {len(far)} logprobs differ, the first is {far[0]}"
    return None


def _num_common(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
