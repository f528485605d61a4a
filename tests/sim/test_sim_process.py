"""The simulated instance as a process, driven through its sockets as a front end does it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from arriero.core.config import MigrationConfig
from arriero.core.messages import Answer, Copy, Load, Locate, Message, Op, Release, Reserve
from arriero.core.migration import Migration
from arriero.core.migration_commands import Abort, Command, End, Park, Replay, Route, Send
from arriero.core.types import InstanceSnapshot, MigrationMode, Phase
from arriero.launch.child import END_SIGNAL, STATUS_FD_ENV
from arriero.sim.process import ABORT, ADD, UTILITY
from arriero.sim.tokens import expected_tokens
from arriero.sim.wire import EngineCoreReadyResponse, EngineCoreRequest, SimCodec, SimRequest
from arriero.wire import (
    LLUMLET_METHOD,
    PARKED_WAVE,
    SNAPSHOT_CALL_ID,
    decode_answer,
    decode_snapshot,
    encode_message,
)

PREFIX = f"arriero-test-sim.{os.getpid()}"
WAIT_S = 60.0
PROMPT = list(range(100, 140))


MODULE = (sys.executable, "-m", "arriero.sim.process")


def launch(command: list[str], spec: bytes, **options: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, **options)
    assert process.stdin is not None
    process.stdin.write(spec)
    process.stdin.close()
    return process


class Front:
    """A front end of two sockets, pumped by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codec = SimCodec()
        self.context = zmq.Context()
        self.input = self.context.socket(zmq.ROUTER)
        self.output = self.context.socket(zmq.PULL)
        self.input.bind(f"ipc://{folder}/in")
        self.output.bind(f"ipc://{folder}/out")
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.ready: dict[int, EngineCoreReadyResponse] = {}
        self.routes: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.snapshots: dict[int, InstanceSnapshot] = {}
        self.answers: dict[int, tuple[Any, str | None]] = {}
        self.callbacks: dict[int, Callable[[Any], None]] = {}
        self.num_calls = 0

    def spec(self, instance: int, migration: dict[str, float] | None = None, **engine: Any) -> bytes:
        spec = {
            "instance": instance,
            "input_address": f"ipc://{self.folder}/in",
            "output_address": f"ipc://{self.folder}/out",
            "engine": {"num_blocks": 128, "block_size": 8, "block_bytes": 1024, "time_scale": 0.2, **engine},
            "migration": migration or {},
            "copy": {"slice_bytes": 4096, "stage_bytes": 8192},
            "snapshot_interval_s": 0.01,
            "transport": {"kind": "shm", "prefix": PREFIX},
        }
        return json.dumps(spec).encode()

    def start(self, instance: int, migration: dict[str, float] | None = None, **engine: Any) -> subprocess.Popen[bytes]:
        process = self.processes[instance] = launch([*MODULE], self.spec(instance, migration, **engine))
        self.until(lambda: instance in self.ready and instance in self.snapshots)
        return process

    def close(self) -> None:
        for process in self.processes.values():
            process.send_signal(END_SIGNAL)
        for process in self.processes.values():
            process.wait(WAIT_S)
        self.context.destroy(linger=0)

    # ------------------------------------------------------------------ sending

    def send(self, instance: int, kind: bytes, obj: Any) -> None:
        self.input.send_multipart([instance.to_bytes(2, "little"), kind, *self.codec.encode(obj)])

    def add(self, instance: int, request: EngineCoreRequest) -> None:
        self.routes[request.request_id] = instance
        self.tokens[request.request_id] = []
        self.send(instance, ADD, request)

    def call(self, instance: int, method: str, *args: Any) -> int:
        self.num_calls += 1
        self.send(instance, UTILITY, (0, self.num_calls, method, args))
        return self.num_calls

    def utility(self, instance: int, method: str, *args: Any) -> Any:
        call_id = self.call(instance, method, *args)
        self.until(lambda: call_id in self.answers)
        result, failure = self.answers.pop(call_id)
        assert failure is None, failure
        return result

    def operation(self, instance: int, message: Message) -> Answer:
        return decode_answer(self.utility(instance, LLUMLET_METHOD, encode_message(message)))

    # ------------------------------------------------------------------ receiving

    def until(self, condition: Callable[[], bool]) -> None:
        """Pump until ``condition`` holds."""
        deadline = time.monotonic() + WAIT_S
        poller = zmq.Poller()
        poller.register(self.input, zmq.POLLIN)
        poller.register(self.output, zmq.POLLIN)
        while not condition():
            assert time.monotonic() < deadline, f"waited {WAIT_S} s in vain; {self.tokens=} {self.snapshots=}"
            assert {p.poll() for p in self.processes.values()} <= {None}, "an instance has ended"
            for socket, _ in poller.poll(100):
                frames = socket.recv_multipart()
                if socket is self.input:
                    response = msgspec.msgpack.decode(frames[1], type=EngineCoreReadyResponse)
                    self.ready[int.from_bytes(frames[0], "little")] = response
                else:
                    self.on_outputs(self.codec.decode_outputs(frames))

    def on_outputs(self, outputs: Any) -> None:
        utility = outputs.utility_output
        if utility is None:
            for output in outputs.outputs:
                if self.routes.get(output.request_id) == outputs.engine_index:
                    self.tokens[output.request_id].extend(output.new_token_ids)
                    if output.finished:
                        self.finished[output.request_id] = str(output.finish_reason)
        elif utility.call_id == SNAPSHOT_CALL_ID:
            snapshot = decode_snapshot(utility.result.result)
            assert snapshot.instance == outputs.engine_index
            self.snapshots[snapshot.instance] = snapshot
        else:
            result = utility.result.result if utility.result is not None else None
            if utility.call_id in self.callbacks:
                self.callbacks.pop(utility.call_id)(result)
            else:
                self.answers[utility.call_id] = result, utility.failure_message

    # ------------------------------------------------------------------ migrations

    def migrate(self, request: EngineCoreRequest, destination: int, mode: MigrationMode = MigrationMode.LIVE) -> End:
        """The production protocol machine over these sockets."""
        name = request.request_id
        ends: list[End] = []
        migration = Migration(
            migration_id=f"m-{name}-{destination}-{self.num_calls}",
            request_id=name,
            source=self.routes[name],
            destination=destination,
            tokens=self.tokens[name],
            config=MigrationConfig(),
            mode=mode,
        )

        def carry_out(commands: list[Command]) -> None:
            for command in commands:
                match command:
                    case Park(instance):
                        request.current_wave = PARKED_WAVE
                        self.send(instance, ADD, request)
                        request.current_wave = 0
                    case Send(instance, message):
                        call_id = self.call(instance, LLUMLET_METHOD, encode_message(message))
                        self.callbacks[call_id] = answered
                    case Route(instance):
                        self.routes[name] = instance
                    case End():
                        ends.append(command)
                    case Abort() | Replay():
                        raise AssertionError(command)

        def answered(result: Any) -> None:
            carry_out(migration.on_answer(decode_answer(result), time.monotonic()))

        carry_out(migration.start(time.monotonic()))
        self.until(lambda: migration.is_closed)
        return ends[0]


