"""Whether and when an instance that died is replaced: with growing pauses, and not for ever."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from arriero.core.config import RecoveryConfig

Place = int
"""Where an instance runs (its cores, its devices); the replacement of an instance takes its place."""


@dataclass(frozen=True, slots=True)
class Restart:
    """Start a replacement after ``delay_s``."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class StayDown:
    """Start none; ``reason`` is for people."""

    reason: str


class RestartPolicy:
    """Counts the deaths of each place."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._deaths: dict[Place, deque[tuple[float, bool]]] = {}  # when, and whether it died of itself

    def died(self, place: Place, now: float, *, from_outside: bool = False) -> Restart | StayDown:
        """An instance died there: at once the first time, then after ``backoff_s * 2**(deaths - 2)``, at most
        ``max_backoff_s``; never again after ``max_deaths`` in the last ``window_s``. What is killed ``from_outside`` is
        no crash loop: it counts for the pause only.
        """
        config = self._config
        if not config.restart:
            return StayDown("restarts are off (--no-restart)")
        deaths = self._deaths.setdefault(place, deque())
        deaths.append((now, not from_outside))
        while now - deaths[0][0] > config.window_s:
            deaths.popleft()
        crashes = [died_s for died_s, is_crash in deaths if is_crash]
        if len(crashes) >= config.max_deaths:
            return StayDown(f"fenced: {len(crashes)} deaths in {now - crashes[0]:.0f} s; `arriero restart` revives it")
        if len(deaths) == 1:
            return Restart(0.0)
        return Restart(min(config.backoff_s * 2.0 ** (len(deaths) - 2), config.max_backoff_s))

    def forgive(self, place: Place) -> None:
        """An operator wants it to start again."""
        self._deaths.pop(place, None)
