"""A simulated instance: `python -m arriero.sim.process < spec.json` (see :class:`arriero.sim.spec.SimSpec`).

On the wire it is vLLM's EngineCoreProc with arriero's additions (`vllm/engine.py`): the same sockets, frames
and utility calls, the same llumlet, real bytes through a real transport. Input is handled between two
steps, as in vLLM, or as it arrives with ``async_scheduling``.
"""

from __future__ import annotations

import queue
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arriero.launch.child import adopt_parent, end_on_signals, report_stage

if __name__ == "__main__":
    _PAYLOAD = adopt_parent()
    report_stage("starting")

from arriero import __version__
from arriero.core.engine_port import Export
from arriero.core.errors import ArrieroError, ConfigError, ProtocolError
from arriero.core.llumlet import Llumlet
from arriero.core.messages import Answer
from arriero.core.types import InstanceId, MigrationId, RequestId
from arriero.sim.blocks import BlockPool
from arriero.sim.config import SimEngineConfig
from arriero.sim.engine import PlannedStep, SimEngine
from arriero.sim.sequence import FinishReason, TokenOutput
from arriero.sim.sockets import Sockets
from arriero.sim.spec import SimSpec
from arriero.sim.transport_copier import TransportCopier
from arriero.sim.wire import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    UtilityOutput,
    UtilityResult,
    decode_call,
    decode_ids,
    decode_request,
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

_LATER = object()  # a utility call that answers by itself


class SimInstance:
    """The main loop: input, a step, its tokens, again. One thread; only the copier has its own."""

    def __init__(self, spec: SimSpec, sockets: Sockets, transport: BlockTransport) -> None:
        self._spec = spec
        self._sockets = sockets
        self._transport = transport
        self._inbox: deque[list[bytes]] = deque()
        self._copies: queue.SimpleQueue[tuple[MigrationId, Export | None, str | None]] = queue.SimpleQueue()
        self._engine = SimEngine(spec.engine, instance=spec.instance, copy=spec.copy, make_copier=self._make_copier)
        self._llumlet = Llumlet(self._engine, spec.migration)
        self._engine.limits.has_moves = lambda: not self._llumlet.is_idle
        self._dirty = True  # something changed since the last snapshot
        self._pushed_s = 0.0
        self._stopping = False

    def _make_copier(self, pool: BlockPool) -> TransportCopier:
        self._copier = TransportCopier(
            pool, self._transport, slice_bytes=self._spec.copy.slice_bytes, on_copied=self._on_copied
        )
        return self._copier

    def stop(self) -> None:
        """End the loop soon; from any thread or signal handler."""
        self._stopping = True
        self._sockets.ring()

    def close(self) -> None:
        """End the copier's thread."""
        self._copier.close()

    def _on_copied(self, migration_id: MigrationId, export: Export | None, error: str | None) -> None:
        self._copies.put((migration_id, export, error))
        self._sockets.ring()

    # ------------------------------------------------------------------ loop

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        self._sockets.send_ready(ready_response(self._spec.instance, self._spec.engine))
        report_stage("ready")
        while not self._stopping:
            self._receive()
            self._handle_events()
            step = self._engine.begin_step(time.monotonic())
            if step is None:
                self._idle()
            else:
                self._run_step(step)

    def _run_step(self, step: PlannedStep) -> None:
        while (left_s := step.ends_s - time.monotonic()) > 0 and not self._stopping:
            self._sockets.wait(left_s)
            self._receive()
            if self._spec.engine.async_scheduling:
                self._handle_events()
        if self._stopping:
            return
        now = time.monotonic()
        self._deliver(self._engine.finish_step(now), now)
        self._llumlet.after_step(now)
        self._dirty = True
        self._push_snapshot(force=False)

    def _idle(self) -> None:
        self._llumlet.after_step(time.monotonic())
        if self._dirty:
            self._engine.check_integrity()
            self._llumlet.check_integrity()
            self._push_snapshot(force=True)
        self._sockets.wait(TICK_S)
        # Also if nothing happened: a snapshot that overtook the ready message was not heard.
        self._dirty = True

    def _receive(self) -> None:
        while (message := self._sockets.receive()) is not None:
            self._inbox.append(message)

    def _handle_events(self) -> None:
        while self._inbox:
            self._dirty = True
            try:
                self._handle(self._inbox.popleft())
            except ProtocolError as error:
                print(f"instance {self._spec.instance}: a message was dropped: {error}", file=sys.stderr, flush=True)
        while not self._copies.empty():
            self._dirty = True
            self._llumlet.copied(*self._copies.get(), now=time.monotonic())

    # ------------------------------------------------------------------ input

    def _handle(self, frames: Sequence[bytes]) -> None:
        match frames:
            case [kind, payload, *_] if kind == ADD:
                self._add(payload)
            case [kind, payload, *_] if kind == ABORT:
                self._abort(decode_ids(payload))
            case [kind, payload, *_] if kind == UTILITY:
                self._utility(*decode_call(payload))
            case _:
                raise ProtocolError(f"{len(frames)} frames of kind {frames[0]!r} are not understood")

    def _add(self, payload: bytes) -> None:
        request = decode_request(payload)
        if request.current_wave == PARKED_WAVE:
            self._engine.park(to_job(request))
            self._llumlet.parked(request.request_id, time.monotonic())
            return
        try:
            self._engine.add(to_job(request))
        except ArrieroError:
            self._send_outputs([EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR)])

    def _abort(self, request_ids: Sequence[RequestId]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)
            self._llumlet.request_gone(request_id, time.monotonic())

    def _utility(self, call_id: int, method: str, args: Sequence[Any]) -> None:
        output = UtilityOutput(call_id)
        try:
            result = self._call(call_id, method, args)
            if result is _LATER:
                return
            output.result = UtilityResult(result)
        except Exception as error:  # noqa: BLE001 - a process edge: as in vLLM, whatever a call raises is its answer
            output.failure_message = f"Call to {method} method failed: {error}"
        self._sockets.send(EngineCoreOutputs(utility_output=output))

    def _call(self, call_id: int, method: str, args: Sequence[Any]) -> Any:
        match method:
            case _ if method == LLUMLET_METHOD:
                self._llumlet.handle(decode_message(args[0]), lambda a: self._answer(call_id, a), time.monotonic())
                return _LATER
            case "get_supported_tasks":
                return ["generate"]
            case "reset_prefix_cache":
                return True
            case "is_sleeping":
                return False
            case "list_loras":
                return []
            case "arriero_copy_share":
                self._engine.set_copy_share(args[0])
            case "arriero_check":
                self._engine.check_integrity()
                self._llumlet.check_integrity()
                self._transport.check_integrity()
                staged = {"staged": self._transport.num_open}
                return {**self._engine.held.describe(), **staged, "open": self._llumlet.open_migrations()}
            case "arriero_stop":
                self.stop()
        return None

    # ------------------------------------------------------------------ output

    def _answer(self, call_id: int, answer: Answer) -> None:
        output = UtilityOutput(call_id, result=UtilityResult(encode_answer(answer)))
        self._sockets.send(EngineCoreOutputs(utility_output=output))

    def _deliver(self, tokens: Sequence[TokenOutput], now: float) -> None:
        if tokens:
            self._send_outputs([_on_wire(token) for token in tokens])
        for request_id in [t.request_id for t in tokens if t.finish_reason is not None]:
            self._llumlet.request_gone(request_id, now)

    def _send_outputs(self, outputs: list[EngineCoreOutput]) -> None:
        finished: set[RequestId] = {o.request_id for o in outputs if o.finished}
        self._sockets.send(EngineCoreOutputs(outputs=outputs, finished_requests=finished or None))

    def _push_snapshot(self, *, force: bool) -> None:
        now = time.monotonic()
        if not self._dirty or (not force and now - self._pushed_s < self._spec.snapshot_interval_s):
            return
        self._dirty, self._pushed_s = False, now
        result = UtilityResult(encode_snapshot(self._engine.snapshot(now)))
        self._sockets.send(EngineCoreOutputs(utility_output=UtilityOutput(SNAPSHOT_CALL_ID, result=result)))


