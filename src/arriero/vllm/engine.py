"""An instance: vLLM's engine process with a llumlet in its loop.

    python -m arriero.vllm.engine < payload

The payload is a pickled :class:`EngineSpec` from the front end of the same machine and user.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.launch.child import END_SIGNAL, adopt_parent, end_on_signals, report_stage

if __name__ == "__main__":
    _PAYLOAD = adopt_parent()
    report_stage("importing vLLM")

from arriero import __version__
from arriero.core.config import CopyConfig, MigrationConfig, PreemptionConfig, StepConfig
from arriero.core.engine_port import Export
from arriero.core.errors import ProtocolError
from arriero.core.llumlet import Llumlet
from arriero.core.messages import Answer
from arriero.core.types import InstanceId, MigrationId
from arriero.launch.leftovers import note_shared_memory
from arriero.vllm.compat import (
    EngineCoreOutputs,
    EngineCoreProc,
    EngineCoreReadyResponse,
    EngineCoreRequestType,
    EngineShutdownState,
    EngineZmqAddresses,
    UtilityOutput,
    UtilityResult,
)
from arriero.vllm.copier import Copier
from arriero.vllm.engine_port import VllmEnginePort
from arriero.vllm.preemption import rule_memory
from arriero.vllm.step_limits import limit_steps
from arriero.vllm.warm_up import time_a_prompt, warm_up
from arriero.wire import PARKED_WAVE, SNAPSHOT_CALL_ID, decode_message, encode_answer, encode_snapshot

TICK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """All that an instance is told at its start."""

    instance: InstanceId
    vllm_config: Any
    executor_class: Any
    log_stats: bool
    input_address: str
    output_address: str
    migration: MigrationConfig
    copy: CopyConfig
    step: StepConfig
    preemption: PreemptionConfig | None
    snapshot_interval_s: float
    shm_prefix: str


@dataclass(kw_only=True)
class ReadyResponse(EngineCoreReadyResponse):
    """vLLM's first message to the front end, and what arriero adds, see frontend/joining.py."""

    arriero_version: str = __version__
    model: str
    cache_dtype: str


