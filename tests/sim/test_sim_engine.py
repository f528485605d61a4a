"""The simulated engine by itself: batching, tokens, memory, and its part in a migration, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from arriero.core.config import CopyConfig, MigrationConfig
from arriero.core.errors import ConfigError, ConflictError, ProtocolError, UnmovableError
from arriero.core.llumlet import Llumlet
from arriero.core.messages import Answer
from arriero.core.migration import Migration
from arriero.core.migration_commands import Abort, Command, End, Park, Replay, Route, Send
from arriero.core.types import MigrationMode, Phase
from arriero.sim.batch import Batch
from arriero.sim.blocks import BlockPool
from arriero.sim.config import SimEngineConfig
from arriero.sim.engine import SimEngine
from arriero.sim.sequence import FinishReason, Job, Sequence, TokenOutput
from arriero.sim.step_time import LLAMA_7B_A10, StepTimeModel
from arriero.sim.tokens import expected_tokens


def make(copy: CopyConfig | None = None, **config: Any) -> SimEngine:
    return SimEngine(SimEngineConfig(**{"num_blocks": 64, "block_size": 4, "block_bytes": 64, **config}), copy=copy)


def job(request_id: str, num_prompt: int = 10, **facts: Any) -> Job:
    prompt = random.Random(request_id).choices(range(32_000), k=num_prompt)
    return Job(**{"request_id": request_id, "prompt_token_ids": prompt, "max_tokens": 20, **facts})


def step(engine: SimEngine, now: float = 0.0) -> list[TokenOutput]:
    """One step; nothing if nothing can run."""
    return [] if engine.begin_step(now) is None else engine.finish_step(now)


def run(engine: SimEngine, max_steps: int = 2000) -> dict[str, list[int]]:
    """Until idle; the tokens by request."""
    tokens: dict[str, list[int]] = {}
    for _ in range(max_steps):
        outputs = step(engine)
        engine.check_integrity()
        for output in outputs:
            tokens.setdefault(output.request_id, []).append(output.token_id)
        if not engine.has_requests:
            return tokens
    raise AssertionError(f"not idle after {max_steps} steps")


def reference(j: Job) -> list[int]:
    assert j.max_tokens is not None
    return expected_tokens(j.prompt_token_ids, j.seed, j.max_tokens)


# ---------------------------------------------------------------------- tokens and batching


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_a_request_alone_yields_the_reference_tokens(seed: int | None) -> None:
    engine, a = make(), job("a", seed=seed)
    engine.add(a)
    assert run(engine) == {"a": reference(a)}


def test_prompt_and_seed_decide_the_tokens() -> None:
    prompt = [1, 2, 3]
    runs = [expected_tokens(p, s, 8) for p, s in ((prompt, None), (prompt, 0), (prompt, 1), ([1, 3, 2], None))]
    assert len({tuple(r) for r in runs}) == 4
    assert expected_tokens(prompt, 1, 5) == runs[2][:5]


@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 64, 2048])
def test_a_mixed_batch_in_chunks_of_any_size_yields_the_same_tokens(max_num_batched_tokens: int) -> None:
    engine = make(max_num_batched_tokens=max_num_batched_tokens)
    jobs = [job(f"r{i}", 3 + 7 * i, seed=i if i % 2 else None, max_tokens=5 + i) for i in range(5)]
    for j in jobs:
        engine.add(j)
    assert run(engine) == {j.request_id: reference(j) for j in jobs}


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    engine = make(max_num_batched_tokens=16)
    engine.add(job("short", 4))
    step(engine)
    engine.add(job("long", 40))
    planned = engine.begin_step(0.0)
    assert planned is not None
    assert [(c.sequence.request_id, c.num_computed, c.num_tokens) for c in planned.chunks] == [
        ("short", 4, 1),
        ("long", 0, 15),
    ]
    assert [o.request_id for o in engine.finish_step(0.0)] == ["short"]


def test_at_most_max_num_seqs_run() -> None:
    engine = make(max_num_seqs=2)
    for i in range(3):
        engine.add(job(f"r{i}"))
    step(engine)
    assert [r.phase for r in engine.snapshot(0.0).requests] == [Phase.RUNNING, Phase.RUNNING, Phase.WAITING]


def test_the_queue_is_first_come_first_served_and_its_head_blocks_it() -> None:
    engine = make(num_blocks=10)
    engine.add(job("running", 16))
    step(engine)
    engine.add(job("too big for now", 32))
    engine.add(job("would fit", 4))
    step(engine)
    assert [r.request_id for r in engine.snapshot(0.0).requests] == ["running", "too big for now", "would fit"]
    assert engine.snapshot(0.0).num_waiting == 2


def test_out_of_blocks_preempts_the_last_and_recomputes_it_later() -> None:
    engine = make(num_blocks=12)
    jobs = [job(f"r{i}", 12, max_tokens=20) for i in range(3)]
    for j in jobs:
        engine.add(j)
    assert run(engine) == {j.request_id: reference(j) for j in jobs}
    assert engine.snapshot(0.0).num_preemptions > 0
    assert engine.held.pool.num_free == 12


def test_a_preempted_request_waits_in_front() -> None:
    engine = make(num_blocks=8)
    engine.add(job("first", 15))
    engine.add(job("second", 15))
    step(engine)
    engine.add(job("third", 4))
    step(engine)
    step(engine)
    requests = engine.snapshot(0.0).requests
    assert [(r.request_id, r.phase) for r in requests] == [
        ("first", Phase.RUNNING),
        ("second", Phase.WAITING),
        ("third", Phase.WAITING),
    ]
    status = engine.find("second")
    assert status is not None
    assert (status.epoch, status.num_computed_tokens, requests[1].num_blocks) == (1, 0, 0)
    assert requests[1].demand_blocks == 5  # 17 tokens and one more


def test_priority_scheduling_serves_and_spares_the_urgent() -> None:
    engine = make(num_blocks=8, priority_scheduling=True)
    engine.add(job("later", 15, priority=1))
    engine.add(job("urgent", 15, priority=-1))
    engine.add(job("sooner", 15, priority=0))
    step(engine)
    assert [r.request_id for r in engine.snapshot(0.0).requests] == ["urgent", "sooner", "later"]
    tokens = run(engine)
    assert set(tokens) == {"later", "urgent", "sooner"}
    assert engine.held.batch.num_preemptions > 0


def test_a_victim_that_was_scheduled_gives_its_tokens_back() -> None:
    """Under priority the victim may stand before the one that needs room."""
    engine = make(num_blocks=8, priority_scheduling=True)
    loser, winner = job("loser", 14, priority=5, max_tokens=10), job("winner", 16, priority=0, max_tokens=10)
    engine.add(loser)
    step(engine)
    engine.add(winner)
    step(engine)
    planned = engine.begin_step(0.0)
    assert planned is not None
    assert [c.sequence.request_id for c in planned.chunks] == ["winner"]
    engine.finish_step(0.0)
    status = engine.find("loser")
    assert status is not None
    assert (status.phase, status.num_output_tokens, status.epoch) == (Phase.WAITING, 2, 1)
    assert run(engine) == {"loser": reference(loser)[2:], "winner": reference(winner)[2:]}


def running(batch: Batch, pool: BlockPool, *sequences: Sequence) -> None:
    """Put sequences into the batch that have computed all but their last token."""
    for sequence in sequences:
        sequence.num_computed = sequence.num_tokens - 1
        pool.allocate(sequence.request_id, sequence.num_computed)
        batch.run(sequence)


@pytest.mark.parametrize("budget", [2, 100])
def test_a_victims_tokens_go_to_those_after_it_and_nobody_is_admitted_in_its_stead(budget: int) -> None:
    config = SimEngineConfig(num_blocks=5, block_size=4, max_num_batched_tokens=budget, priority_scheduling=True)
    pool = BlockPool(5, 4, 64)
    batch = Batch(config, pool)
    # Each of the first two fills its two blocks; one block is free.
    loser, winner = Sequence(job("loser", 8, priority=9)), Sequence(job("winner", 9, priority=0))
    other = Sequence(job("other", 2, priority=1))
    running(batch, pool, loser, winner, other)
    batch.enqueue(Sequence(job("small", 1, priority=-5)))
    assert pool.num_free == 0
    chunks = batch.plan(0)
    assert [(c.sequence.request_id, c.num_tokens) for c in chunks] == [("winner", 1), ("other", 1)]
    assert [s.request_id for s in batch.waiting] == ["small", "loser"]
    assert [c.sequence.request_id for c in batch.plan(0)] == ["winner", "other", "small"][:budget]


# ---------------------------------------------------------------------- ends


def finish(engine: SimEngine) -> TokenOutput:
    for _ in range(500):
        for output in step(engine):
            if output.finish_reason is not None:
                engine.check_integrity()
                assert engine.held.pool.num_free == engine.held.pool.num_blocks
                return output
    raise AssertionError("never finished")


def test_max_tokens_ends_with_length() -> None:
    engine = make()
    engine.add(job("a", max_tokens=3))
    assert finish(engine).finish_reason is FinishReason.LENGTH
    assert engine.num_steps == 3


def test_the_models_length_ends_with_length() -> None:
    engine = make(max_model_len=32)
    engine.add(job("a", 10, max_tokens=None))
    assert finish(engine).finish_reason is FinishReason.LENGTH
    assert engine.num_steps == 22


@pytest.mark.parametrize(("min_tokens", "num_steps"), [(0, 4), (4, 4), (5, 20)])
def test_a_stop_token_ends_with_stop_but_not_before_min_tokens(min_tokens: int, num_steps: int) -> None:
    engine, stop = make(), reference(job("a"))[3]
    engine.add(job("a", stop_token_ids=frozenset({stop}), min_tokens=min_tokens))
    output = finish(engine)
    assert engine.num_steps == num_steps
    if num_steps == 4:
        assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, stop)


def test_the_end_token_ends_with_stop_unless_ignored() -> None:
    end = reference(job("a"))[3]
    engine = make()
    engine.add(job("a", eos_token_id=end))
    output = finish(engine)
    assert (output.finish_reason, output.stop_reason, engine.num_steps) == (FinishReason.STOP, None, 4)
    engine = make()
    engine.add(job("a", eos_token_id=end, ignore_eos=True))
    assert finish(engine).finish_reason is FinishReason.LENGTH


def test_ends_can_be_drawn() -> None:
    engine = make(num_blocks=1000, eos_probability=0.05, eos_token_id=77)
    for i in range(60):
        engine.add(job(f"r{i}", max_tokens=40))
    tokens = run(engine)
    assert all(t[-1] == 77 for t in tokens.values() if len(t) < 40)
    mean = sum(len(t) for t in tokens.values()) / len(tokens)
    assert 10 < mean < 27  # geometric with p = 0.05, cut off at 40: 17.4


def test_a_request_that_can_never_run_is_refused() -> None:
    engine = make(max_model_len=32)
    with pytest.raises(ConflictError, match="1 to 31"):
        engine.add(job("a", 32))
    with pytest.raises(ConflictError, match="1 to 31"):
        engine.add(job("a", 0))
    engine.add(job("a"))
    with pytest.raises(ConflictError, match="already"):
        engine.add(job("a"))


# ---------------------------------------------------------------------- what stands in the blocks matters


def tamper_missing(engine: SimEngine) -> None:
    engine.held.pool.contents[engine.held.pool.blocks_of("a")[1]] = 0


def tamper_swapped(engine: SimEngine) -> None:
    first, second = engine.held.pool.blocks_of("a")[:2]
    contents = engine.held.pool.contents
    contents[[first, second]] = contents[[second, first]]


def tamper_half(engine: SimEngine) -> None:
    """The second half of one token's entry is stale."""
    engine.held.pool.contents[engine.held.pool.blocks_of("a")[0], 8:16] ^= 1


