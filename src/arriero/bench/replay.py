"""A workload sent to a server at its own times, whatever the server does (open loop), and what each client saw.

One asyncio process holds every client. Prompts are words that are one token each, so that a server gets text, as
routers that look at it expect, and still exactly the number of tokens that the workload says.
"""

from __future__ import annotations

import asyncio
import functools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

from arriero.bench.client import COMPLETIONS, Call, Client, Reply, decode_body, percentile
from arriero.core.errors import ArrieroError, ConfigError
from arriero.workload.workload import Arrival, Workload

LEAD_S = 0.2  #: from the call to arrival 0
END_TIMEOUT_S = 240.0  #: after the last arrival
_WORD = re.compile("[Ġ▁][a-z]{3,9}")  # a blank and letters, in the spelling of byte-level BPE and of sentencepiece


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the client of one request saw; times in seconds.

    ``silence_s`` is the longest time between two chunks of its stream, 0 with one chunk; ``late_s`` how late it was
    sent, which counts in no latency.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    late_s: float
    ttft_s: float
    tpot_s: float
    silence_s: float
    e2e_s: float
    silence_at_s: float  #: when the longest silence began, on the workload's clock


class Prompts:
    """Texts of as many tokens as asked for, of random words: no two share a prefix worth caching."""

    def __init__(self, model: str, rng: random.Random) -> None:
        self._words = _words_of(model)
        self._rng = rng

    def text(self, num_tokens: int) -> str:
        """A prompt of ``num_tokens`` tokens."""
        return "".join(self._rng.choices(self._words, k=num_tokens))


@functools.cache
def _words_of(model: str) -> list[str]:
    from transformers import AutoTokenizer  # takes seconds to import

    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    words = sorted(" " + token[1:] for token in vocabulary if _WORD.fullmatch(token))
    if len(words) < 1000:
        raise ConfigError(f"model {model}: {len(words)} plain words in its vocabulary, too few for prompts")
    return words


def completion(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """A greedy streamed completion of exactly ``max_tokens`` tokens that says how many tokens it was."""
    return {**decode_body(model, prompt, max_tokens), "stream_options": {"include_usage": True}}


async def replay(client: Client, model: str, arrivals: Sequence[Arrival], prompts: Prompts) -> list[Seen]:
    """Send ``arrivals`` at their times and wait for all answers. Raises ArrieroError if one is not whole."""
    bodies = [completion(model, prompts.text(a.prompt_tokens), a.output_tokens) for a in arrivals]
    zero_s = perf_counter() + LEAD_S
    calls: list[Call] = []
    try:
        for arrival, body in zip(arrivals, bodies, strict=True):
            await asyncio.sleep(max(0.0, zero_s + arrival.arrival_s - perf_counter()))
            calls.append(client.start(COMPLETIONS, body))
        async with asyncio.timeout(END_TIMEOUT_S):
            replies = [await call.finish() for call in calls]
    except TimeoutError as error:
        left = sum(call.is_running for call in calls)
        raise ArrieroError(f"{left} of {len(calls)} answers were not whole {END_TIMEOUT_S} s after the end") from error
    finally:
        await asyncio.gather(*(call.cancel() for call in calls if call.is_running))
    return [_seen(a, reply, zero_s) for a, reply in zip(arrivals, replies, strict=True)]


def _seen(arrival: Arrival, reply: Reply, zero_s: float) -> Seen:
    if reply.error or not reply.is_complete or reply.num_tokens != arrival.output_tokens:
        raise ArrieroError(
            f"the answer to the request of {arrival.arrival_s:.3f} s has {reply.num_tokens} of "
            f"{arrival.output_tokens} tokens: {reply.error or 'the stream was cut'}"
        )
    times = [chunk.time_s for chunk in reply.chunks]
    silence_s, began_s = max(((b - a, a) for a, b in pairwise(times)), default=(0.0, times[0]))
    return Seen(
        arrival_s=arrival.arrival_s,
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=reply.num_tokens,
        late_s=reply.started_s - zero_s - arrival.arrival_s,
        ttft_s=reply.ttft_s,
        tpot_s=reply.tpot_s,
        silence_s=silence_s,
        e2e_s=times[-1] - reply.started_s,
        silence_at_s=began_s - zero_s,
    )


def capped(workload: Workload, longest_prompt: int, longest_output: int) -> Workload:
    """Prompts and outputs cut to so many tokens; no prefixes."""

    def cut(a: Arrival) -> Arrival:
        prompt, output = min(a.prompt_tokens, longest_prompt), min(a.output_tokens, longest_output)
        return replace(a, prompt_tokens=prompt, output_tokens=output, prefix_blocks=())

    return Workload(workload.name, [cut(a) for a in workload.arrivals])


def scaled(workload: Workload, factor: float) -> Workload:
    """Prompts and outputs of ``factor`` times as many tokens, at least one."""

    def size(a: Arrival) -> Arrival:
        prompt, output = (max(1, round(factor * tokens)) for tokens in (a.prompt_tokens, a.output_tokens))
        return replace(a, prompt_tokens=prompt, output_tokens=output)

    return Workload(workload.name, [size(a) for a in workload.arrivals])


def at_rate(workload: Workload, rate: float) -> Workload:
    """The same pattern of arrivals from time 0 on, stretched to ``rate`` requests a second on average."""
    times = [a.arrival_s - workload.arrivals[0].arrival_s for a in workload.arrivals]
    if len(times) < 2 or times[-1] <= 0:
        raise ConfigError(f"workload {workload.name}: {len(times)} arrivals at one time have no rate to stretch")
    factor = (len(times) - 1) / rate / times[-1]
    return Workload(
        workload.name, [replace(a, arrival_s=t * factor) for a, t in zip(workload.arrivals, times, strict=True)]
    )


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, P50 and P99."""
    found = list(values)
    return {
        "mean": sum(found) / len(found) if found else float("nan"),
        "p50": percentile(found, 50),
        "p99": percentile(found, 99),
    }