class ArrieroEngineCore(EngineCoreProc):
    """vLLM's engine core, unchanged but for what stands here."""

    step_fn: Callable[[], tuple[dict[int, Any] | None, bool]]

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._llumlet: Llumlet | None = None
        self._num_steps = 0
        self._step_s = 0.0  # moving average
        self._pushed_s = 0.0
        self._dirty = True
        super().__init__(
            vllm_config=spec.vllm_config,
            local_client=True,
            handshake_address="",
            executor_class=spec.executor_class,
            log_stats=spec.log_stats,
            engine_index=spec.instance,
        )

    # ------------------------------------------------------------------ start

    @contextmanager
    def _perform_handshakes(
        self,
        handshake_address: str,
        identity: bytes,
        local_client: bool,
        vllm_config: Any,
        client_handshake_address: str | None,
    ) -> Generator[Any, None, None]:
        """The addresses are known: they came with the payload."""
        yield EngineZmqAddresses(inputs=[self._spec.input_address], outputs=[self._spec.output_address])
        vllm_config.__post_init__()

    def _initialize_kv_caches(self, vllm_config: Any) -> Any:
        report_stage("model loaded, sizing the KV cache")
        return super()._initialize_kv_caches(vllm_config)

    def _make_ready_response(self) -> ReadyResponse:
        config = self.vllm_config
        model = f"{config.model_config.model}@{config.model_config.revision or ''}"
        response = super()._make_ready_response()
        return ReadyResponse(**vars(response), model=model, cache_dtype=str(config.cache_config.cache_dtype))

    def open_llumlet(self) -> None:
        """Give the engine its llumlet; after construction, before the loop runs."""
        spec = self._spec
        copier = Copier(self.collective_rpc, prefix=spec.shm_prefix, config=spec.copy)
        self._port = VllmEnginePort(self, copier, spec.copy)
        self._llumlet = Llumlet(self._port, spec.migration)
        copier.listen(self._on_copied)
        self._copier = copier
        threading.Thread(target=self._tick_forever, daemon=True, name="arriero ticks").start()

    # ------------------------------------------------------------------ loop

    def _run_soon(self, action: Callable[[], None]) -> None:
        """Run ``action`` on the engine's thread, between two steps."""
        self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, action))

    def _on_copied(self, migration_id: MigrationId, export: Export | None, error: str | None) -> None:
        llumlet = self._llumlet
        assert llumlet is not None
        self._run_soon(lambda: llumlet.copied(migration_id, export, error, time.monotonic()))

    def _tick_forever(self) -> None:
        """Leases must expire on an idle engine too."""
        llumlet = self._llumlet
        assert llumlet is not None
        while True:
            time.sleep(TICK_S)
            if not llumlet.is_idle:
                self._run_soon(lambda: llumlet.after_step(time.monotonic()))

    def _handle_client_request(self, request_type: EngineCoreRequestType, request: Any) -> None:
        self._dirty = True
        if request_type is EngineCoreRequestType.WAKEUP and request is not None:
            request()
        else:
            super()._handle_client_request(request_type, request)
        if self._llumlet is not None and not self.has_work():
            self._push_snapshot(force=True)

    def _process_input_queue(self) -> None:
        """As vLLM's, but an engine that goes idle first says so."""
        if not self.has_work() and self.input_queue.empty():
            self._push_snapshot(force=True)
        super()._process_input_queue()
        self._hold_the_door()

    def _hold_the_door(self) -> None:
        """Wait a moment for a request that is about to move in, see core/door.py."""
        assert self._llumlet is not None
        while self.has_work() and (wait_s := self._llumlet.door.hold_for(time.monotonic(), self._step_s)) > 0:
            try:
                request = self.input_queue.get(timeout=wait_s)
            except queue.Empty:
                continue
            self._handle_client_request(*request)

    def _process_engine_step(self) -> bool:
        started = time.monotonic()
        executed: bool = super()._process_engine_step()
        if executed:
            self._step_s += 0.2 * (time.monotonic() - started - self._step_s)
        assert self._llumlet is not None
        self._llumlet.after_step(time.monotonic())
        self._push_snapshot(force=False)
        return executed

    def add_request(self, request: Any, request_wave: int = 0) -> None:
        """A request with the wave PARKED waits for its RESERVE."""
        if request_wave != PARKED_WAVE:
            super().add_request(request, request_wave)
            return
        assert self._llumlet is not None
        self._port.park(request)
        self._llumlet.parked(request.request_id, time.monotonic())

    def abort_requests(self, request_ids: list[str]) -> None:
        """Also of requests that are detached."""
        super().abort_requests(request_ids)
        assert self._llumlet is not None
        for request_id in request_ids:
            self._port.gone(request_id)
            self._llumlet.request_gone(request_id, time.monotonic())

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """A method of the workers by name. vLLM would also unpickle a function: not one that came over a socket."""
        if isinstance(method, bytes):
            raise ProtocolError("collective_rpc takes the name of a method, not a pickled function")
        results: list[Any] = super().collective_rpc(method, *args, **kwargs)
        return results

    def _send_engine_dead(self) -> None:
        """The launcher sees this process end; vLLM's message would not say whose end it is."""

    def shutdown(self) -> None:
        """Close the copier too."""
        if self._llumlet is not None:
            self._copier.close()
        super().shutdown()

    # ------------------------------------------------------------------ utilities

    def arriero_llumlet(self, message: bytes) -> bytes | Future[bytes]:
        """One operation of the migration protocol."""
        assert self._llumlet is not None
        future: Future[bytes] = Future()

        def reply(answer: Answer) -> None:
            if not future.done():
                future.set_result(encode_answer(answer))

        self._llumlet.handle(decode_message(message), reply, time.monotonic())
        return future.result() if future.done() else future

    def has_moves(self) -> bool:
        """Whether a request moves to this instance or away."""
        assert self._llumlet is not None
        return not self._llumlet.is_idle

    def arriero_check(self) -> dict[str, Any]:
        """Check the books and say what is held, for tests and leak hunts."""
        assert self._llumlet is not None
        self._llumlet.check_integrity()
        return {**self._port.holdings(), "open": self._llumlet.open_migrations()}

    def arriero_copy_share(self, share: float | None) -> None:
        """The share of the time that copying may take while others decode; None: as configured."""
        self._port.set_copy_share(share)

    def arriero_stop(self) -> None:
        """End now."""
        os.kill(os.getpid(), END_SIGNAL)

    # ------------------------------------------------------------------ load reports

    def report_with_outputs(self) -> None:
        """Let load reports travel with the tokens of their step: a message of its own would wake three threads."""
        step = self.step_fn

        def step_and_report() -> tuple[dict[int, Any] | None, bool]:
            outputs, executed = step()
            self._num_steps += 1
            self._dirty = True
            if outputs and (ours := outputs.get(0)) is not None:
                ours.utility_output = self._snapshot_if_due(force=False)
            return outputs, executed

        self.step_fn = step_and_report

    def _push_snapshot(self, *, force: bool) -> None:
        if (output := self._snapshot_if_due(force=force)) is not None:
            self.output_queue.put_nowait((0, EngineCoreOutputs(utility_output=output)))

    def _snapshot_if_due(self, *, force: bool) -> Any:
        """A ``UtilityOutput``, or None: nothing new, or it is too soon."""
        now = time.monotonic()
        if not self._dirty or (not force and now - self._pushed_s < self._spec.snapshot_interval_s):
            return None
        self._dirty, self._pushed_s = False, now
        snapshot = self._port.snapshot(self._spec.instance, now, self._num_steps, self._step_s)
        return UtilityOutput(SNAPSHOT_CALL_ID, result=UtilityResult(encode_snapshot(snapshot)))


