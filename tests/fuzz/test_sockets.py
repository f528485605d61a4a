"""Whatever comes over a socket: no crash, no hang, and what is right before and after it is served."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.config import CopyConfig, MigrationConfig
from arriero.core.errors import ProtocolError, TransportError
from arriero.frontend.links import InstanceLinks, identity
from arriero.sim.config import SimEngineConfig
from arriero.sim.process import SimInstance
from arriero.sim.spec import SimSpec
from arriero.sim.wire import SimCodec, SimRequest, decode_call, decode_ids, decode_request, encode, to_job
from arriero.transport.shm import SharedMemoryTransport

from . import frames

PREFIX = f"arriero-fuzz.{os.getpid()}"
_numbers = itertools.count()

# ---------------------------------------------------------------------- decoders


@frames.tried
@given(frames.encoded(frames.requests))
def test_a_request_is_one_or_is_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        to_job(decode_request(data))


@frames.tried
@given(frames.encoded(frames.calls | frames.plain))
def test_a_call_is_one_or_is_refused(data: bytes) -> None:
    for decode in (decode_call, decode_ids):
        with contextlib.suppress(ProtocolError):
            decode(data)


@frames.tried
@given(frames.from_an_instance)
def test_outputs_are_some_or_are_refused(data: Sequence[bytes]) -> None:
    with contextlib.suppress(ProtocolError):
        SimCodec().decode_outputs(data)


@pytest.fixture(scope="module")
def transport() -> Iterator[SharedMemoryTransport]:
    made = SharedMemoryTransport(PREFIX)
    yield made
    made.close()


ticket_fields = {
    "kind": st.just("shm"),
    "name": st.sampled_from(
        ["..", "/etc/passwd", "../../etc/passwd", "x" * 300, f"{PREFIX}-1-1", "a/b", ".", "null\x00"]
    ),
    "num_bytes": frames.numbers,
    "staging": frames.numbers,
}


@frames.tried
@given(frames.some_of(ticket_fields) | frames.plain)
def test_a_ticket_that_names_nothing_of_ours_is_refused(transport: SharedMemoryTransport, ticket: Any) -> None:
    with pytest.raises(TransportError):
        transport.fetch(ticket)


@frames.tried
@given(frames.numbers | st.none(), frames.numbers | st.none())
def test_a_ticket_fetches_what_was_staged_or_nothing(
    transport: SharedMemoryTransport, num_bytes: int | None, staging: int | None
) -> None:
    transport.stage("m", 100)[:] = b"x" * 100
    right = transport.ticket("m")
    changed = {k: v for k, v in {"num_bytes": num_bytes, "staging": staging}.items() if v is not None}
    ticket = {**right, **changed}
    try:
        fetched = transport.fetch(ticket)
    except TransportError:
        assert ticket != right
        return
    assert ticket["staging"] == right["staging"]
    assert fetched[:100] == b"x" * 100 or ticket["num_bytes"] < 100


# ---------------------------------------------------------------------- an instance


class Ear:
    """Sockets that only keep what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def ring(self) -> None: ...

    def send(self, outputs: Any) -> None:
        self.sent.append(outputs)


@pytest.fixture
def instance() -> Iterator[SimInstance]:
    spec = SimSpec(
        instance=0,
        input_address="",
        output_address="",
        engine=SimEngineConfig(num_blocks=64, block_size=4, block_bytes=64, max_model_len=200),
        migration=MigrationConfig(),
        copy=CopyConfig(),
        snapshot_interval_s=0.0,
        shm_prefix=PREFIX,
    )
    transport = SharedMemoryTransport(f"{PREFIX}-{next(_numbers)}")
    made = SimInstance(spec, Ear(), transport)  # type: ignore[arg-type]
    yield made
    made.close()
    transport.close()


def test_the_steps_of_an_instance_know_of_its_moves(instance: SimInstance) -> None:
    assert not instance._engine.limits.has_moves()
    instance._llumlet.parked("guest", 0.0)
    assert instance._engine.limits.has_moves()


@frames.tried
@given(st.lists(frames.to_an_instance, min_size=1, max_size=8))
def test_an_instance_serves_on_whatever_it_is_sent(instance: SimInstance, messages: list[Sequence[bytes]]) -> None:
    ear: Any = instance._sockets
    name = f"ours-{next(_numbers)}"
    instance._inbox.append([b"\x00", encode(SimRequest(name, [1, 2, 3], 4))])
    instance._inbox.extend(list(m) for m in messages)
    instance._handle_events()
    now = 0.0
    for _ in range(300):
        step = instance._engine.begin_step(now)
        if step is None:
            break
        now = step.ends_s
        instance._deliver(instance._engine.finish_step(now), now)
        instance._llumlet.after_step(now)
    tokens = [t for o in ear.sent for out in o.outputs if out.request_id == name for t in out.new_token_ids]
    assert len(tokens) == 4
    ear.sent.clear()


# ---------------------------------------------------------------------- the front end's links


class Heard:
    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_ready(self, instance: int, payload: bytes) -> None: ...

    def on_outputs(self, outputs: Any) -> None:
        self.outputs.append(outputs)

    def on_snapshot(self, snapshot: Any) -> None: ...


@frames.tried
@given(
    st.lists(frames.from_an_instance, max_size=5),
    st.lists(st.lists(frames.rubbish, min_size=1, max_size=3), max_size=3),
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_links_hear_on_whatever_instances_send(outputs: list[list[bytes]], firsts: list[list[bytes]]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        asyncio.run(_hear(folder, outputs, firsts))
    finally:
        shutil.rmtree(folder)


async def _hear(folder: Path, outputs: list[list[bytes]], firsts: list[list[bytes]]) -> None:
    addresses = f"ipc://{folder / 'in'}", f"ipc://{folder / 'out'}"
    links, heard = InstanceLinks(input_address=addresses[0], output_address=addresses[1], codec=SimCodec()), Heard()
    links.start(heard)
    context = zmq.Context()
    try:
        push, dealer = context.socket(zmq.PUSH), context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.IDENTITY, identity(0))
        push.connect(addresses[1])
        dealer.connect(addresses[0])
        for parts in firsts:
            dealer.send_multipart(parts)
        for parts in outputs:
            push.send_multipart(parts)
        push.send_multipart([msgspec.msgpack.encode([7, [["last", [1, 2]]], None, 1.0])])
        async with asyncio.timeout(30):
            while not (heard.outputs and heard.outputs[-1].engine_index == 7):
                await asyncio.sleep(0.001)
        assert heard.outputs[-1].outputs[0].new_token_ids == [1, 2]
    finally:
        context.destroy(linger=0)
        links.close()