@pytest.fixture
def front() -> Iterator[Front]:
    folder = Path(tempfile.mkdtemp(prefix="arriero-sim-"))
    front = Front(folder)
    yield front
    front.close()
    shutil.rmtree(folder)
    assert segments() == []


def reference(request: EngineCoreRequest) -> list[int]:
    assert request.prompt_token_ids is not None
    assert request.sampling_params is not None
    params = request.sampling_params
    return expected_tokens(request.prompt_token_ids, params["seed"], params["max_tokens"])


def segments() -> list[str]:
    return [p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(PREFIX)]


def check_idle(front: Front, instance: int) -> None:
    """Nothing is held, and the books agree."""
    holdings = front.utility(instance, "arriero_check")
    assert holdings["free_blocks"] == holdings["num_blocks"]
    assert [holdings[k] for k in ("requests", "frozen", "parked", "reserved", "open")] == [[]] * 5
    assert holdings["staged"] == 0


# ---------------------------------------------------------------------- serving


def test_it_says_what_it_is_and_how_far_it_is(front: Front) -> None:
    read, write = os.pipe()
    env = {**os.environ, STATUS_FD_ENV: str(write)}
    process = front.processes[3] = launch([*MODULE], front.spec(3, max_num_seqs=5), pass_fds=(write,), env=env)
    os.close(write)
    front.until(lambda: 3 in front.ready and 3 in front.snapshots)
    ready = front.ready[3]
    assert (ready.num_gpu_blocks, ready.block_size, ready.max_num_seqs, ready.max_model_len) == (128, 8, 5, 1024)
    snapshot = front.snapshots[3]
    assert (snapshot.num_blocks, snapshot.num_free_blocks, snapshot.requests) == (128, 128, ())
    process.send_signal(END_SIGNAL)
    with open(read) as status:
        assert [json.loads(line)["stage"] for line in status] == ["starting", "ready"]


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_requests_stream_the_reference_tokens(front: Front, async_scheduling: bool) -> None:
    front.start(0, async_scheduling=async_scheduling)
    requests = [SimRequest(f"r{i}", PROMPT[i:], 20 + i, seed=i or None) for i in range(4)]
    for request in requests:
        front.add(0, request)
    front.until(lambda: len(front.finished) == 4)
    assert front.tokens == {r.request_id: reference(r) for r in requests}
    assert set(front.finished.values()) == {"length"}
    front.until(lambda: not front.snapshots[0].requests)
    assert front.snapshots[0].num_steps >= 23
    check_idle(front, 0)


