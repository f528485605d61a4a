"""What a request's engine has noted for the client's statistics and not told yet: it moves with the request.

vLLM tells it with the next output token: when the request was queued, scheduled and preempted
(`vllm:request_queue_time_seconds`, `vllm:num_preemptions`), and where its prompt came from (`vllm:prompt_tokens`,
`cached_tokens` of the answer). A request that waits, or whose prompt is being computed, moves before that.
"""

from __future__ import annotations

from dataclasses import asdict

import msgspec

from arriero.vllm.compat import EngineCoreEvent, EngineCoreEventType, PrefillStats, Request


class _Untold(msgspec.Struct):
    """Times are ages: monotonic clocks of two hosts have nothing in common."""

    events: list[tuple[int, float]]  #: what happened, and for how many seconds that is past
    prompt: dict[str, int] | None  #: None: told with the first token


def pack_untold(request: Request, now: float) -> bytes:
    """All that ``request`` has not told; ``now`` in seconds of the monotonic clock."""
    prompt = request.prefill_stats
    events = [(int(event.type), now - event.timestamp) for event in request.events]
    return msgspec.msgpack.encode(_Untold(events, None if prompt is None else asdict(prompt)))


def unpack_untold(data: bytes, now: float) -> tuple[list[EngineCoreEvent], PrefillStats | None]:
    """The ``events`` and ``prefill_stats`` of a request that goes on here.

    Raises msgspec.DecodeError, ValueError or TypeError if ``data`` is nothing that :func:`pack_untold` gives.
    """
    untold = msgspec.msgpack.decode(data, type=_Untold)
    events = [EngineCoreEvent(EngineCoreEventType(kind), now - age_s) for kind, age_s in untold.events]
    return events, None if untold.prompt is None else PrefillStats(**untold.prompt)
