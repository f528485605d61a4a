"""Keeps instances alive: replaces those that died, kills those that hang."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from arriero.core.config import RecoveryConfig
from arriero.core.errors import ArrieroError, LaunchError
from arriero.core.restarts import Restart, RestartPolicy, StayDown
from arriero.core.types import InstanceId
from arriero.core.watchdog import Hung, Ping, Watchdog
from arriero.frontend.instances import Instance, Instances, Progress
from arriero.frontend.links import InstanceLinks

logger = logging.getLogger(__name__)

PING = "is_sleeping"
"""A utility call that every engine answers between two steps."""


class Lifecycle:
    """Carries out what the restart policy and the watchdog decide."""

    def __init__(
        self,
        config: RecoveryConfig,
        *,
        instances: Instances,
        links: InstanceLinks,
        clock: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        progress: Progress,
    ) -> None:
        self._instances = instances
        self._links = links
        self._clock = clock
        self._spawn = spawn
        self._progress = progress
        self.restarts = RestartPolicy(config)
        self.watchdog = Watchdog(config.hang_timeout_s)

    # ------------------------------------------------------------------ restarts

    def lost(self, instance: Instance) -> None:
        """An instance died."""
        match self.restarts.died(instance.place, self._clock(), from_outside=instance.died_from_outside):
            case Restart(delay_s):
                self._spawn(self._restart(instance, delay_s))
            case StayDown(reason):
                instance.stage = f"{instance.stage}; {reason}"
                self._progress(f"instance {instance.instance_id}: not replaced: {reason}")

    async def _restart(self, dead: Instance, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if dead.replaced_by is not None:
            return  # by an operator
        try:
            await self._instances.launch(place=dead.place, replaces=dead.instance_id)
        except LaunchError as error:
            logger.error("%s", error)
            self.lost(self._instances.replacement_of(dead))

    # ------------------------------------------------------------------ watchdog

    async def watch_forever(self) -> None:
        """Look for instances that hang."""
        while True:
            await asyncio.sleep(self.watchdog.tick_s)
            for verdict in self.watchdog.tick(self._clock()):
                match verdict:
                    case Ping(instance):
                        self._spawn(self._ping(instance))
                    case Hung(instance, silent_s):
                        self._instances.kill(instance, f"hung: no answer for {silent_s:.0f} s")

    async def _ping(self, instance: InstanceId) -> None:
        with contextlib.suppress(ArrieroError):  # it died meanwhile, or was wrong with its answer: it is alive then
            await self._links.utility(instance, PING)
        self.watchdog.heard(instance)
