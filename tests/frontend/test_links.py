"""The links, against instances that speak on real sockets: nothing they send, or fail to send, stops the front end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from arriero.core.errors import ArrieroError
from arriero.core.messages import (
    OPERATIONS,
    Answer,
    Commit,
    Copy,
    Detach,
    Drop,
    Expect,
    Load,
    Locate,
    Message,
    Op,
    Release,
    Reserve,
    Resume,
)
from arriero.core.types import InstanceId, InstanceSnapshot, RequestId
from arriero.frontend.links import ABORT, ADD, UTILITY, InstanceLinks, identity
from arriero.wire import (
    LLUMLET_METHOD,
    PARKED_WAVE,
    SNAPSHOT_CALL_ID,
    decode_message,
    encode_answer,
    encode_snapshot,
)

IDS: dict[str, Any] = {"migration_id": "m", "request_id": "r"}
PREPARING: tuple[Message, ...] = (
    Locate(**IDS),
    Reserve(**IDS, num_tokens=1),
    Copy(**IDS, first=0, epoch=0),
    Load(**IDS, first=0, end=1, ticket=None, known=0),
    Expect(**IDS, due_s=0.1),
    Detach(**IDS, first=0, epoch=0),
)
DECIDING: tuple[Message, ...] = (
    Commit(
        **IDS, first=0, end=0, ticket=None, known=0, output_token_ids=(), num_output_tokens=0, num_computed_tokens=0
    ),
    Release(**IDS),
    Resume(**IDS),
    Drop(**IDS),
)
SNAPSHOT = InstanceSnapshot(
    instance=1, time_s=1.0, num_blocks=4, num_free_blocks=4, block_size=16, max_num_seqs=2, requests=()
)


class Request(msgspec.Struct):
    """The fields that the links touch, as vLLM names them."""

    request_id: str
    client_index: int = 0
    current_wave: int = 0


class Result(msgspec.Struct):
    result: Any = None


class UtilityOutput(msgspec.Struct):
    call_id: int
    failure_message: str | None = None
    result: Result | None = None


class Outputs(msgspec.Struct):
    engine_index: int
    outputs: list[str] = []
    utility_output: UtilityOutput | None = None
    scheduler_stats: dict[str, int] | None = None


class PlainCodec:
    """One frame of msgpack."""

    def encode(self, obj: Any) -> Sequence[Any]:
        return [msgspec.msgpack.encode(obj)]

    def decode_outputs(self, frames: Sequence[Any]) -> Any:
        return msgspec.msgpack.decode(frames[0].bytes, type=Outputs)

    def error_outputs(self, engine_index: int, request_ids: Sequence[RequestId]) -> Any:
        raise NotImplementedError


class FakeInstance:
    """An instance's two sockets; it does what the test says."""

    def __init__(self, context: zmq.asyncio.Context, links: InstanceLinks, instance: InstanceId) -> None:
        self.instance = instance
        self._inbox = context.socket(zmq.DEALER)
        self._inbox.setsockopt(zmq.IDENTITY, identity(instance))
        self._inbox.connect(links.input_address)
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.connect(links.output_address)

    def close(self) -> None:
        self._inbox.close(linger=0)
        self._outbox.close(linger=0)

    async def connect(self, *frames: bytes) -> None:
        await self._inbox.send_multipart(frames or (b"payload",))

    async def push(self, outputs: Outputs | bytes) -> None:
        await self._outbox.send(outputs if isinstance(outputs, bytes) else msgspec.msgpack.encode(outputs))

    async def hear(self) -> tuple[bytes, Any]:
        """The next message: its kind and its content."""
        kind, body = await self._inbox.recv_multipart()
        return kind, msgspec.msgpack.decode(body)

    async def hear_call(self) -> tuple[int, str, list[Any]]:
        """The next utility call: its number, method and arguments."""
        kind, (_, call_id, method, args) = await self.hear()
        assert kind == UTILITY
        return call_id, method, args

    async def answer(self, call_id: int, result: Any = None, failure: str | None = None) -> None:
        output = UtilityOutput(call_id, failure, None if failure else Result(result))
        await self.push(Outputs(self.instance, utility_output=output))

    async def push_snapshot(self, data: Any) -> None:
        await self.answer(SNAPSHOT_CALL_ID, data)


