"""The pace of each instance's steps and its clock, as seen from outside: when will its next step end?"""

from __future__ import annotations

from arriero.core.types import InstanceId

_WEIGHT = 0.2  # of the newest step in the moving average
_PAUSE = 5.0  # a gap of so many average steps is idleness, not a step


class StepPace:
    """Moving average of the time between two batches of outputs of an instance."""

    def __init__(self) -> None:
        self._last_s: dict[InstanceId, float] = {}
        self._period_s: dict[InstanceId, float] = {}
        self._ahead_s: dict[InstanceId, float] = {}

    def step_ended(self, instance: InstanceId, now: float) -> None:
        """Outputs of a step have arrived."""
        last = self._last_s.get(instance)
        self._last_s[instance] = now
        if last is None:
            return
        gap = now - last
        period = self._period_s.get(instance)
        if period is None:
            self._period_s[instance] = gap
        elif gap < _PAUSE * period:
            self._period_s[instance] = period + _WEIGHT * (gap - period)

    def next_end_in(self, instance: InstanceId, now: float, lead_s: float = 0.0) -> float:
        """Seconds until the first step ends that a message sent now, ``lead_s`` on its way, does not miss.

        0 if the pace is unknown or the step is overdue.
        """
        period = self._period_s.get(instance)
        if period is None:
            return 0.0
        left = self._last_s[instance] + period - now
        return left + period if 0 <= left < min(lead_s, period / 2) else max(0.0, left)

    def clock_read(self, instance: InstanceId, theirs_s: float, ours_s: float) -> None:
        """The instance's clock showed ``theirs_s`` when it sent what arrived at ``ours_s``."""
        ahead = theirs_s - ours_s
        self._ahead_s[instance] = max(ahead, self._ahead_s.get(instance, ahead))

    def on_clock_of(self, instance: InstanceId, ours_s: float) -> float:
        """Our time on the instance's clock, by its quickest message; ours if it never sent one."""
        return ours_s + self._ahead_s.get(instance, 0.0)

    def since_last_end(self, instance: InstanceId, now: float) -> float:
        """Seconds since the last step ended; 0 before the first."""
        return now - self._last_s.get(instance, now)

    def forget(self, instance: InstanceId) -> None:
        """The instance is gone."""
        self._last_s.pop(instance, None)
        self._period_s.pop(instance, None)
        self._ahead_s.pop(instance, None)
