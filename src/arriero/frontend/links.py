"""The front end's side of the sockets: one ROUTER to all instances, one PULL from all of them.

The wire is vLLM's own (`EngineCoreRequest` in, `EngineCoreOutputs` out); a :class:`Codec` encodes it,
so that this file needs no vLLM. Messages to one instance arrive in order, and so do those from it; there
is no order between two instances.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq
import zmq.asyncio

from arriero.core.errors import ArrieroError, ProtocolError
from arriero.core.messages import OPERATIONS, Answer, Message, Op
from arriero.core.types import InstanceId, InstanceSnapshot, RequestId
from arriero.wire import (
    LLUMLET_METHOD,
    PARKED_WAVE,
    SNAPSHOT_CALL_ID,
    decode_answer,
    decode_snapshot,
    encode_message,
)

logger = logging.getLogger(__name__)

_DECIDING = {Op.COMMIT, Op.RELEASE, Op.RESUME, Op.DROP}

ADD, ABORT, UTILITY = b"\x00", b"\x01", b"\x03"


class Codec(Protocol):
    """How requests and outputs look as bytes."""

    def encode(self, obj: Any) -> Sequence[Any]:
        """Frames of a request, a list of ids or a utility call."""

    def decode_outputs(self, frames: Sequence[Any]) -> Any:
        """An object with ``engine_index``, ``outputs``, ``utility_output``, ``scheduler_stats``."""

    def is_self_contained(self, request: Any) -> bool:
        """Whether an instance that has never heard of the request could run it from this message alone."""

    def error_outputs(self, engine_index: int, request_ids: Sequence[RequestId]) -> Any:
        """Outputs that end these requests with an error."""


class LinkEvents(Protocol):
    """Who hears what the instances say."""

    def on_ready(self, instance: InstanceId, payload: bytes) -> None:
        """The instance has connected; ``payload`` is its ready response."""

    def on_outputs(self, outputs: Any) -> None:
        """A batch of outputs of one step of one instance."""

    def on_snapshot(self, snapshot: InstanceSnapshot) -> None:
        """The instance reports its load; after the outputs of the same message."""


def identity(instance: InstanceId) -> bytes:
    """ZeroMQ identity of an instance, as vLLM builds it."""
    return instance.to_bytes(2, "little")


class InstanceLinks:
    """Sends requests and operations to instances; calls back with what they send."""

    def __init__(self, *, input_address: str, output_address: str, codec: Codec, client_index: int = 0) -> None:
        self.input_address, self.output_address = input_address, output_address
        self.codec = codec
        self.client_index = client_index
        self._context = zmq.asyncio.Context()
        self._input = self._context.socket(zmq.ROUTER)
        self._input.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._input.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._output = self._context.socket(zmq.PULL)
        for socket in (self._input, self._output):
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.LINGER, 0)
        self._input.bind(input_address)
        self._output.bind(output_address)
        self._events: LinkEvents | None = None
        self._calls: dict[int, tuple[InstanceId, Callable[[Any, str | None], None]]] = {}
        self._call_ids = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, events: LinkEvents) -> None:
        """Begin to listen; needs the running event loop."""
        self._events = events
        self._tasks = [
            asyncio.create_task(self._listen(self._output, self._on_output), name="arriero outputs"),
            asyncio.create_task(self._listen(self._input, self._on_input), name="arriero ready messages"),
        ]

    def close(self) -> None:
        """Stop listening and close the sockets. Idempotent."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self._context.destroy(linger=0)

    # ------------------------------------------------------------------ sending

    def add(self, instance: InstanceId, request: Any, *, parked: bool = False) -> None:
        """Send a request; ``parked``: it is scheduled only once a COMMIT admits it."""
        request.client_index = self.client_index
        wave, request.current_wave = request.current_wave, PARKED_WAVE if parked else 0
        try:
            frames = self.codec.encode(request)
        finally:
            request.current_wave = wave
        self._send(instance, ADD, frames)

    def abort(self, instance: InstanceId, request_ids: Sequence[RequestId]) -> None:
        """Abort requests at an instance; unknown ids are ignored there."""
        self._send(instance, ABORT, self.codec.encode(list(request_ids)))

    def call(self, instance: InstanceId, message: Message, callback: Callable[[Answer], None]) -> None:
        """Send one llumlet operation; ``callback`` gets its answer.

        If the call itself fails, an operation that only prepares counts as refused. One that decides who
        runs the request (COMMIT and the clean-up) stays unanswered: the owner asks again, it never guesses.
        """

        def answered(result: Any, error: str | None) -> None:
            if error is None:
                try:
                    answer = decode_answer(result)
                except (ProtocolError, TypeError) as malformed:
                    error = str(malformed)
            if error is not None:
                op = OPERATIONS[type(message)]
                logger.warning(
                    "%s of migration %s failed at instance %d: %s", op, message.migration_id, instance, error
                )
                if op in _DECIDING:
                    return
                answer = Answer(migration_id=message.migration_id, op=op, ok=False, reason=error)
            callback(answer)

        self._call(instance, LLUMLET_METHOD, (encode_message(message),), answered)

    async def utility(self, instance: InstanceId, method: str, *args: Any) -> Any:
        """Call a utility method of an instance. Raises what it raised, as ArrieroError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def answered(result: Any, error: str | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(ArrieroError(error))

        self._call(instance, method, args, answered)
        return await future

    def instance_lost(self, instance: InstanceId) -> None:
        """Fail every call that waits for ``instance``."""
        for call_id in [c for c, (i, _) in self._calls.items() if i == instance]:
            self._calls.pop(call_id)[1](None, f"instance {instance} is gone")

    def _call(
        self, instance: InstanceId, method: str, args: tuple[Any, ...], callback: Callable[[Any, str | None], None]
    ) -> None:
        call_id = next(self._call_ids)
        self._calls[call_id] = (instance, callback)
        self._send(instance, UTILITY, self.codec.encode((self.client_index, call_id, method, args)))

    def _send(self, instance: InstanceId, kind: bytes, frames: Sequence[Any]) -> None:
        sent = self._input.send_multipart((identity(instance), kind, *frames), copy=False)
        asyncio.ensure_future(sent).add_done_callback(_log_send_error)

    # ------------------------------------------------------------------ receiving

    async def _listen(self, socket: zmq.asyncio.Socket, handle: Callable[[Sequence[Any]], None]) -> None:
        while True:
            frames = await socket.recv_multipart(copy=False)
            try:
                handle(frames)
            except Exception:
                logger.exception("a message from an instance could not be handled; it was dropped")

    def _on_input(self, frames: Sequence[Any]) -> None:
        assert self._events is not None
        who, payload = frames
        self._events.on_ready(int.from_bytes(who.bytes, "little"), payload.bytes)

    def _on_output(self, frames: Sequence[Any]) -> None:
        assert self._events is not None
        outputs = self.codec.decode_outputs(frames)
        utility = outputs.utility_output
        if utility is None:
            self._events.on_outputs(outputs)
            return
        if outputs.outputs or outputs.scheduler_stats is not None:  # a snapshot travels with its step's outputs
            self._events.on_outputs(outputs)
        if utility.call_id == SNAPSHOT_CALL_ID:
            self._events.on_snapshot(decode_snapshot(utility.result.result))
        elif (call := self._calls.pop(utility.call_id, None)) is not None:
            error = utility.failure_message
            call[1](None if utility.result is None else utility.result.result, error)


def _log_send_error(sent: asyncio.Future[Any]) -> None:
    if sent.cancelled():
        return
    error = sent.exception()
    if error is not None:
        logger.warning("a message to an instance was not sent: %s", error)