def tamper_last(engine: SimEngine) -> None:
    engine.held.pool.contents[engine.held.pool.blocks_of("a")[-1]] = 0


@pytest.mark.parametrize("tamper", [tamper_missing, tamper_swapped, tamper_half, tamper_last])
def test_any_wrong_block_changes_the_tokens(tamper: Any) -> None:
    engine, a = make(), job("a")
    engine.add(a)
    head = [step(engine)[0].token_id for _ in range(4)]
    tamper(engine)
    tokens = head + run(engine)["a"]
    assert tokens[:4] == reference(a)[:4]
    assert all(x != y for x, y in zip(tokens[4:], reference(a)[4:], strict=True))


def test_freed_blocks_keep_nothing() -> None:
    engine = make()
    engine.add(job("a"))
    run(engine)
    assert np.unique(engine.held.pool.contents).tolist() == [0xDB]


def test_without_contents_only_lengths_are_simulated() -> None:
    engine = make(with_contents=False)
    engine.add(job("a", max_tokens=7))
    assert run(engine) == {"a": [0] * 7}


# ---------------------------------------------------------------------- steps in flight


def test_an_abort_in_flight_yields_nothing_and_frees() -> None:
    engine, b = make(), job("b")
    engine.add(job("a"))
    engine.add(b)
    engine.begin_step(0.0)
    assert engine.abort("a")
    assert not engine.abort("a")
    assert [o.request_id for o in engine.finish_step(0.0)] == ["b"]
    engine.check_integrity()
    assert run(engine)["b"] == reference(b)[1:]


