"""A request inside the simulated engine: what it asks for, how far it is, and what it yields."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import IntEnum

from arriero.core.types import Phase, RequestId


class FinishReason(IntEnum):
    """vLLM's values, and vLLM's words."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3
    REPETITION = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a request asks for."""

    request_id: RequestId
    prompt_token_ids: Tokens[int]
    max_tokens: int | None = None  #: None: up to the model's length
    min_tokens: int = 0
    seed: int | None = None  #: None: greedy
    priority: int = 0  #: lower number sooner
    arrival_s: float = 0.0  #: orders the queue; the client's clock
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_id: int | None = None
    ignore_eos: bool = False
    unmovable: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """One token of one request, at the end of a step."""

    request_id: RequestId
    token_id: int
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  #: the stop token that ended it


@dataclass(slots=True, eq=False)
class Sequence:
    """A job on its way. Only the engine and its batch change it."""

    job: Job
    output_token_ids: list[int] = field(default_factory=list)
    sampler: int | None = None
    num_computed: int = 0  #: KV entries that are written and settled
    num_scheduled: int = 0  #: tokens that the step in flight computes
    num_preemptions: int = 0
    phase: Phase = Phase.WAITING
    thaws_to: Phase | None = None  #: while frozen: where it came from
    place: tuple[float, ...] = ()  #: orders the waiting queue
    entry_number: int = 0  #: orders the running list

    @property
    def request_id(self) -> RequestId:
        return self.job.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.job.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, first: int, end: int) -> list[int]:
        """Tokens ``[first, end)`` of prompt and output."""
        num_prompt = len(self.job.prompt_token_ids)
        head = self.job.prompt_token_ids[first : min(end, num_prompt)] if first < num_prompt else ()
        return [*head, *self.output_token_ids[max(0, first - num_prompt) : max(0, end - num_prompt)]]
