"""The scheduler's inputs and its commands in the event log, so that its decisions can be repeated (parity.py).

An event of :class:`GlobalScheduler` is a public method that takes ``now``. Its signature says what a line holds:

    {"event": "scheduler", "config": {…}}                                                       a fresh scheduler
    {"event": "decision", "time_s": now, "on": "ended", "given": {"request_id": "r1"}, "commands": [{"Stop": {…}}]}

JSON as msgspec writes it gives every float back exactly.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import msgspec

from arriero.core.commands import Command
from arriero.core.config import SchedulerConfig
from arriero.core.errors import PolicyError
from arriero.core.scheduler import GlobalScheduler
from arriero.observe.events import EventLog


def make_scheduler(config: SchedulerConfig, events: EventLog | None) -> GlobalScheduler:
    """A scheduler; one that is recorded if ``events`` is a full log."""
    if events is not None and events.is_full:
        return RecordedScheduler(config, events)
    return GlobalScheduler(config)


class RecordedScheduler(GlobalScheduler):
    """Logs each event that it is told of, with the commands that it answers; see the module."""

    def __init__(self, config: SchedulerConfig, events: EventLog) -> None:
        super().__init__(config)
        self._events = events
        self._is_deciding = False
        events.emit_to_file("scheduler", 0.0, config=config)

    def _decide(self, on: str, decide: Callable[..., list[Command]], given: dict[str, Any]) -> list[Command]:
        if self._is_deciding:  # an event that is told of by another: it comes again when that is repeated
            return decide(**given)
        self._is_deciding = True
        inputs = {k: v for k, v in given.items() if k != "now"}
        try:
            commands = decide(**given)
        except PolicyError as error:
            self._events.emit_to_file("decision", given["now"], on=on, given=inputs, error=str(error))
            raise
        finally:
            self._is_deciding = False
        self._events.emit_to_file("decision", given["now"], on=on, given=inputs, commands=named(commands))
        return commands


def named(commands: list[Command]) -> list[dict[str, Command]]:
    """As they are written: each under the name of its kind."""
    return [{type(command).__name__: command} for command in commands]


def _is_event(name: str, member: Any) -> bool:
    return inspect.isfunction(member) and not name.startswith("_") and "now" in inspect.signature(member).parameters


EVENTS: Mapping[str, inspect.Signature] = {
    name: inspect.signature(member) for name, member in vars(GlobalScheduler).items() if _is_event(name, member)
}
"""The scheduler's events."""


def _record(name: str) -> Any:
    signature, original = EVENTS[name], getattr(GlobalScheduler, name)

    @functools.wraps(original)
    def recorded(self: RecordedScheduler, *args: Any, **kwargs: Any) -> list[Command]:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        del given["self"]
        return self._decide(name, functools.partial(original, self), given)

    return recorded


for _name in EVENTS:
    setattr(RecordedScheduler, _name, _record(_name))


@functools.cache
def inputs_of(event: str) -> type[msgspec.Struct]:
    """What ``event`` is given beside the time, as a type that decodes it. Raises KeyError if there is no such event."""
    names = [name for name in EVENTS[event].parameters if name not in ("self", "now")]
    hints = get_type_hints(getattr(GlobalScheduler, event))
    fields = [(name, hints[name]) for name in names]
    return msgspec.defstruct(f"{event}_inputs", fields, forbid_unknown_fields=True)
