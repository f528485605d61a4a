"""What no policy can better, from the workload and the step-time model alone."""

from __future__ import annotations

from collections.abc import Iterable

from arriero.sim.profiles import Profile
from arriero.workload.workload import Arrival


def idle_request_s(arrivals: Iterable[Arrival], profile: Profile) -> float:
    """Mean request latency, in seconds, if each request had an idle instance to itself."""
    times_s = [_alone_ms(a.prompt_tokens, a.output_tokens, profile) / 1000 for a in arrivals]
    return sum(times_s) / len(times_s)


def _alone_ms(prompt: int, output: int, profile: Profile) -> float:
    """Prefill in one step, then a step a token; the time of a decode step is linear in the context."""
    model = profile.step_time
    first, last = model.step_ms([], 1, prompt + 1), model.step_ms([], 1, prompt + output - 1)
    return model.step_ms([(prompt, 0)], 0, 0) + (output - 1) * (first + last) / 2


def least_instance_hours(arrivals: Iterable[Arrival], profile: Profile) -> float:
    """Instance-hours if instances always ran with full memory, and lasted only as long as there was work.

    A decode step reads the weights once for all who run, and ``kv_tokens`` of context fit into one: so a request of
    context C costs C / kv_tokens of that reading in each step, besides what is its own.
    """
    model, total_ms = profile.step_time, 0.0
    fixed_ms = model.step_ms([], 0, 0)
    for arrival in arrivals:
        prompt, num_steps = arrival.prompt_tokens, arrival.output_tokens - 1
        context = num_steps * (prompt + arrival.output_tokens / 2)  # summed over the steps
        own_ms = model.d * num_steps + model.e * context + model.b * prompt + model.c * prompt**2 / 2
        total_ms += model.scale * own_ms + fixed_ms * context / profile.kv_tokens
    return total_ms / 3.6e6