def run(spec: EngineSpec) -> None:
    """Run an instance until it is told to end."""
    from arriero.vllm.compat import (
        configure_logging,
        decorate_logs,
        maybe_register_config_serialize_by_value,
        set_process_title,
    )

    if logging_config := getattr(spec.vllm_config, "logging_config", None):
        configure_logging(logging_config)
    maybe_register_config_serialize_by_value()
    set_process_title(f"arriero-instance-{spec.instance}")
    decorate_logs(f"Instance{spec.instance}")
    spec.vllm_config.shutdown_timeout = 0  # the front end has waited for what was to be waited for
    parallel = spec.vllm_config.parallel_config
    parallel.data_parallel_index = spec.instance
    parallel.reconfigure_for_independent_dp_rank()
    report_stage("loading the model")
    engine = ArrieroEngineCore(spec)
    _end_on_signals(engine)
    try:
        engine.open_llumlet()
        report_stage("warming up")
        warm_up(engine)
        rule_memory(engine, spec.preemption)
        if limit_steps(engine, spec.step, engine.has_moves) is not None:
            time_a_prompt(engine)
        note_shared_memory(Path(spec.input_address.removeprefix("ipc://")).parent, os.getpgid(0))
        engine.report_with_outputs()
        engine.run_busy_loop()
    except SystemExit:
        pass
    finally:
        engine.shutdown()


def _end_on_signals(engine: ArrieroEngineCore) -> None:
    def end() -> None:
        engine.shutdown_state = EngineShutdownState.REQUESTED
        # Not from the handler itself: it may have interrupted a thread that holds the queue's lock.
        threading.Thread(target=engine.input_queue.put, args=((EngineCoreRequestType.WAKEUP, None),)).start()

    end_on_signals(end)


def main(payload: bytes) -> None:
    """Entry of the process."""
    spec: EngineSpec = pickle.loads(payload)
    run(spec)


if __name__ == "__main__":
    main(_PAYLOAD)
    sys.stdout.flush()