def test_an_abort_ends_a_stream_silently(front: Front) -> None:
    front.start(0)
    front.add(0, SimRequest("a", PROMPT, 900))
    front.until(lambda: len(front.tokens["a"]) > 3 and front.snapshots[0].num_running == 1)
    front.send(0, ABORT, ["a", "unknown"])
    front.until(lambda: not front.snapshots[0].requests)
    assert front.finished == {}
    check_idle(front, 0)


def test_an_impossible_request_ends_with_an_error(front: Front) -> None:
    front.start(0)
    front.add(0, SimRequest("too long", [1] * 2000))
    front.until(lambda: "too long" in front.finished)
    assert front.finished["too long"] == "error"
    check_idle(front, 0)


def test_utilities_answer_as_vllms(front: Front) -> None:
    front.start(0)
    assert front.utility(0, "get_supported_tasks") == ["generate"]
    assert front.utility(0, "reset_prefix_cache", False) is True
    assert front.utility(0, "is_sleeping") is False
    assert front.utility(0, "list_loras") == []
    assert front.utility(0, "save_sharded_state", "anything") is None
    call_id = front.call(0, LLUMLET_METHOD, b"garbage")
    front.until(lambda: call_id in front.answers)
    result, failure = front.answers[call_id]
    assert result is None
    assert failure is not None
    assert "arriero_llumlet method failed: malformed" in failure


def test_a_malformed_message_does_not_end_it(front: Front) -> None:
    front.start(0)
    number, call = front.codec.encode(5)[0], front.codec.encode((0, 1))[0]
    for frames in ([b"\x07", b"?"], [ADD, b"\xc1"], [ABORT, b"\xc1"], [ABORT, number], [UTILITY], [UTILITY, call]):
        front.input.send_multipart([b"\0\0", *frames])
    assert front.utility(0, "get_supported_tasks") == ["generate"]


def test_with_async_scheduling_input_is_handled_while_a_step_runs(front: Front) -> None:
    process = front.start(0, async_scheduling=True, time_scale=10_000.0)  # a step of minutes
    front.add(0, SimRequest("a", PROMPT))
    for _ in range(3):
        assert front.utility(0, "arriero_check")["requests"] == ["a"]
    front.send(0, ABORT, ["a"])
    assert front.utility(0, "arriero_check")["requests"] == []
    assert front.tokens == {"a": []}
    assert process.poll() is None


