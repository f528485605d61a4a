"""A simulated instance: `python -m arriero.sim.process < spec.json`.

On the wire it is vLLM's EngineCoreProc with arriero's additions (see `vllm/engine.py`): the same sockets,
frames and utility calls, the same llumlet, real bytes through a real transport. Input is handled between
two steps, as in vLLM, or as it arrives with ``async_scheduling``.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from arriero.core.config import CopyConfig, MigrationConfig
from arriero.core.errors import ArrieroError, ConfigError, ProtocolError
from arriero.core.llumlet import Export, Llumlet
from arriero.core.messages import Answer
from arriero.core.types import InstanceId, MigrationId, RequestId
from arriero.launch.child import adopt_parent, report_stage
from arriero.sim.config import SimEngineConfig, from_dict
from arriero.sim.engine import PlannedStep, SimEngine
from arriero.sim.sequence import FinishReason, TokenOutput
from arriero.sim.transport_copier import TransportCopier
from arriero.sim.wire import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    UtilityOutput,
    UtilityResult,
    decode_any,
    decode_request,
    encode,
    to_job,
)
from arriero.transport.port import BlockTransport
from arriero.transport.shm import SharedMemoryTransport
from arriero.wire import (
    LLUMLET_METHOD,
    PARKED_WAVE,
    SNAPSHOT_CALL_ID,
    decode_message,
    encode_answer,
    encode_snapshot,
)

ADD, ABORT, UTILITY = b"\x00", b"\x01", b"\x03"

TICK_S = 0.5
"""How often an idle instance looks at its leases and repeats its snapshot."""

LATER = object()
"""Result of a utility call that answers by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSpec:
    """All that a simulated instance is told at its start."""

    instance: InstanceId
    input_address: str
    output_address: str
    engine: SimEngineConfig
    migration: MigrationConfig
    copy: CopyConfig
    snapshot_interval_s: float
    shm_prefix: str

    @classmethod
    def from_json(cls, data: bytes) -> SimSpec:
        """Raises ConfigError, naming what is missing or wrong."""
        try:
            values: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
            transport = values.pop("transport", {"kind": "shm"})
            if transport.get("kind") != "shm":
                raise ConfigError(f"transport {transport!r} is unknown: use {{'kind': 'shm', 'prefix': ...}}")
            return cls(
                instance=int(values.pop("instance")),
                input_address=values.pop("input_address"),
                output_address=values.pop("output_address"),
                engine=SimEngineConfig.from_dict(values.pop("engine", {})),
                migration=from_dict(MigrationConfig, values.pop("migration", {}), "migration"),
                copy=from_dict(CopyConfig, values.pop("copy", {}), "copy"),
                snapshot_interval_s=float(values.pop("snapshot_interval_s", 0.02)),
                shm_prefix=transport.get("prefix", "arriero-sim"),
                **values,
            )
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the spec of the instance cannot be used: {error}") from error


class Links:
    """The sockets of an instance, and a bell that wakes it from other threads and signal handlers."""

    def __init__(self, spec: SimSpec) -> None:
        self._context = zmq.Context()
        self._input = self._socket(zmq.DEALER)
        self._input.setsockopt(zmq.IDENTITY, spec.instance.to_bytes(2, "little"))
        self._input.connect(spec.input_address)
        self._output = self._socket(zmq.PUSH)
        self._output.connect(spec.output_address)
        self._instance = spec.instance
        self._bell_read, self._bell_write = os.pipe()
        os.set_blocking(self._bell_read, False)
        os.set_blocking(self._bell_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._input, zmq.POLLIN)
        self._poller.register(self._bell_read, zmq.POLLIN)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 1000)
        return socket

    def ring(self) -> None:
        """Wake :meth:`wait`; from any thread or signal handler."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._bell_write, b"!")

    def wait(self, timeout_s: float) -> None:
        """Until there is input, the bell rings, or the time is up."""
        # The poller counts milliseconds; the rest of the time is slept.
        milliseconds = max(0, int(timeout_s * 1000))
        started = time.monotonic()
        if not self._poller.poll(milliseconds):
            time.sleep(max(0.0, started + timeout_s - time.monotonic()))
        with contextlib.suppress(BlockingIOError):
            os.read(self._bell_read, 65536)

    def receive(self) -> list[bytes] | None:
        """The next message, if one has arrived."""
        try:
            return self._input.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def send_ready(self, response: EngineCoreReadyResponse) -> None:
        """The first message: the front end's ROUTER learns the identity from it."""
        self._input.send(encode(response))

    def send(self, outputs: EngineCoreOutputs) -> None:
        """To the front end."""
        outputs.engine_index = self._instance
        self._output.send(encode(outputs))

    def close(self) -> None:
        """Deliver what was sent, if it goes quickly."""
        self._input.close()
        self._output.close()
        self._context.term()
        os.close(self._bell_read)
        os.close(self._bell_write)
