"""Holding the door: a busy destination that knows of a COMMIT about to arrive waits a moment for it.

Operations are handled between two steps. A COMMIT that just misses a step would wait for the whole of it, half a
step on average, and the client with it. So the owner announces it together with DETACH, and the destination delays
its next step by at most a share of its own step time if the COMMIT is due within that.
"""

from __future__ import annotations

from arriero.core.types import MigrationId

_PUNCTUAL = 0.75
"""Share of the longest wait within which a COMMIT must be due to be waited for; it may come later by the rest."""


class Door:
    """Which COMMITs are announced, and how long to wait for them. ``share`` 0: never."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._due_s: dict[MigrationId, float] = {}
        self._held_since_s: float | None = None

    def expect(self, migration_id: MigrationId, due_s: float) -> None:
        """A COMMIT is due at ``due_s``."""
        self._due_s[migration_id] = due_s

    def forget(self, migration_id: MigrationId) -> None:
        """It came, or never will. Idempotent."""
        self._due_s.pop(migration_id, None)
        if not self._due_s:
            self._held_since_s = None

    @property
    def is_announced(self) -> bool:
        """Whether :meth:`hold_for` may say anything but 0."""
        return bool(self._due_s)

    def hold_for(self, now: float, step_s: float) -> float:
        """Seconds that the next step should still wait, called between two steps; 0: begin it.

        One wait lasts at most ``share * step_s``; announcements that are due but did not come in it are dropped.
        """
        longest_s = self._share * step_s
        soon_s = _PUNCTUAL * longest_s
        if not any(due_s - now <= soon_s for due_s in self._due_s.values()):
            self._held_since_s = None
            return 0.0
        if self._held_since_s is None:
            self._held_since_s = now
        left_s = self._held_since_s + longest_s - now
        if left_s > 0:
            return left_s
        self._held_since_s = None
        self._due_s = {m: due_s for m, due_s in self._due_s.items() if due_s - now > soon_s}
        return 0.0
