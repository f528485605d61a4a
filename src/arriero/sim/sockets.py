"""The sockets of a simulated instance, in vLLM's arrangement."""

from __future__ import annotations

import contextlib
import os
import time

import zmq

from arriero.sim.spec import SimSpec
from arriero.sim.wire import EngineCoreOutputs, EngineCoreReadyResponse, encode


class Sockets:
    """A DEALER for input, a PUSH for output, and a bell that wakes it from other threads and signal handlers."""

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
