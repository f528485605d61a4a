"""What the simulator knows of each request: where it is, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from arriero.core.types import InstanceId, RequestId
from arriero.sim.fast_sequence import FastSequence
from arriero.workload.workload import Arrival

NOWHERE: InstanceId = -1
"""Where a request is that no instance has."""


@dataclass(slots=True, eq=False)
class Record:
    """One request. Times in seconds of virtual time; -1: not yet."""

    request_id: RequestId
    arrival: Arrival
    dispatch_s: float = -1.0
    first_token_s: float = -1.0
    finish_s: float = -1.0
    instance: InstanceId = NOWHERE  #: the one whose tokens count
    num_output: int = 0  #: tokens delivered; counted when it ends
    num_preemptions: int = 0
    num_moves: int = 0
    num_replays: int = 0  #: instances that died under it
    num_kept: int = 0  #: tokens that it had as the last one died
    preemption_loss_s: float = 0.0  #: from each preemption to the next token
    paused_s: float = 0.0  #: last token before to first token after each move
    rejected: str = ""  #: why, if so
    preempted_s: float = -1.0  #: since when it waits for a token after a preemption
    left_s: float = -1.0  #: the last token before a move that has not shown a token yet

    @property
    def is_live(self) -> bool:
        """Whether an instance has been given it, and it goes on."""
        return self.dispatch_s >= 0 and self.finish_s < 0 and not self.rejected

    def heard(self, now: float) -> None:
        """An awaited token came."""
        if self.first_token_s < 0:
            self.first_token_s = now
        if self.preempted_s >= 0:
            self.preemption_loss_s += now - self.preempted_s
            self.preempted_s = -1.0
        if self.left_s >= 0:
            self.paused_s += now - self.left_s
            self.left_s = -1.0


@dataclass(slots=True, eq=False)
class TokenLog(Sequence[int]):
    """The token log of a request, of which only the length matters: every token is 0.

    It follows ``sequence``, of whose steps in flight ``num_steps_done`` have been delivered; ``num_before``
    are those that came before it.
    """

    sequence: FastSequence
    num_steps_done: Callable[[FastSequence], int]
    num_before: int = 0

    def follow(self, sequence: FastSequence) -> None:
        """From now on the tokens come from ``sequence``."""
        self.num_before, self.sequence = len(self), sequence

    def __len__(self) -> int:
        return max(self.num_before, self.sequence.num_output + self.num_steps_done(self.sequence))

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        return 0 if isinstance(places, int) else (0,) * len(places)
