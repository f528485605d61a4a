"""What the owner of a request says to an instance's llumlet, and what comes back.

One dataclass an operation; every answer is an :class:`Answer`. All operations are idempotent:
asking again is the way to learn the outcome of a lost answer. Block ranges are half open and
count the request's own blocks from its first token: ``[first, end)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from arriero.core.types import MigrationId, Phase, RequestId


class Op(StrEnum):
    """Operation names, as they appear in answers, logs and fault scripts."""

    LOCATE = "locate"
    RESERVE = "reserve"
    COPY = "copy"
    LOAD = "load"
    EXPECT = "expect"
    DETACH = "detach"
    COMMIT = "commit"
    RELEASE = "release"
    RESUME = "resume"
    DROP = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Base of all operations."""

    migration_id: MigrationId
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Locate(Message):
    """To the source: where does the request stand, and can it move?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve(Message):
    """To the destination: allocate blocks for ``num_tokens`` tokens (0: only a place in the queue).

    The request itself was parked there before (an ADD that is not scheduled).
    """

    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy(Message):
    """To the source: export full, settled blocks from ``first`` on while the request runs."""

    first: int
    epoch: int  #: the request's preemption count as last seen; -1: not seen yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Message):
    """To the destination: grow the reservation and import ``[first, end)`` from ``ticket``."""

    first: int
    end: int
    ticket: Any
    known: int  #: output tokens that the destination has been told before
    output_token_ids: tuple[int, ...] = ()  #: the next ones, so that the pause need not carry them


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect(Message):
    """To the destination, together with DETACH: when COMMIT is due. A hint; may be lost or late."""

    due_s: float  #: on the destination's monotonic clock: messages wait for the end of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Detach(Message):
    """To the source: leave the batch, settle, export the rest from ``first`` on, hand over.

    ``with_blocks`` false: hand over without KV (recompute, or nothing computed yet).
    """

    first: int
    epoch: int
    with_blocks: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(Message):
    """To the destination: import the rest and continue at exactly the next token."""

    first: int
    end: int
    ticket: Any
    known: int
    output_token_ids: tuple[int, ...]
    num_output_tokens: int  #: in all; must agree with known + len(output_token_ids)
    num_computed_tokens: int  #: 0: recompute
    sampler_state: bytes | None = None  #: None: none, or rebuild from the seed
    untold: bytes = b""  #: what the client's statistics are still to be told, as the engine packed it; empty: a replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Message):
    """To the source: the request lives elsewhere now (or its client is gone); free it silently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(Message):
    """To the source: this migration is over and the request stays; unfreeze it if frozen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop(Message):
    """To the destination: forget the reservation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Answer to one operation. ``ok`` false: refused, ``reason`` says why in a word or two."""

    migration_id: MigrationId
    op: Op
    ok: bool = True
    reason: str = ""
    phase: Phase | None = None  #: LOCATE
    num_tokens: int = 0  #: LOCATE, COPY: prompt + output so far
    block_size: int = 0  #: LOCATE
    epoch: int = -1  #: LOCATE, COPY
    ready: bool = True  #: RESERVE: grammar compiled, adapter loaded
    first: int = 0  #: COPY, DETACH: exported blocks [first, end)
    end: int = 0
    settled_blocks: int = 0  #: COPY: full blocks that were ready to export
    ticket: Any = None  #: COPY, DETACH: what the block transport needs to import them
    num_bytes: int = 0  #: COPY, LOAD, DETACH, COMMIT
    copy_s: float = 0.0  #: COPY, LOAD, DETACH, COMMIT: seconds spent copying
    num_output_tokens: int = 0  #: DETACH
    num_computed_tokens: int = 0  #: DETACH
    sampler_state: bytes | None = None  #: DETACH
    untold: bytes = b""  #: DETACH


Reply = Callable[[Answer], None]

OPERATIONS: dict[type[Message], Op] = {
    Locate: Op.LOCATE,
    Reserve: Op.RESERVE,
    Copy: Op.COPY,
    Load: Op.LOAD,
    Expect: Op.EXPECT,
    Detach: Op.DETACH,
    Commit: Op.COMMIT,
    Release: Op.RELEASE,
    Resume: Op.RESUME,
    Drop: Op.DROP,
}


def refusal(message: Message, reason: str) -> Answer:
    """The answer that says no to ``message``."""
    return Answer(migration_id=message.migration_id, op=OPERATIONS[type(message)], ok=False, reason=reason)