# ---------------------------------------------------------------------- migrating


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("mode", list(MigrationMode))
def test_a_request_moves_between_processes(front: Front, mode: MigrationMode, async_scheduling: bool) -> None:
    for instance in (0, 1):
        front.start(instance, async_scheduling=async_scheduling, num_blocks=256)
    moving = SimRequest("moving", PROMPT * 8, 90, seed=4)
    front.add(0, moving)
    front.add(0, SimRequest("stays at the source", PROMPT, 900))
    front.add(1, SimRequest("is at the destination", PROMPT, 90))
    front.until(lambda: len(front.tokens["moving"]) >= 5)
    end = front.migrate(moving, 1, mode)
    assert end.ok, end.reason
    assert "stays at the source" not in front.finished  # the hand-over did not wait for an idle moment
    front.send(0, ABORT, ["stays at the source"])
    front.until(lambda: len(front.finished) == 2)
    assert front.tokens["moving"] == reference(moving)
    assert front.tokens["is at the destination"] == expected_tokens(PROMPT, None, 90)
    for instance in (0, 1):
        check_idle(front, instance)


def test_a_request_moves_again_and_again(front: Front) -> None:
    for instance in (0, 1):
        front.start(instance)
    request = SimRequest("a", PROMPT, 150, seed=1)
    front.add(0, request)
    for i in range(6):
        num_tokens = len(front.tokens["a"])
        front.until(lambda n=num_tokens: len(front.tokens["a"]) > n)
        assert front.migrate(request, 1 - i % 2).ok
    front.until(lambda: "a" in front.finished)
    assert front.tokens["a"] == reference(request)
    for instance in (0, 1):
        check_idle(front, instance)


def test_a_waiting_request_moves_without_a_copy(front: Front) -> None:
    front.start(0, max_num_seqs=1)
    front.start(1)
    first, waiting = SimRequest("first", PROMPT, 200), SimRequest("waiting", PROMPT, 10, seed=2)
    front.add(0, first)
    front.add(0, waiting)
    front.until(lambda: front.snapshots[0].num_waiting == 1)
    assert front.migrate(waiting, 1).ok
    front.until(lambda: "waiting" in front.finished)
    assert front.tokens["waiting"] == reference(waiting)
    assert "first" not in front.finished


def test_the_destination_refuses_and_the_request_stays(front: Front) -> None:
    front.start(0)
    front.start(1, num_blocks=4)
    request = SimRequest("a", PROMPT, 60)
    front.add(0, request)
    front.until(lambda: len(front.tokens["a"]) > 2)
    end = front.migrate(request, 1)
    assert not end.ok
    assert "destination refused" in end.reason
    front.until(lambda: "a" in front.finished)
    assert front.tokens["a"] == reference(request)
    check_idle(front, 1)


def test_a_source_that_died_is_named(front: Front) -> None:
    """The staged blocks vanish with their process; the import says so and the reservation is freed."""
    front.start(1)
    park(front, 1, SimRequest("a", PROMPT, 60))
    assert front.operation(1, Reserve(migration_id="m", request_id="a", num_tokens=16)).ok
    ticket = {"kind": "shm", "name": f"{PREFIX}-1-1", "num_bytes": 2048, "staging": 1}
    answer = front.operation(1, Load(migration_id="m", request_id="a", first=0, end=2, ticket=ticket, known=0))
    assert (answer.op, answer.ok) == (Op.LOAD, False)
    assert "its owner is gone" in answer.reason
    check_idle(front, 1)


def test_a_lease_ends_on_an_idle_instance(front: Front) -> None:
    front.start(0, migration={"lease_s": 0.3, "stage_timeout_s": 0.2})
    park(front, 0, SimRequest("a", PROMPT))
    assert front.operation(0, Reserve(migration_id="m", request_id="a", num_tokens=16)).ok
    front.until(lambda: any(r.phase is Phase.INCOMING for r in front.snapshots[0].requests))
    front.until(lambda: not front.snapshots[0].requests)
    check_idle(front, 0)


def park(front: Front, instance: int, request: EngineCoreRequest) -> None:
    request.current_wave = PARKED_WAVE
    front.send(instance, ADD, request)


