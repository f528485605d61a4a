"""The named points of the migration protocol, and what can go wrong at each.

A point is an operation (core/messages.py) on its way to an instance, or its answer on the way back. A strike is a
fault at a point of one move.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from arriero.core.messages import Op

SENT, ANSWERED = "sent", "answered"


class Fault(StrEnum):
    """What happens at a point."""

    DELAY = "delay"  #: it comes late, sometimes after its sender has given up waiting
    DROP = "drop"  #: it never comes
    DUPLICATE = "duplicate"  #: it comes twice
    CUT = "cut"  #: from here on the link to the instance loses everything for a while, both ways
    CORRUPT = "corrupt"  #: bytes of the KV blocks that it speaks of change in shared memory
    KILL_SOURCE = "kill source"  #: SIGKILL; the operation or answer is lost too
    KILL_DESTINATION = "kill destination"
    KILL_BOTH = "kill both"
    KILL_ALL = "kill all"  #: no instance is left
    STOP_SOURCE = "stop source"  #: SIGSTOP, and SIGCONT after a while
    STOP_DESTINATION = "stop destination"
    STOP_BOTH = "stop both"
    HANG_UP = "hang up"  #: the client goes away
    DRAIN_SOURCE = "drain source"  #: the instance is told to move everything away and end
    DRAIN_DESTINATION = "drain destination"

    @property
    def verb(self) -> str:
        return self.value.split()[0]

    @property
    def victims(self) -> str:
        """Which instances it strikes: source, destination, both, all; empty for a fault of the link."""
        return self.value.partition(" ")[2] if self.verb in ("kill", "stop", "drain") else ""


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault at a point."""

    op: Op
    side: str  #: SENT or ANSWERED
    fault: Fault

    def __str__(self) -> str:
        return f"{self.fault} at {self.op} {self.side}"


def is_possible(strike: Strike) -> bool:
    """Bytes can only change once they are there: exported, and not yet imported for good."""
    if strike.fault is Fault.CORRUPT:
        return strike.side == ANSWERED and strike.op in (Op.COPY, Op.DETACH)
    return True


def every_strike(without: frozenset[Fault] = frozenset()) -> list[Strike]:
    """Every fault at every point."""
    strikes = itertools.starmap(Strike, itertools.product(Op, (SENT, ANSWERED), Fault))
    return [s for s in strikes if s.fault not in without and is_possible(s)]


def plan(count: int, rng: random.Random, without: frozenset[Fault] = frozenset()) -> Iterator[Strike]:
    """``count`` strikes: all of them in random order, and again, so that none is had twice before each was had once."""
    strikes = every_strike(without)
    rounds = (rng.sample(strikes, len(strikes)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(rounds), count)