@dataclass(kw_only=True)
class ReadyResponse(EngineCoreReadyResponse):
    """As arriero adds to vLLM's, see vllm/engine.py and frontend/joining.py."""

    arriero_version: str = __version__
    model: str = "sim"
    cache_dtype: str = "uint8"


def ready_response(instance: InstanceId, engine: SimEngineConfig) -> ReadyResponse:
    """An instance's first message."""
    return ReadyResponse(
        max_model_len=engine.max_model_len,
        num_gpu_blocks=engine.num_blocks,
        block_size=engine.block_size,
        dp_stats_address=None,
        dtype="uint8",
        vllm_version="sim",
        world_size=1,
        data_parallel_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        data_parallel_rank=instance,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        instance_id=f"sim-{instance}",
        supports_lora=False,
        max_loras=0,
        kv_cache_size_tokens=engine.num_blocks * engine.block_size,
        effective_attention_block_size=engine.block_size,
    )


def _on_wire(token: TokenOutput) -> EngineCoreOutput:
    return EngineCoreOutput(
        token.request_id, [token.token_id], finish_reason=token.finish_reason, stop_reason=token.stop_reason
    )


def main(payload: bytes) -> None:
    """Entry of the process: serve until it is ordered to end, or the parent dies."""
    try:
        spec = SimSpec.from_json(payload)
    except ConfigError as error:
        sys.exit(str(error))
    sockets = Sockets(spec)
    transport = SharedMemoryTransport(spec.shm_prefix)
    instance = SimInstance(spec, sockets, transport)
    end_on_signals(instance.stop)
    try:
        instance.run()
    finally:
        instance.close()
        transport.close()
        sockets.close()


if __name__ == "__main__":
    main(_PAYLOAD)