class Heard:
    """What the links called back with, in order."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.fail_on: str | None = None

    def on_ready(self, instance: InstanceId, payload: bytes) -> None:
        self.events.put_nowait(("ready", (instance, payload)))

    def on_outputs(self, outputs: Any) -> None:
        if self.fail_on in outputs.outputs:
            raise RuntimeError("a bug in what comes after the links")
        self.events.put_nowait(("outputs", outputs.outputs))

    def on_snapshot(self, snapshot: InstanceSnapshot) -> None:
        self.events.put_nowait(("snapshot", snapshot))


class World:
    def __init__(self, folder: Path) -> None:
        self.links = InstanceLinks(
            input_address=f"ipc://{folder}/in", output_address=f"ipc://{folder}/out", codec=PlainCodec(), client_index=3
        )
        self.heard = Heard()
        self.links.start(self.heard)
        self._context = zmq.asyncio.Context()
        self._instances: list[FakeInstance] = []

    async def instance(self, number: InstanceId = 1) -> FakeInstance:
        """An instance that has connected."""
        made = FakeInstance(self._context, self.links, number)
        self._instances.append(made)
        await made.connect()
        assert await self.heard.events.get() == ("ready", (number, b"payload"))
        return made

    def call(self, message: Message, instance: InstanceId = 1) -> list[Answer]:
        """Send an operation; its answer appears in the list."""
        answers: list[Answer] = []
        self.links.call(instance, message, answers.append)
        return answers

    async def settle(self, instance: FakeInstance) -> None:
        """Everything that the instance has sent so far has been handled."""
        await instance.push(Outputs(instance.instance, ["settled"]))
        while await self.heard.events.get() != ("outputs", ["settled"]):
            pass

    def close(self) -> None:
        self.links.close()
        for instance in self._instances:
            instance.close()
        self._context.term()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


# ---------------------------------------------------------------------- requests


async def test_a_request_arrives_with_the_index_of_this_front_end(world: World) -> None:
    instance = await world.instance()
    world.links.add(1, Request("r", current_wave=9))
    assert await instance.hear() == (ADD, {"request_id": "r", "client_index": 3, "current_wave": 0})


async def test_a_parked_request_carries_the_mark_and_the_original_stays_as_it_was(world: World) -> None:
    """The original is sent again, unparked, if it must be replayed."""
    instance = await world.instance()
    request = Request("r", current_wave=9)
    world.links.add(1, request, parked=True)
    assert await instance.hear() == (ADD, {"request_id": "r", "client_index": 3, "current_wave": PARKED_WAVE})
    assert request.current_wave == 9


async def test_a_request_that_cannot_be_encoded_is_not_left_marked_as_parked(world: World) -> None:
    request = Request(object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        world.links.add(1, request, parked=True)
    assert request.current_wave == 0


async def test_aborted_requests_are_named_to_their_instance(world: World) -> None:
    instance = await world.instance()
    world.links.abort(1, ("a", "b"))
    assert await instance.hear() == (ABORT, ["a", "b"])


async def test_messages_reach_the_instance_that_they_are_for_in_order(world: World) -> None:
    one, other = await world.instance(1), await world.instance(258)
    for number in range(20):
        world.links.abort(1 if number % 2 else 258, [str(number)])
    assert [await one.hear() for _ in range(10)] == [(ABORT, [str(n)]) for n in range(1, 20, 2)]
    assert [await other.hear() for _ in range(10)] == [(ABORT, [str(n)]) for n in range(0, 20, 2)]


async def test_a_message_to_an_instance_that_is_not_there_is_logged_and_lost(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.links.abort(5, ["r"])
    instance = await world.instance()
    await world.settle(instance)
    assert "a message to an instance was not sent" in caplog.text


async def test_an_instance_that_connects_again_takes_its_number_over(world: World) -> None:
    await world.instance(1)
    again = await world.instance(1)
    world.links.abort(1, ["r"])
    assert await again.hear() == (ABORT, ["r"])


# ---------------------------------------------------------------------- what instances push


async def test_outputs_and_snapshots_are_passed_on_in_order(world: World) -> None:
    instance = await world.instance()
    await instance.push(Outputs(1, ["a"]))
    await instance.push_snapshot(encode_snapshot(SNAPSHOT))
    await instance.push(Outputs(1, ["b"]))
    heard = [await world.heard.events.get() for _ in range(3)]
    assert heard == [("outputs", ["a"]), ("snapshot", SNAPSHOT), ("outputs", ["b"])]


async def test_a_snapshot_may_travel_with_the_outputs_of_its_step(world: World) -> None:
    """Outputs come first: what they finish, the snapshot does not show any more."""
    instance = await world.instance()
    snapshot = UtilityOutput(SNAPSHOT_CALL_ID, None, Result(encode_snapshot(SNAPSHOT)))
    await instance.push(Outputs(1, ["a"], utility_output=snapshot))
    await instance.push(Outputs(1, scheduler_stats={}, utility_output=snapshot))
    heard = [await world.heard.events.get() for _ in range(4)]
    assert heard == [("outputs", ["a"]), ("snapshot", SNAPSHOT), ("outputs", []), ("snapshot", SNAPSHOT)]


@pytest.mark.parametrize("noise", [b"", b"\xc1", b"\xff" * 100, b"\x91" * 100_000])
async def test_malformed_bytes_from_an_instance_do_not_stop_the_listener(
    world: World, noise: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    instance = await world.instance()
    await instance.push(noise)
    await instance.push_snapshot(noise)
    await instance.push_snapshot("no bytes at all")
    await instance.push_snapshot(encode_snapshot(SNAPSHOT))
    assert await world.heard.events.get() == ("snapshot", SNAPSHOT)
    assert caplog.text.count("could not be handled; it was dropped") == 3


async def test_a_malformed_ready_message_does_not_stop_the_listener(world: World) -> None:
    instance = await world.instance()
    await instance.connect(b"one", b"frame too many")
    await instance.connect(b"again")
    assert await world.heard.events.get() == ("ready", (1, b"again"))


async def test_an_error_behind_the_links_does_not_stop_the_listener(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    instance = await world.instance()
    world.heard.fail_on = "bad"
    await instance.push(Outputs(1, ["bad"]))
    await instance.push(Outputs(1, ["good"]))
    assert await world.heard.events.get() == ("outputs", ["good"])
    assert "a bug in what comes after the links" in caplog.text


# ---------------------------------------------------------------------- operations


def test_every_operation_either_prepares_or_decides() -> None:
    """A new one must be put on one of the two sides, here and in the links."""
    assert {type(m) for m in PREPARING} | {type(m) for m in DECIDING} == set(OPERATIONS)


@pytest.mark.parametrize("message", PREPARING + DECIDING, ids=lambda m: type(m).__name__)
async def test_an_operation_gets_its_answer_ok_or_refused(world: World, message: Message) -> None:
    instance = await world.instance()
    for ok in (True, False):
        answers = world.call(message)
        call_id, method, (data,) = await instance.hear_call()
        assert method == LLUMLET_METHOD
        assert decode_message(data) == message
        answer = Answer(migration_id="m", op=Op.COPY, ok=ok, reason="why")
        await instance.answer(call_id, encode_answer(answer))
        await world.settle(instance)
        assert answers == [answer]


async def fail(instance: FakeInstance, call_id: int) -> None:
    await instance.answer(call_id, failure="it broke")


async def answer_with_noise(instance: FakeInstance, call_id: int) -> None:
    await instance.answer(call_id, b"\xc1")


async def answer_with_text(instance: FakeInstance, call_id: int) -> None:
    await instance.answer(call_id, "no bytes")


async def answer_with_nothing(instance: FakeInstance, call_id: int) -> None:
    await instance.push(Outputs(1, utility_output=UtilityOutput(call_id)))


FAILURES = (fail, answer_with_noise, answer_with_text, answer_with_nothing)
Failure = Callable[[FakeInstance, int], Any]


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("message", PREPARING, ids=lambda m: type(m).__name__)
async def test_a_call_that_fails_counts_as_refused_if_the_operation_only_prepares(
    world: World, message: Message, how: Failure
) -> None:
    instance = await world.instance()
    answers = world.call(message)
    call_id, _, _ = await instance.hear_call()
    await how(instance, call_id)
    await world.settle(instance)
    (answer,) = answers
    assert not answer.ok
    assert answer.reason
    assert (answer.migration_id, answer.op) == ("m", type(message).__name__.lower())


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("message", DECIDING, ids=lambda m: type(m).__name__)
async def test_a_call_that_fails_stays_unanswered_if_the_operation_decides_who_runs_the_request(
    world: World, message: Message, how: Failure, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it took effect is not known: the owner asks again, it never guesses."""
    instance = await world.instance()
    answers = world.call(message)
    call_id, _, _ = await instance.hear_call()
    await how(instance, call_id)
    await world.settle(instance)
    assert answers == []
    assert "of migration m failed at instance 1" in caplog.text


