"""FastEngine against SimEngine, which is held against vLLM: the same requests give the same steps, to the bit."""

from __future__ import annotations

import random
from typing import Any

import pytest

from arriero.core.config import PreemptionConfig
from arriero.core.errors import ConflictError, ProtocolError
from arriero.sim.config import SimEngineConfig
from arriero.sim.engine import SimEngine
from arriero.sim.fast_engine import FastEngine
from arriero.sim.fast_reports import check_integrity, num_used_blocks, snapshot
from arriero.sim.fast_sequence import FastSequence
from arriero.sim.sequence import Job
from arriero.sim.step_time import StepTimeModel

Facts = tuple[str, int, int, int, float]  # id, prompt, output, priority, arrival

KNOTS = StepTimeModel(knots=((0.0, 3.0), (20.0, 5.5), (60.0, 17.1)), c=1e-3, d=0.3, e=0.013, host_ms=0.7, scale=1.3)


def config(**facts: Any) -> SimEngineConfig:
    return SimEngineConfig(**{"num_blocks": 30, "block_size": 4, "block_bytes": 32, "with_contents": False, **facts})


def requests(seed: int, num: int = 60) -> list[Facts]:
    rng, now, found = random.Random(seed), 0.0, []
    for number in range(num):
        now += rng.expovariate(20.0) if rng.random() < 0.7 else 0.0
        prompt, output = rng.randint(1, 60), rng.choice([1, 2, rng.randint(1, 50)])
        found.append((f"r{number}", prompt, output, rng.randint(-1, 1), now))
    return found


Trace = list[tuple[Any, ...]]


def reference(settings: SimEngineConfig, facts: list[Facts]) -> Trace:
    """Step by step: the time of each first token and end, what is preempted, and a snapshot after every step."""
    engine, now, trace, todo = SimEngine(settings), 0.0, [], list(facts)
    seen: set[str] = set()
    while todo or engine.has_requests:
        while todo and todo[0][4] <= now:
            name, prompt, output, priority, arrival = todo.pop(0)
            engine.add(
                Job(
                    request_id=name,
                    prompt_token_ids=range(prompt),
                    max_tokens=output,
                    priority=priority,
                    arrival_s=arrival,
                )
            )
        step = engine.begin_step(now)
        if step is None:
            now = todo[0][4]
            continue
        now = step.ends_s
        for token in engine.finish_step(now):
            if token.request_id not in seen:
                trace.append((now, "first", token.request_id))
                seen.add(token.request_id)
            if token.finish_reason is not None:
                trace.append((now, "end", token.request_id))
        trace.append((now, engine.snapshot(now)))
    return trace


def fast(settings: SimEngineConfig, facts: list[Facts], max_steps: int) -> Trace:
    """The same with segments, cut where a request arrives; snapshots from the middle of them."""
    engine, now, trace, todo = FastEngine(settings), 0.0, [], list(facts)
    seen: set[str] = set()
    while todo or engine.live:
        while todo and todo[0][4] <= now:
            name, prompt, output, priority, arrival = todo.pop(0)
            engine.add(FastSequence(name, prompt, output, priority, arrival))
        segment = engine.begin(now, max_steps)
        if segment is None:
            now = todo[0][4]
            continue
        if todo and todo[0][4] < segment.ends[-1]:
            engine.cut(todo[0][4])
        for number, end in enumerate(segment.ends[:-1], start=1):
            trace.append((end, snapshot(engine, end, number)))
            assert num_used_blocks(engine, number) == settings.num_blocks - trace[-1][1].num_free_blocks
        now = segment.ends[-1]
        heard, ended = engine.finish()
        ends = {s.request_id for s in ended}
        for sequence in heard:
            if sequence.request_id not in seen:
                trace.append((now, "first", sequence.request_id))
                seen.add(sequence.request_id)
            if sequence.request_id in ends:
                ends.remove(sequence.request_id)
                trace.append((now, "end", sequence.request_id))
        trace += [(now, "end", s.request_id) for s in ended if s.request_id in ends]
        check_integrity(engine)
        trace.append((now, snapshot(engine, now)))
    return trace


SETTINGS = {
    "roomy": config(num_blocks=400),
    "tight": config(),
    "priorities": config(priority_scheduling=True),
    "chunks": config(num_blocks=60, max_num_batched_tokens=16, max_num_seqs=16),
    "chunks, tight, priorities": config(max_num_batched_tokens=7, max_num_seqs=5, priority_scheduling=True),
    "first chunk is enough": config(max_num_batched_tokens=16, max_num_seqs=8, admit_whole_prompt=False),
    "few places": config(num_blocks=200, max_num_seqs=3),
    "fewer tokens than places": config(num_blocks=200, max_num_batched_tokens=4, max_num_seqs=12),
    "knots": config(step_time=KNOTS),
    "target between tokens": config(num_blocks=90, itl_target_s=0.025, max_num_seqs=8),
    "target, tight, priorities": config(itl_target_s=0.02, priority_scheduling=True),
    "the smallest gives way": config(preemption=PreemptionConfig()),
    "the smallest gives way, chunks, priorities": config(
        num_blocks=40, max_num_batched_tokens=16, priority_scheduling=True, preemption=PreemptionConfig()
    ),
    "the smallest gives way, target": config(itl_target_s=0.02, preemption=PreemptionConfig()),
    "restarts beside much room": config(preemption=PreemptionConfig(restart_blocks_per_running=2.5)),
    "blocks of one token": config(num_blocks=120, block_size=1, block_bytes=8),
}


