"""What a :class:`~arriero.sim.fast_engine.FastEngine` knows of a request and of the steps in flight."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.core.types import Phase, RequestId
from arriero.sim.prefix_cache import Share


@dataclass(slots=True, eq=False)
class FastSequence:
    """A request inside a :class:`FastEngine`; only the engine and its port change it."""

    request_id: RequestId
    num_prompt: int
    num_wanted: int  #: output tokens after which it ends
    priority: int = 0
    arrival_s: float = 0.0
    num_output: int = 0
    num_computed: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    phase: Phase = Phase.WAITING
    thaws_to: Phase | None = None
    place: tuple[float, ...] = ()
    entry_number: int = 0
    awaited: bool = True  #: the simulator wants to hear of its next token
    left_s: float = -1.0  #: its last token here, if it was decoding when a migration froze it
    share: Share | None = None  #: of the prefix cache, where there is one

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return self.num_prompt + self.num_output


@dataclass(slots=True)
class Segment:
    """Steps in flight. Several only if all of them decode ``chunks`` and nothing else."""

    ends: list[float]  #: when each step ends
    chunks: list[tuple[FastSequence, int]]  #: sequence, new tokens in a step
    num_prompt_tokens: int = 0  #: of the step
    num_reported: int = 0  #: steps whose snapshots have been dealt with