def test_locate_of_a_request_that_is_not_here(front: Front) -> None:
    front.start(0)
    answer = front.operation(0, Locate(migration_id="m", request_id="nobody"))
    assert (answer.op, answer.ok, answer.reason) == (Op.LOCATE, False, "gone")


# ---------------------------------------------------------------------- ends


def stage_blocks(front: Front) -> None:
    """An export that is never released: its memory must go with the process."""
    front.add(0, SimRequest("a", PROMPT, 900))
    front.until(lambda: len(front.tokens["a"]) > 3)
    answer = front.operation(0, Copy(migration_id="m", request_id="a", first=0, epoch=-1))
    assert answer.num_bytes >= 5 * 1024
    assert len(segments()) == 1


def test_the_order_to_end_ends_it_and_frees_shared_memory(front: Front) -> None:
    process = front.start(0)
    stage_blocks(front)
    process.send_signal(END_SIGNAL)
    assert process.wait(WAIT_S) == 0
    assert segments() == []


def test_memory_that_an_export_staged_is_released_with_the_request(front: Front) -> None:
    front.start(0)
    stage_blocks(front)
    assert front.utility(0, "arriero_check")["staged"] == 1
    assert front.operation(0, Release(migration_id="m", request_id="a")).ok
    assert front.utility(0, "arriero_check")["staged"] == 0


def test_the_order_to_end_does_not_wait_for_a_long_step(front: Front) -> None:
    process = front.start(0, time_scale=10_000.0)  # a step of minutes
    front.add(0, SimRequest("a", PROMPT))
    time.sleep(0.2)
    process.send_signal(END_SIGNAL)
    assert process.wait(WAIT_S) == 0


def test_the_first_sigterm_asks_for_a_drain_and_the_second_ends_it(front: Front) -> None:
    read, write = os.pipe()
    env = {**os.environ, STATUS_FD_ENV: str(write)}
    process = front.processes[0] = launch([*MODULE], front.spec(0), pass_fds=(write,), env=env)
    os.close(write)
    front.until(lambda: 0 in front.ready and 0 in front.snapshots)
    with open(read) as status:
        process.terminate()
        assert [json.loads(status.readline()) for _ in range(3)][2:] == [{"asks": "drain"}]
        assert process.poll() is None
        process.terminate()
        assert process.wait(WAIT_S) == 0


def test_arriero_stop_ends_it(front: Front) -> None:
    process = front.start(0)
    front.utility(0, "arriero_stop")
    assert process.wait(WAIT_S) == 0


def test_it_does_not_outlive_its_parent(front: Front) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'arriero.sim.process'], stdin=subprocess.PIPE)\n"
        "child.stdin.write(sys.stdin.buffer.read()); child.stdin.close()\n"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = launch([sys.executable, "-c", code], front.spec(0), stdout=subprocess.PIPE)
    front.processes[0] = parent
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.stdout.close()
    front.until(lambda: 0 in front.ready)
    stage_blocks(front)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + WAIT_S
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the instance outlived its parent"
        time.sleep(0.01)
    assert segments() == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (b"", "spec"),
        (b"{}", "instance"),
        (b'{"instance": 0, "input_address": "x", "output_address": "y", "engine": {"num_blocs": 1}}', "num_blocs"),
        (b'{"instance": 0, "input_address": "x", "output_address": "y", "transport": {"kind": "ufo"}}', "ufo"),
        (b'{"instance": 0, "input_address": "x", "output_address": "y", "copy": {"copy_share": 2}}', "copy_share"),
        (b'{"instance": 0, "input_address": "x", "output_address": "y", "surprise": 1}', "surprise"),
        (b'{"instance": 0, "input_address": "x", "output_address": "y", "engine": {"with_contents": false}}', "copied"),
    ],
)
def test_a_bad_spec_is_named_in_one_line(spec: bytes, message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "arriero.sim.process"], input=spec, capture_output=True)
    assert done.returncode == 1
    assert message in done.stderr.decode()
    assert len(done.stderr.decode().splitlines()) == 1