def test_an_id_that_returns_in_flight_is_another_request() -> None:
    engine, a = make(), job("a")
    engine.add(a)
    engine.begin_step(0.0)
    engine.abort("a")
    engine.add(a)
    assert engine.finish_step(0.0) == []
    assert run(engine)["a"] == reference(a)


def test_frozen_in_flight_settles_with_the_step_and_then_rests() -> None:
    engine, a = make(), job("a")
    engine.add(a)
    step(engine)
    engine.begin_step(0.0)
    engine.freeze("a")
    status = engine.find("a")
    assert status is not None
    assert (status.phase, status.in_flight, status.num_computed_tokens) == (Phase.FROZEN, True, 10)
    assert len(engine.finish_step(0.0)) == 1
    status = engine.find("a")
    assert status is not None
    assert (status.in_flight, status.num_computed_tokens, status.num_tokens) == (False, 11, 12)
    assert engine.begin_step(0.0) is None
    engine.check_integrity()
    engine.unfreeze("a")
    assert run(engine)["a"] == reference(a)[2:]


def test_a_frozen_request_keeps_its_place_in_the_batch_and_its_blocks() -> None:
    engine = make(max_num_seqs=2)
    for name in ("a", "b", "c", "d"):
        engine.add(job(name))
    step(engine)
    free = engine.held.pool.num_free
    engine.freeze("a")
    engine.freeze("c")
    step(engine)
    assert [(r.request_id, r.phase.value) for r in engine.snapshot(0.0).requests] == [
        ("b", "running"),
        ("d", "waiting"),
        ("a", "frozen"),
        ("c", "frozen"),
    ]
    assert engine.held.pool.num_free == free
    engine.unfreeze("c")
    engine.unfreeze("a")
    assert [r.request_id for r in engine.snapshot(0.0).requests] == ["a", "b", "c", "d"]
    engine.check_integrity()


