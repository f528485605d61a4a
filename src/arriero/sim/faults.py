"""Between a front end and its instances: operations of migrations that are held up, lost, repeated or damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from arriero.core.messages import OPERATIONS, Answer, Message, Op
from arriero.core.types import InstanceId
from arriero.frontend.links import InstanceLinks

Pass = Callable[[], None]
Answered = Callable[[Answer], None]


@dataclass
class Operation:
    """One operation of a migration, on its way; see :class:`Faults`."""

    instance: InstanceId
    message: Message
    answer: Answer | None = None  #: once there is one; a fault may put another in its place

    @property
    def op(self) -> Op:
        return OPERATIONS[type(self.message)]


class Faults:
    """Between the front end and its links: watches operations, holds them up, loses them.

    ``on_send(operation, go)`` and ``on_answer(operation, go)`` decide when, how often and whether the operation is sent
    and its answer is heard: each ``go()`` lets it pass once.
    """

    def __init__(self, links: InstanceLinks) -> None:
        self._call = links.call
        links.call = self._intercepted  # type: ignore[method-assign]
        self.reset()

    def reset(self) -> None:
        """Everything passes."""
        self.seen: list[tuple[Op, InstanceId]] = []
        self.on_send: Callable[[Operation, Pass], None] = lambda operation, go: go()
        self.on_answer: Callable[[Operation, Pass], None] = lambda operation, go: go()

    def send(self, instance: InstanceId, message: Message) -> None:
        """An operation that the owner of the migration knows nothing of."""
        self._call(instance, message, lambda answer: None)

    def _intercepted(self, instance: InstanceId, message: Message, callback: Answered) -> None:
        operation = Operation(instance, message)
        self.seen.append((operation.op, instance))
        self.on_send(operation, partial(self._send, operation, callback))

    def _send(self, operation: Operation, callback: Answered) -> None:
        def answered(answer: Answer) -> None:
            operation.answer = answer
            self.on_answer(operation, lambda: callback(operation.answer or answer))

        self._call(operation.instance, operation.message, answered)