async def test_an_answer_counts_once_and_a_stray_one_never(world: World) -> None:
    instance = await world.instance()
    answers = world.call(Locate(**IDS))
    call_id, _, _ = await instance.hear_call()
    answer = Answer(migration_id="m", op=Op.LOCATE)
    for number in (call_id, call_id, call_id + 1, 10**6):
        await instance.answer(number, encode_answer(answer))
    await world.settle(instance)
    assert answers == [answer]


async def test_calls_are_answered_each_with_its_own_answer_whatever_the_order(world: World) -> None:
    instance = await world.instance()
    answers = [world.call(Locate(migration_id=f"m{n}", request_id="r")) for n in range(3)]
    calls = [await instance.hear_call() for _ in range(3)]
    for call_id, _, (data,) in reversed(calls):
        answer = Answer(migration_id=decode_message(data).migration_id, op=Op.LOCATE)
        await instance.answer(call_id, encode_answer(answer))
    await world.settle(instance)
    assert [[a.migration_id for a in each] for each in answers] == [["m0"], ["m1"], ["m2"]]


# ---------------------------------------------------------------------- utilities


async def test_a_utility_call_returns_what_the_instance_returned(world: World) -> None:
    instance = await world.instance()
    result = asyncio.ensure_future(world.links.utility(1, "add", 2, 3))
    call_id, method, args = await instance.hear_call()
    assert (method, args) == ("add", [2, 3])
    await instance.answer(call_id, 5)
    assert await result == 5