def test_the_duration_comes_from_the_step_time_model() -> None:
    engine = make(step_time=StepTimeModel(a_mem=5, a=0, b=1, c=0, d=0.5, e=0.01, host_ms=1))
    engine.add(job("a", 10))
    planned = engine.begin_step(100.0)
    assert planned is not None
    assert planned.ends_s == pytest.approx(100.0 + (10 + 1) / 1000)
    engine.finish_step(planned.ends_s)
    planned = engine.begin_step(101.0)
    assert planned is not None
    assert planned.duration_s == pytest.approx((5 + 0.5 + 0.01 * 11 + 1) / 1000)


# ---------------------------------------------------------------------- reservations


def reserved(engine: SimEngine, j: Job, num_tokens: int) -> None:
    engine.park(j)
    engine.reserve(j.request_id, num_tokens)


def test_a_reservation_holds_blocks_and_a_place_and_is_not_found() -> None:
    engine = make(max_num_seqs=1)
    reserved(engine, job("a"), 10)
    (incoming,) = engine.snapshot(0.0).requests
    assert (incoming.phase, incoming.num_blocks) == (Phase.INCOMING, 3)
    assert engine.snapshot(0.0).num_free_blocks == 61
    assert engine.find("a") is None
    engine.add(job("b"))
    assert engine.begin_step(0.0) is None
    engine.grow("a", 20)
    assert engine.snapshot(0.0).num_free_blocks == 59
    engine.check_integrity()
    engine.discard("a")
    engine.discard("a")
    assert engine.snapshot(0.0).num_free_blocks == 64
    assert "b" in run(engine)


