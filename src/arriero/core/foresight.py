"""Late binding for who knows the future: how long each request will run, and who arrives within a horizon.

In a server nobody can know that. The simulator does, and tells it (``GlobalScheduler.foretold``): so the policy
`clairvoyant` shows how far the others are from the possible.
"""

from __future__ import annotations

import math
from statistics import median

from arriero.core.binding import LateBinding
from arriero.core.config import QueueingConfig
from arriero.core.types import Dispatchable, InstanceId, RequestId
from arriero.core.view import ClusterView

SMALL_SHARE = 0.1
"""Of an instance's memory: whose prompt takes less finds a place without one that is kept, unless it is urgent."""


class Foresight(LateBinding):
    """A request may start where memory suffices for the horizon: what would be lacking later, migrations can still
    move. For one that is foretold, and that no instance will have room for as it comes, an instance is kept in advance,
    and requests move away from there. Whoever waits meanwhile may take the place over.
    """

    def __init__(self, config: QueueingConfig) -> None:
        super().__init__(config)
        self._foretold: dict[RequestId, tuple[Dispatchable, float]] = {}

    def foretell(self, request: Dispatchable, arrives_s: float) -> None:
        """``request`` will arrive at ``arrives_s``."""
        self._foretold[request.request_id] = request, arrives_s

    def forget(self, request_id: RequestId, view: ClusterView) -> None:
        """The request waits no more; one that was foretold begins to: what is kept for it stays its own."""
        if self._foretold.pop(request_id, None) is None:
            super().forget(request_id, view)

    def reserve(self, view: ClusterView, now: float) -> None:
        """Keep instances for those that are foretold, the most urgent and soonest first, as far as they may be kept."""
        step_s, known = _step_s(view), [i for i in view.candidates if i in view.snapshots]
        if not known:
            return
        largest = max(known, key=lambda i: view.snapshots[i].num_blocks)
        for request, arrives_s in sorted(self._foretold.values(), key=lambda told: (told[0].priority, told[1])):
            if request.priority >= 0 and self._is_small(request, view, largest):
                continue
            own = self._earmarked.get(request.request_id)
            if own is not None and not view.is_candidate(own):
                super().forget(request.request_id, view)
            elif own is not None:
                continue
            if not self._has_share_left(view):
                return
            first = int(max(0.0, arrives_s - now) / step_s) if step_s else 0
            peaks = [(self._peak(view, i, request, first), i) for i in known if i not in view.earmarks]
            if peaks and (best := min(peaks))[0] > view.snapshots[best[1]].num_blocks:
                self._earmarked[request.request_id] = best[1]
                view.earmark(best[1], self._demand(request, view, best[1]))

    def _is_small(self, request: Dispatchable, view: ClusterView, instance: InstanceId) -> bool:
        return self._demand(request, view, instance) < SMALL_SHARE * view.snapshots[instance].num_blocks

    def _blocks_left(self, view: ClusterView, instance: InstanceId, free: float, batch: int) -> float:
        return view.snapshots[instance].num_blocks - self._peak(view, instance)

    def _fits(self, request: Dispatchable, view: ClusterView, instance: InstanceId, room: float) -> bool:
        snapshot = view.snapshots.get(instance)
        if snapshot is None:
            return super()._fits(request, view, instance, room)
        return not math.isinf(room) and self._peak(view, instance, request) <= snapshot.num_blocks

    def _peak(self, view: ClusterView, instance: InstanceId, more: Dispatchable | None = None, first: int = 0) -> int:
        """The most blocks within the horizon, or, with ``more``, in as much of it as that runs."""
        step_s, horizon_s = _step_s(view), self._config.horizon_s
        num_steps = math.inf if more is None else more.max_tokens
        if horizon_s and step_s:
            num_steps = min(num_steps, horizon_s / step_s)
        return peak_blocks(view, instance, more, first, num_steps)


def _step_s(view: ClusterView) -> float:
    """How long a step takes, in the middle of the instances; 0 if no step is known."""
    return median([s.step_s for s in view.snapshots.values() if s.step_s] or [0.0])


def peak_blocks(
    view: ClusterView,
    instance: InstanceId,
    more: Dispatchable | None = None,
    first: int = 0,
    num_steps: float = math.inf,
) -> int:
    """The most blocks that the instance's requests will hold at a time if all of them run from now on, a token a step,
    and end at their ``max_tokens``; a partial block each included. ``more`` comes at step ``first``: what counts is the
    ``num_steps`` from then on.
    """
    snapshot = view.snapshots[instance]
    ends: list[tuple[int, int]] = []  # (tokens to come, tokens now)
    for seen in snapshot.requests:
        facts = view.ledger.facts_of(seen.request_id)
        left = facts.num_prompt_tokens + facts.max_tokens - seen.num_tokens if facts is not None else 0
        ends.append((max(1, left), seen.num_tokens))
    ends += [(r.max_tokens, r.num_prompt_tokens) for r in view.ledger.pending(instance)]
    if first:
        ends = [(left - first, tokens + first) for left, tokens in ends if left > first]
    if more is not None:
        ends.append((more.max_tokens, more.num_prompt_tokens))
    ends.sort()
    now, peak = sum(tokens for _, tokens in ends), 0
    for number, (left, tokens) in enumerate(ends):
        num_alive = len(ends) - number
        peak = max(peak, -(-(now + num_alive * int(min(left, num_steps))) // snapshot.block_size) + num_alive)
        if left > num_steps:
            break
        now -= tokens
    return peak