async def test_a_utility_call_raises_what_the_instance_raised(world: World) -> None:
    instance = await world.instance()
    result = asyncio.ensure_future(world.links.utility(1, "add"))
    call_id, _, _ = await instance.hear_call()
    await fail(instance, call_id)
    with pytest.raises(ArrieroError, match="it broke"):
        await result


async def test_the_answer_to_a_utility_call_that_nobody_waits_for_any_more_is_ignored(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    instance = await world.instance()
    result = asyncio.ensure_future(world.links.utility(1, "add"))
    call_id, _, _ = await instance.hear_call()
    result.cancel()
    await asyncio.gather(result, return_exceptions=True)
    await instance.answer(call_id, 5)
    await world.settle(instance)
    assert caplog.records == []


# ---------------------------------------------------------------------- the loss of an instance


async def test_a_lost_instance_fails_the_calls_that_wait_for_it_and_no_others(world: World) -> None:
    lost, alive = await world.instance(1), await world.instance(2)
    refused, undecided = world.call(Copy(**IDS, first=0, epoch=0)), world.call(DECIDING[0])
    elsewhere = world.call(Locate(**IDS), 2)
    utility = asyncio.ensure_future(world.links.utility(1, "add"))
    for _ in range(3):
        await lost.hear_call()
    world.links.instance_lost(1)
    assert [(a.op, a.ok, a.reason) for a in refused] == [(Op.COPY, False, "instance 1 is gone")]
    assert undecided == []
    with pytest.raises(ArrieroError, match="instance 1 is gone"):
        await utility
    assert elsewhere == []
    call_id, _, _ = await alive.hear_call()
    await alive.answer(call_id, encode_answer(Answer(migration_id="m", op=Op.LOCATE)))
    await world.settle(alive)
    assert len(elsewhere) == 1


async def test_a_call_to_an_instance_that_was_never_there_fails_once_it_is_known_to_be_lost(world: World) -> None:
    answers = world.call(Locate(**IDS), 5)
    world.links.instance_lost(5)
    world.links.instance_lost(5)
    assert [a.reason for a in answers] == ["instance 5 is gone"]


async def test_a_callback_may_call_again_while_an_instance_is_taken_as_lost(world: World) -> None:
    """As a replay does: the calls of the dead instance fail, and the next call goes to another one."""
    await world.instance(1)
    other = await world.instance(2)
    world.links.call(1, Locate(**IDS), lambda answer: world.links.call(2, Drop(**IDS), lambda answer: None))
    world.links.instance_lost(1)
    _, _, (data,) = await other.hear_call()
    assert decode_message(data) == Drop(**IDS)


# ---------------------------------------------------------------------- the end


async def test_closing_twice_is_harmless_and_errors_of_the_last_messages_are_not_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await world.instance()
    world.links.abort(1, ["r"])
    world.links.close()
    world.links.close()
    await asyncio.sleep(0)
    assert caplog.records == []
