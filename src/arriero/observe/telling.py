"""Events in words, for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]


def tell(event: Event) -> str:
    """What an event of a request means, in a line."""
    known = _WORDS.get(event["event"])
    return known(event) if known is not None else str(event["event"]).replace("_", " ")


def _reject(event: Event) -> str:
    return f"refused: {event['reason']}"


def _queue(event: Event) -> str:
    return f"waits for an instance, in a line of {event['num_queued']}: none can start it now"


def _dispatch(event: Event) -> str:
    what = f"goes to instance {event['instance']} ({event['reason']})"
    others = [a for a in event.get("alternatives", ()) if a["instance"] != event["instance"]]
    if not others:
        return what
    return f"{what}, not to " + ", ".join(
        f"{a['instance']} (freeness {_figure(a['freeness'])}, {a['num_outstanding']} requests)" for a in others
    )


def _first_token(event: Event) -> str:
    return f"first token from instance {event['instance']}, {event['ttft_s']:.3f} s after it arrived"


def _preempt(event: Event) -> str:
    what = f"preempted: instance {event['instance']} has taken its KV blocks, and will prefill it again"
    if not event.get("avoidable"):
        return what
    return (
        f"{what}; a request of {event['smallest_blocks']} blocks could have moved from there to instance "
        f"{event['roomiest']}, where {event['free_blocks']} were free"
    )


def _migration(event: Event) -> str:
    to, cause = event["destination"], event["cause"]
    what = f"from instance {event['source']} to {to}, {event['mode']} ({cause})"
    if event["source"] is None:
        what = f"to instance {to}, from its tokens ({cause})"
    if not event["ok"]:
        return f"was not moved {what}: {event['reason']}"
    moved = f"{event['num_bytes'] / 2**20:.1f} MiB in {event['num_stages']} stages" if event["num_bytes"] else "no copy"
    return f"moved {what}: {moved}, {1e3 * event['total_s']:.0f} ms"


def _resume(event: Event) -> str:
    return f"goes on at instance {event['instance']}: its stream was silent for {1e3 * event['pause_s']:.0f} ms"


def _finish(event: Event) -> str:
    return f"ended ({event['how']}) with {event['num_output_tokens']} tokens"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


_WORDS: dict[str, Callable[[Event], str]] = {
    "reject": _reject,
    "queue": _queue,
    "dispatch": _dispatch,
    "first_token": _first_token,
    "preempt": _preempt,
    "migration": _migration,
    "resume": _resume,
    "finish": _finish,
}
