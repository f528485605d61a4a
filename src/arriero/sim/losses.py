"""Instances that die in virtual time: what ran there goes on elsewhere, as in `frontend/replays.py`.

Each request arrives at the scheduler once more, with what it has produced as part of its prompt and before those whose
streams have not begun; a migration without a source puts it where the scheduler says. A death is known at once. Nobody
is suspected of it: deaths are by the user's hand here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from arriero.core.commands import Command
from arriero.core.config import RecoveryConfig
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import InstanceId, InstanceState, MigrationMode
from arriero.sim.kernel import Kernel
from arriero.sim.membership import Membership
from arriero.sim.moves import MoveReport, VirtualMigrations
from arriero.sim.records import NOWHERE, Record
from arriero.sim.requests import Requests


class Losses:
    """Who died, and the replays that are open: each request is in one at a time, however many attempts fail."""

    def __init__(
        self,
        *,
        kernel: Kernel,
        instances: Membership,
        migrations: VirtualMigrations,
        scheduler: GlobalScheduler,
        requests: Requests,
        carry_out: Callable[[list[Command]], None],
        launch: Callable[[], None],
    ) -> None:
        self._kernel = kernel
        self._instances = instances
        self._migrations = migrations
        self._scheduler = scheduler
        self._requests = requests
        self._carry_out = carry_out
        self._launch = launch
        self._retry_s = RecoveryConfig().retry_s
        self._open: set[Record] = set()
        self.num_lost = 0

    def __contains__(self, record: Record) -> bool:
        return record in self._open

    def can_die(self, number: InstanceId) -> bool:
        """Whether there is such an instance, be it that it is being started."""
        return number < len(self._instances) and not self._instances.has_stopped(number)

    def kill(self, number: InstanceId, records: Iterable[Record]) -> None:
        """The instance dies; of ``records`` those go on elsewhere that run there. Another instance is started."""
        now, scheduler = self._kernel.now, self._scheduler
        drains = scheduler.view.states.get(number) is InstanceState.DRAINING
        is_starting = not self._instances.is_present(number)
        self.num_lost += 1
        routed = [r for r in records if r.instance == number and r.is_live]
        held = self._instances[number].die()
        self._instances.stop(number, now)
        if is_starting:
            self._carry_out(scheduler.launch_failed(now))
        orphans = [r for r in routed if not self._migrations.is_moving(r.request_id)]
        commands = scheduler.instance_lost(number, now)
        self._migrations.instance_lost(number)
        for record in orphans:
            if record.instance == number and not self._migrations.is_moving(record.request_id):
                self.replay(record, held[record.request_id].num_output)
        self._carry_out(commands)
        if not drains:
            self._launch()

    def replay(self, record: Record, num_tokens: int) -> None:
        """See to it that the request goes on, with the tokens that it has: nobody runs it."""
        record.instance, record.num_kept = NOWHERE, num_tokens
        if record not in self._open:
            self._open.add(record)
            record.num_replays += 1
            self._begin(record)

    def _begin(self, record: Record) -> None:
        facts, done = self._requests.facts(record.request_id, record.arrival), record.num_kept
        facts = replace(
            facts,
            num_prompt_tokens=facts.num_prompt_tokens + done,
            max_tokens=max(1, facts.max_tokens - done),
            is_replay=True,
        )
        self._carry_out(self._scheduler.arrived(facts, self._kernel.now))

    def ended(self, record: Record) -> None:
        """The request has ended, or has been refused."""
        self._open.discard(record)

    def place(self, record: Record, destination: InstanceId) -> None:
        """The scheduler has chosen an instance for a replay."""
        origin = self._requests.sequence(record.request_id, record.arrival)
        origin.num_output = record.num_kept
        self._migrations.start(record, origin, None, destination, MigrationMode.RECOMPUTE, "instance lost")

    def attempted(self, record: Record, report: MoveReport) -> None:
        """An attempt to put a replay somewhere has ended."""
        if report.ok:
            self._open.discard(record)
        if record not in self._open:
            return
        self._carry_out(self._scheduler.ended(record.request_id, self._kernel.now))
        self._kernel.at(self._kernel.now + self._retry_s, partial(self._again, record))

    def _again(self, record: Record) -> None:
        if record in self._open:
            self._begin(record)