def sorted_within_times(trace: Trace) -> Trace:
    return sorted(trace, key=lambda entry: (entry[0], len(entry), str(entry[1:]) if len(entry) == 3 else ""))


@pytest.mark.parametrize("max_steps", [1, 5, 1000])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_requests_give_the_same_steps(name: str, seed: int, max_steps: int) -> None:
    facts = [f for f in requests(seed) if f[1] + f[2] <= SETTINGS[name].max_model_len]
    expected = sorted_within_times(reference(SETTINGS[name], facts))
    assert sorted_within_times(fast(SETTINGS[name], facts, max_steps)) == expected


def test_the_random_requests_do_preempt_and_do_make_long_segments() -> None:
    engine = FastEngine(config())
    for facts in requests(0):
        engine.add(FastSequence(*facts))
    longest = 0
    while (segment := engine.begin(0.0, 1000)) is not None:
        longest = max(longest, len(segment.ends))
        engine.finish()
    assert engine.num_preemptions > 10
    assert longest > 5
    assert engine.num_free == 30


def test_a_segment_ends_where_the_next_block_is_lacking() -> None:
    """Two sequences of 4 and 5 tokens, 4 a block, 6 blocks: after the prefill 2 are free, which lasts for 7 tokens."""
    engine = FastEngine(config(num_blocks=6))
    for name, prompt in (("a", 4), ("b", 5)):
        engine.add(FastSequence(name, prompt, 14))
    engine.begin(0.0, 100)
    engine.finish()
    segment = engine.begin(1.0, 100)
    assert segment is not None
    assert len(segment.ends) == 7  # a computes tokens 5 .. 11, b 6 .. 12; the next token of b needs a 4th block
    engine.finish()
    assert engine.num_free == 0
    engine.begin(2.0, 100)
    assert engine.num_preemptions == 1


def test_prefill_first_computes_prompts_whole_in_steps_of_their_own() -> None:
    engine = FastEngine(config(num_blocks=100, max_num_batched_tokens=16), prefill_first=True)
    engine.add(FastSequence("a", 10, 5))
    steps = []
    for new in ("b", "c", None):
        segment = engine.begin(0.0)
        assert segment is not None
        steps.append([(s.request_id, n) for s, n in segment.chunks])
        engine.finish()
        if new:
            engine.add(FastSequence(new, 10 if new == "b" else 20, 5))
    assert steps == [[("a", 10)], [("b", 10)], [("c", 20)]]
    segment = engine.begin(0.0)
    assert segment is not None
    assert [(s.request_id, n) for s, n in segment.chunks] == [("a", 1), ("b", 1), ("c", 1)]


def test_prompts_come_in_parts_while_a_request_moves() -> None:
    """On both engines: its move waits for the ends of steps. The first prompt teaches them what a prompt takes."""
    settings = config(num_blocks=800, itl_target_s=0.02)
    slow, quick, moves = SimEngine(settings), FastEngine(settings), set[str]()
    slow.limits.has_moves = quick.limits.has_moves = lambda: bool(moves)
    for name, size in (("first", 100), ("long", 1000)):
        slow.add(Job(request_id=name, prompt_token_ids=range(size), max_tokens=1))
        quick.add(FastSequence(name, size, 1))
        if name == "first":
            assert step_sizes(slow, quick) == (100, 100)
    moves.add("guest")
    part, same = step_sizes(slow, quick)
    assert part == same < 500
    moves.clear()
    assert step_sizes(slow, quick) == (1000 - part, 1000 - part)


def step_sizes(slow: SimEngine, quick: FastEngine) -> tuple[int, int]:
    """Tokens of the next step of each."""
    step, segment = slow.begin_step(0.0), quick.begin(0.0)
    assert step is not None
    assert segment is not None
    slow.finish_step(step.ends_s)
    quick.finish()
    return sum(c.num_tokens for c in step.chunks), sum(n for _, n in segment.chunks)


def test_what_can_never_run_is_refused() -> None:
    engine = FastEngine(config())
    for prompt, output in ((0, 1), (1, 0), (100, 21)):
        with pytest.raises(ConflictError, match="at most 120 together"):
            engine.add(FastSequence("a", prompt, output))
    assert not engine.live


def test_the_books_are_checked() -> None:
    engine = FastEngine(config())
    engine.add(FastSequence("a", 10, 5))
    engine.begin(0.0)
    engine.finish()
    check_integrity(engine)
    engine.num_free += 1
    with pytest.raises(ProtocolError, match="lost or shared"):
        check_integrity(engine)
    engine.num_free -= 1
    engine.running.clear()
    with pytest.raises(ProtocolError, match="lost or listed"):
        check_integrity(engine)