def test_reservations_are_refused_with_the_reason() -> None:
    engine = make(max_num_seqs=2)
    with pytest.raises(ConflictError, match="not arrived"):
        engine.reserve("a", 10)
    engine.park(job("a", unmovable="it is a pooling request"))
    with pytest.raises(UnmovableError, match="pooling"):
        engine.reserve("a", 10)
    engine.park(job("a"))
    with pytest.raises(ConflictError, match="1 to 255"):
        engine.reserve("a", 400)
    reserved(engine, job("b"), 240)
    with pytest.raises(ConflictError, match="5 more KV blocks are needed, 4 are free"):
        engine.reserve("a", 20)
    with pytest.raises(ConflictError, match="9 more"):
        engine.grow("b", 255 + 21)
    engine.discard("b")
    for name in ("c", "d", "e"):
        engine.add(job(name))
    with pytest.raises(ConflictError, match="waiting"):
        engine.reserve("a", 10)
    step(engine)
    engine.abort("e")
    with pytest.raises(ConflictError, match="all 2 places"):
        engine.reserve("a", 10)
    engine.park(job("c"))
    with pytest.raises(ConflictError, match="here already"):
        engine.reserve("c", 10)
    engine.reserve("a", 0)  # a place in the queue is always to be had
    engine.discard("a")
    engine.discard("c")
    engine.check_integrity()
    assert engine.held.describe()["parked"] == []


def test_what_ran_before_and_comes_without_kv_goes_to_the_front_of_the_queue() -> None:
    engine = make(max_num_seqs=1)
    engine.add(job("running"))
    step(engine)
    engine.add(job("waiting"))
    for name in ("ran", "fresh"):
        engine.park(job(name))
        engine.reserve(name, 0)
    engine.extend("ran", (1, 2))
    engine.admit("fresh", 0, None, b"")
    engine.admit("ran", 0, None, b"")
    assert [r.request_id for r in engine.snapshot(0.0).requests] == ["running", "ran", "waiting", "fresh"]


def test_blocks_that_a_recomputed_request_reserved_are_freed() -> None:
    engine = make()
    reserved(engine, job("a"), 12)
    engine.admit("a", 0, None, b"")
    engine.check_integrity()
    assert engine.held.pool.num_free == 64
    assert run(engine)["a"] == reference(job("a"))


def test_what_was_never_reserved_cannot_be_admitted() -> None:
    engine = make()
    calls = (lambda: engine.admit("a", 0, None, b""), lambda: engine.grow("a", 1), lambda: engine.extend("a", (1,)))
    for call in calls:
        with pytest.raises(ConflictError, match="not reserved"):
            call()
    reserved(engine, job("a"), 12)
    with pytest.raises(ProtocolError, match="10 of 10 tokens"):
        engine.admit("a", 10, None, b"")
    with pytest.raises(ProtocolError, match="sampler state"):
        engine.admit("a", 9, b"short", b"")
    engine.discard("a")
    engine.check_integrity()


# ---------------------------------------------------------------------- migrations, by the production protocol


