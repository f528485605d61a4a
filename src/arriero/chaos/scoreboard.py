"""What became of each stream, and how long each fault was felt."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from arriero.bench.client import Reply, percentile
from arriero.bench.soak_requests import difference


class Verdict(StrEnum):
    """How a stream came out, seen from its client. The worse come later."""

    WHOLE = "whole"  #: to its end, and equal to the reference
    REFUSED = "refused"  #: no token came: an error status, or no connection
    ERROR = "error"  #: the server said that it failed after some tokens
    TRUNCATED = "truncated"  #: it just ended, or the connection broke
    HUNG = "hung"  #: nothing came any more until the client's patience ended
    WRONG = "wrong"  #: tokens are missing, doubled, or others


COLUMNS = {
    Verdict.WHOLE: "whole",
    Verdict.TRUNCATED: "truncated",
    Verdict.ERROR: "with errors",
    Verdict.REFUSED: "refused",
    Verdict.HUNG: "hung",
    Verdict.WRONG: "tokens wrong",
}


SETTLE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request of the load. Times in seconds of ``time.perf_counter()``."""

    case: int
    kind: str
    started_s: float
    ended_s: float
    verdict: Verdict
    detail: str | None
    num_tokens: int
    arrivals_s: Sequence[float] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without each token's time."""
        return {
            "case": self.case,
            "kind": self.kind,
            "started_s": round(self.started_s, 4),
            "ended_s": round(self.ended_s, 4),
            "verdict": self.verdict.value,
            "detail": self.detail,
            "num_tokens": self.num_tokens,
            "longest_silence_s": round(self.longest_silence_s, 4),
        }

    @property
    def longest_silence_s(self) -> float:
        """Between two chunks."""
        return max((b - a for a, b in itertools.pairwise(self.arrivals_s)), default=0.0)


@dataclass(slots=True, kw_only=True)
class Struck:
    """A fault that was carried out, or why not."""

    action: str
    target: str
    at_s: float
    skipped: str | None = None
    num_up: int = 0  #: backends that were up, the one that was struck among them
    detection_s: float | None = None  #: from a SIGKILL until the server knew, if it says
    felt_s: float | None = None  #: see :func:`recovery_s`

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {k: v for k, v in found.items() if v is not None or k == "skipped"}


def judge(reply: Reply, reference: Reply, *, hung: bool = False) -> tuple[Verdict, str | None]:
    """A finished reply beside the one that nothing disturbed."""
    departs = difference(reply, reference, is_cut=True)
    if departs is not None:
        return Verdict.WRONG, departs
    if hung:
        return Verdict.HUNG, f"no end, {reply.num_tokens} tokens"
    if reply.error is not None:
        if not reply.arrivals_s:
            return Verdict.REFUSED, reply.error
        return (Verdict.TRUNCATED if is_broken(reply.error) else Verdict.ERROR), reply.error
    if "error" in {c.finish_reason for c in reply.choices.values()}:
        return Verdict.ERROR, "finish reason error"
    if not reply.is_complete or not reply.choices or any(c.finish_reason is None for c in reply.choices.values()):
        return Verdict.TRUNCATED, f"it ended after {reply.num_tokens} tokens without saying so"
    departs = difference(reply, reference)
    return (Verdict.WHOLE, None) if departs is None else (Verdict.WRONG, departs)


def is_broken(error: str) -> bool:
    """Whether the client's own library says that the connection broke, rather than the server that it failed."""
    return error.startswith(("Client", "Server"))


def recovery_s(at_s: float, until_s: float, outcomes: Iterable[Outcome]) -> float:
    """How long a fault at ``at_s`` was felt: the longest silence after it in a stream that was under way; or until such
    a stream had ended in another way than whole, or a request that came later, but before ``until_s``, the next fault.
    """
    felt = 0.0
    for outcome in outcomes:
        is_whole = outcome.verdict is Verdict.WHOLE
        if outcome.started_s <= at_s < outcome.ended_s:
            felt = max(felt, silence_s(outcome, at_s) if is_whole else outcome.ended_s - at_s)
        elif at_s < outcome.started_s < until_s and not is_whole:
            felt = max(felt, min(outcome.ended_s, until_s) - at_s)
    return felt


def measure(done: Sequence[Struck], outcomes: Iterable[Outcome]) -> None:
    """Note how long each of these faults, in their order, was felt."""
    ends = [f.at_s for f in done[1:]] + [float("inf")]
    for fault, end in zip(done, ends, strict=True):
        fault.felt_s = recovery_s(fault.at_s, end, outcomes)


def silence_s(outcome: Outcome, at_s: float) -> float:
    """The longest silence after ``at_s`` that began at once; a chunk may have been on its way to the client."""
    times = [at_s, *(t for t in outcome.arrivals_s if t > at_s)]
    return max((b - a for a, b in itertools.pairwise(times) if a <= at_s + SETTLE_S), default=0.0)


def failed_after(faults: Sequence[Struck], outcomes: Iterable[Outcome]) -> int:
    """Requests that failed without having been under way at any fault."""
    moments = [f.at_s for f in faults if f.skipped is None]
    return sum(
        outcome.verdict is not Verdict.WHOLE and not any(outcome.started_s <= t < outcome.ended_s for t in moments)
        for outcome in outcomes
    )


def row(system: str, faults: Sequence[Struck], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A line of the scoreboard."""
    done = [f for f in faults if f.skipped is None]
    measure(done, outcomes)
    felt = [f.felt_s for f in done if f.felt_s is not None]
    verdicts = Counter(o.verdict for o in outcomes)
    counts = Counter(f.action for f in done)
    return {
        "system": system,
        "faults": " ".join(f"{action} {count}" for action, count in sorted(counts.items())) or "none",
        "streams": len(outcomes),
        **{column: verdicts[verdict] for verdict, column in COLUMNS.items()},
        "failed after": failed_after(faults, outcomes),
        "recovery P50 s": percentile(felt, 50.0),
        "recovery P99 s": percentile(felt, 99.0),
        "longest silence s": max((o.longest_silence_s for o in outcomes if o.verdict is Verdict.WHOLE), default=0.0),
    }


def upright(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scoreboard with a column for each system: there are more figures than systems."""
    return [
        {"": key, **{row["system"]: row[key] for row in rows}} for key in (rows[0] if rows else {}) if key != "system"
    ]