class Pair:
    """Two engines and a client, in virtual time: every command is carried out at once, then all step."""

    def __init__(self, *engines: SimEngine, config: MigrationConfig | None = None) -> None:
        self.engines = engines
        self.config = config or MigrationConfig()
        self.llumlets = [Llumlet(e, self.config) for e in engines]
        self.now = 0.0
        self.jobs: dict[str, Job] = {}
        self.routes: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.migrations: dict[str, Migration] = {}
        self.ends: list[End] = []

    def add(self, j: Job, instance: int = 0) -> None:
        self.jobs[j.request_id], self.routes[j.request_id], self.tokens[j.request_id] = j, instance, []
        self.engines[instance].add(j)

    def step(self, interrupt: Iterable[Any] = ()) -> None:
        """Begin a step everywhere, let the copies end, finish it, deliver."""
        self.now += 0.01
        begun = [e.begin_step(self.now) is not None for e in self.engines]
        for action in interrupt:
            action()
        for i, (engine, llumlet) in enumerate(zip(self.engines, self.llumlets, strict=True)):
            for migration_id, export in engine.copier.finish():  # type: ignore[attr-defined]
                llumlet.copied(migration_id, export, None, self.now)
            for output in engine.finish_step(self.now) if begun[i] else []:
                if self.routes.get(output.request_id) == i:
                    self.tokens[output.request_id].append(output.token_id)
                if output.finish_reason is not None:
                    llumlet.request_gone(output.request_id, self.now)
            llumlet.after_step(self.now)
            engine.check_integrity()
            llumlet.check_integrity()

    def start(self, request_id: str, source: int | None, destination: int, mode: MigrationMode) -> None:
        migration = self.migrations[f"m{len(self.migrations)}"] = Migration(
            migration_id=f"m{len(self.migrations)}",
            request_id=request_id,
            source=source,
            destination=destination,
            tokens=self.tokens[request_id],
            config=self.config,
            mode=mode,
        )
        self._carry_out(migration, migration.start(self.now))

    def move(self, request_id: str, source: int | None, destination: int, mode: MigrationMode) -> End:
        """A whole migration, while everything steps."""
        self.start(request_id, source, destination, mode)
        for _ in range(200):
            if all(m.is_closed for m in self.migrations.values()):
                return self.ends[-1]
            self.step()
        raise AssertionError("the migration never ended")

    def run(self) -> dict[str, list[int]]:
        while any(e.has_requests for e in self.engines):
            self.step()
        return self.tokens

    def _carry_out(self, migration: Migration, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Park(instance):
                    self.engines[instance].park(self.jobs[migration.request_id])
                    self.llumlets[instance].parked(migration.request_id, self.now)
                case Send(instance, message):

                    def reply(answer: Answer) -> None:
                        self._carry_out(migration, migration.on_answer(answer, self.now))

                    self.llumlets[instance].handle(message, reply, self.now)
                case Route(instance):
                    self.routes[migration.request_id] = instance
                case Abort(instance):
                    self.engines[instance].abort(migration.request_id)
                case End():
                    self.ends.append(command)
                case Replay():
                    raise AssertionError("no instance has died")


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("mode", list(MigrationMode))
@pytest.mark.parametrize("after", [0, 1, 2, 5, 19, 38])
def test_a_moved_request_yields_the_reference_tokens(mode: MigrationMode, after: int, seed: int | None) -> None:
    pair, a = Pair(make(), make()), job("a", 30, max_tokens=40, seed=seed)
    pair.add(a)
    for _ in range(after):
        pair.step()
    end = pair.move("a", 0, 1, mode)
    assert end.ok or after == 38  # near its end it may finish first
    assert pair.run()["a"] == reference(a)
    assert [e.held.pool.num_free for e in pair.engines] == [64, 64]
    assert all(llumlet.is_idle for llumlet in pair.llumlets)


def test_a_request_moves_live_in_stages_of_stage_bytes() -> None:
    pair, a = Pair(*[make(copy=CopyConfig(stage_bytes=2 * 64)) for _ in range(2)]), job("a", 40, max_tokens=40)
    pair.add(a)
    pair.step()
    assert pair.move("a", 0, 1, MigrationMode.LIVE).ok
    stages = pair.migrations["m0"].transfer.stages
    assert len(stages) >= 5
    assert all(s.num_blocks <= 2 for s in stages)
    assert pair.run()["a"] == reference(a)


def test_a_request_moves_in_the_middle_of_its_prefill() -> None:
    pair, a = Pair(*[make(max_num_batched_tokens=8) for _ in range(2)]), job("a", 60)
    pair.add(a)
    pair.step()
    assert pair.move("a", 0, 1, MigrationMode.STOP_AND_COPY).ok
    assert pair.run()["a"] == reference(a)


def test_a_waiting_request_moves_without_a_copy() -> None:
    pair = Pair(make(max_num_seqs=1), make())
    a, b = job("a"), job("b", seed=1)
    pair.add(a)
    pair.add(b)
    pair.step()
    assert pair.move("b", 0, 1, MigrationMode.LIVE).ok
    assert pair.migrations["m0"].transfer.num_bytes == 0
    assert pair.run() == {"a": reference(a), "b": reference(b)}


def test_a_request_moves_back_and_forth_among_others() -> None:
    pair = Pair(make(num_blocks=200), make(num_blocks=200))
    jobs = [job(f"r{i}", 5 + 9 * i, max_tokens=120, seed=i) for i in range(4)]
    for i, j in enumerate(jobs):
        pair.add(j, i % 2)
    for i in range(10):
        pair.step()
        assert pair.move("r0", i % 2, 1 - i % 2, MigrationMode.LIVE).ok
    assert pair.run() == {j.request_id: reference(j) for j in jobs}


def test_a_replay_continues_from_the_token_log() -> None:
    pair, a = Pair(make(), make()), job("a", seed=5)
    pair.add(a)
    for _ in range(6):
        pair.step()
    pair.engines[0].abort("a")  # as if the instance had died
    pair.start("a", None, 1, MigrationMode.RECOMPUTE)
    assert pair.run()["a"] == reference(a)


def test_detach_waits_for_the_step_in_flight() -> None:
    pair, a = Pair(make(), make()), job("a")
    pair.add(a)
    pair.step()
    pair.step([lambda: pair.start("a", 0, 1, MigrationMode.STOP_AND_COPY)])
    assert pair.run()["a"] == reference(a)
    assert pair.ends[-1].ok
    assert len(pair.tokens["a"]) == 20


def test_a_refused_move_leaves_the_request_where_it_is() -> None:
    pair, a = Pair(make(), make(max_num_seqs=1)), job("a", max_tokens=40)
    pair.add(a)
    pair.add(job("b", max_tokens=40), 1)
    pair.step()
    end = pair.move("a", 0, 1, MigrationMode.LIVE)
    assert not end.ok
    assert "all 1 places" in end.reason
    assert pair.run()["a"] == reference(a)


def test_a_preemption_during_the_copy_ends_the_move() -> None:
    pair, a = Pair(make(), make()), job("a", 40, max_tokens=30)
    pair.add(a)
    pair.step()
    batch = pair.engines[0].held.batch
    pair.start("a", 0, 1, MigrationMode.LIVE)
    batch._preempt(batch._running[-1])
    for _ in range(5):
        pair.step()
    assert not pair.ends[-1].ok
    assert pair.ends[-1].reason == "preempted"
    assert pair.run()["a"] == reference(a)


@pytest.mark.parametrize(("damage", "changes"), [("sampler", True), ("state_of_another", True), (None, False)])
def test_losing_the_sampler_changes_the_tokens(damage: str | None, changes: bool) -> None:
    """A seeded request must continue its generator, not begin it again."""
    source, destination, a = make(), make(), job("a", seed=9)
    source.add(a)
    for _ in range(5):
        step(source)
    outputs = tuple(reference(a)[:5])
    source.freeze("a")
    export = source.export_rest("m", "a", 0, 4, True)
    reserved(destination, a, 16)
    destination.extend("a", outputs)
    destination.import_rest("m", "a", 0, 4, export.ticket)
    destination.admit("a", 14, None if damage is None else b"\0" * 8 if damage == "state_of_another" else None, b"")
    if damage == "sampler":
        destination.held.live["a"].sampler = None
    assert (run(destination)["a"] != reference(a)[5:]) is changes


# ---------------------------------------------------------------------- random life


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_the_books_agree_and_the_tokens_are_right(seed: int) -> None:
    """Requests come, move at random moments and are aborted, in too little memory."""
    rng = random.Random(seed)
    priority = seed % 2 == 1
    pair = Pair(*[make(num_blocks=30, max_num_batched_tokens=20, priority_scheduling=priority) for _ in range(2)])
    aborted: set[str] = set()
    for tick in range(400):
        actions = []
        live = [r for r, i in pair.routes.items() if pair.engines[i].find(r) is not None]
        if tick < 250 and rng.random() < 0.15:
            facts = {"max_tokens": rng.randint(1, 40), "seed": rng.choice([None, tick]), "priority": rng.randint(-1, 1)}
            pair.add(job(f"r{tick}", rng.randint(1, 40), **facts), rng.randrange(2))
        if live and rng.random() < 0.3 and all(m.is_closed for m in pair.migrations.values()):
            name, mode = rng.choice(live), rng.choice(list(MigrationMode))
            actions.append(lambda n=name, m=mode: pair.start(n, pair.routes[n], 1 - pair.routes[n], m))
        elif live and rng.random() < 0.02 and all(m.is_closed for m in pair.migrations.values()):
            name = rng.choice(live)
            aborted.add(name)
            actions.append(lambda n=name: pair.engines[pair.routes[n]].abort(n))
        pair.step(actions)
    for name, tokens in pair.run().items():
        expected = reference(pair.jobs[name])
        assert tokens == (expected[: len(tokens)] if name in aborted else expected), name
    assert sum(e.ok for e in pair.ends) > 5
    assert sum(e.held.batch.num_preemptions for e in pair.engines) > 0
    assert all(llumlet.is_idle for llumlet in pair.llumlets)
    assert [e.held.pool.num_free for e in pair.engines] == [30, 30]


# ---------------------------------------------------------------------- configuration and step times


def test_step_time_of_a_decode_on_the_default_profile_is_about_12_ms() -> None:
    assert StepTimeModel().step_ms([], 1, 128) == pytest.approx(12, abs=0.5)
    assert StepTimeModel(scale=0.1).step_ms([], 1, 128) == pytest.approx(1.2, abs=0.05)


def test_step_time_is_the_formula() -> None:
    model = StepTimeModel(a_mem=3, a=1, b=0.5, c=0.001, d=0.2, e=0.01, host_ms=0.7, scale=2)
    linear = 1 + 0.5 * (100 + 20 + 4)
    attention = 0.001 * (100 * (50 + 50) + 20 * (0 + 10))
    assert model.step_ms([(100, 50), (20, 0)], 4, 300) == pytest.approx(
        2 * (linear + attention + 0.2 * 4 + 0.01 * 300 + 0.7)
    )
    assert model.step_ms([], 1, 0) == pytest.approx(2 * (3 + 0.2 + 0.7))


def test_step_time_with_knots_interpolates_and_extrapolates() -> None:
    model = StepTimeModel(c=0, d=0, e=0, host_ms=0, knots=((0.0, 10.0), (10.0, 20.0), (20.0, 60.0)))
    values = [model.step_ms([(n, 0)], 0, 0) for n in (1, 5, 10, 15, 20, 30)]
    assert values == pytest.approx([11, 15, 20, 40, 60, 100])


def test_the_paper_profile_meets_the_papers_figures() -> None:
    assert LLAMA_7B_A10.step_ms([(1024, 0)], 0, 0) == pytest.approx(4.5 + 0.203 * 1024 + 5.1e-6 * 1024**2, rel=0.01)
    assert LLAMA_7B_A10.step_ms([], 8, 8192) == pytest.approx(42.6 + 0.286 * 8, rel=0.01)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_block": 3}, "num_block is unknown"),
        ({"num_blocks": "many"}, "num_blocks"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"num_blocks": 2, "block_size": 4, "max_model_len": 9}, "hold 8"),
        ({"eos_probability": 1.0}, "eos_probability"),
        ({"step_time": {"a": -1.0}}, "a=-1"),
        ({"step_time": {"knots": [[1.0, 2.0]]}}, "knots"),
    ],
)
def test_a_bad_configuration_says_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SimEngineConfig.from_dict(values)


def test_configuration_from_json() -> None:
    config = SimEngineConfig.from_dict({"num_blocks": 8, "time_scale": 0.5, "step_time": {"a": 1.0}})
    assert (config.num_blocks, config.max_model_len, config.step_time.scale, config.step_time.a) == (8, 128, 0.5, 1.0)


@pytest.mark.parametrize("block_bytes", [31, 4, 100])
def test_blocks_must_hold_their_tokens(block_bytes: int) -> None:
    with pytest.raises(ConfigError, match="block_bytes"):
        make(block_bytes=block_bytes)
