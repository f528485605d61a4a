"""Prefix caching: against a model of vLLM's block pool, block by block; then inside the engine and the simulator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.core.errors import ConfigError, ProtocolError
from arriero.observe.events import EventLog
from arriero.sim.config import SimEngineConfig
from arriero.sim.fast_engine import FastEngine
from arriero.sim.fast_reports import check_integrity
from arriero.sim.fast_sequence import FastSequence
from arriero.sim.prefix_cache import PrefixCache, Segments, Share, prompt_segments
from arriero.sim.simulator import Simulator, SimulatorConfig, scheduler_config
from arriero.sim.spec import SimSpec
from arriero.sim.step_time import StepTimeModel
from arriero.workload.traces import read_trace
from arriero.workload.workload import Arrival, Workload

# ---------------------------------------------------------------------- vLLM's pool, block by block


@dataclass
class Pool:
    """What matters of vLLM v1's BlockPool and KVCacheManager: a queue of free blocks, hashes, references."""

    num_blocks: int
    free: list[int] = field(default_factory=list)
    hash_of: dict[int, object] = field(default_factory=dict)
    block_of: dict[object, int] = field(default_factory=dict)
    references: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.num_blocks))

    def hit(self, hashes: list[object], max_blocks: int) -> list[int]:
        found = []
        for value in hashes[:max_blocks]:
            if value not in self.block_of:
                break
            found.append(self.block_of[value])
        return found

    def allocate(self, found: list[int], hashes: list[object], num_blocks: int) -> list[int] | None:
        """All blocks of a request; None if they do not fit."""
        revived = [b for b in found if not self.references.get(b)]
        if num_blocks - len(found) + len(revived) > len(self.free):
            return None
        for block in found:
            if not self.references.get(block):
                self.free.remove(block)
            self.references[block] = self.references.get(block, 0) + 1
        blocks = list(found)
        while len(blocks) < num_blocks:
            block = self.free.pop(0)
            self.block_of.pop(self.hash_of.pop(block, None), None)
            self.references[block] = 1
            blocks.append(block)
        for block, value in zip(blocks, hashes, strict=False):
            self.hash_of[block] = value
            self.block_of[value] = block
        return blocks

    def release(self, blocks: list[int]) -> None:
        nameless, cached = [], []
        for block in reversed(blocks):
            self.references[block] -= 1
            if not self.references[block]:
                (cached if block in self.hash_of else nameless).append(block)
        self.free = [*nameless, *self.free, *cached]


class Counted:
    """The same operations on the cache that counts."""

    def __init__(self, num_blocks: int) -> None:
        self.cache = PrefixCache(num_blocks)
        self.num_free = num_blocks

    def admit(self, segments: Segments, num_blocks: int, num_tail: int) -> tuple[int, Share | None]:
        share = Share(segments)
        found, revived = self.cache.find(segments, num_blocks)
        hit = sum(found)
        if num_blocks + num_tail - hit + revived > self.num_free:
            return hit, None
        self.num_free -= self.cache.hold(share, found)
        missing = num_blocks + num_tail - hit
        self.num_free -= missing
        self.cache.take(missing)
        self.cache.computed(share, num_blocks)
        return hit, share

    def release(self, share: Share, num_blocks: int) -> None:
        num_full = sum(length for _, length in share.segments)
        self.num_free += self.cache.let_go(share, num_blocks, num_full)


LENGTHS = (3, 2, 4)
"""Blocks of the segments at the three places of a chain."""

chains = st.lists(st.integers(0, 2), min_size=0, max_size=3)


@settings(deadline=None, derandomize=True, database=None, max_examples=400)
@given(st.integers(8, 40), st.lists(st.tuples(chains, st.integers(1, 4), st.integers(0, 5)), max_size=40))
def test_hits_and_room_are_those_of_a_pool_of_blocks(num_blocks: int, script: list[tuple[list[int], int, int]]) -> None:
    """Each entry admits a request (a path in a tree of prefixes, and a tail nobody shares), after ending some."""
    pool, counted = Pool(num_blocks), Counted(num_blocks)
    running: list[tuple[list[int], Share]] = []
    for path, num_tail, num_ended in script:
        for _ in range(min(num_ended, len(running))):
            blocks, share = running.pop(0)
            pool.release(blocks)
            counted.release(share, len(blocks))
        keys = [sum(3**i * (1 + p) for i, p in enumerate(path[: n + 1])) * 10 + n for n in range(len(path))]
        segments = tuple((key, LENGTHS[n]) for n, key in enumerate(keys))
        hashes: list[object] = [(key, i) for key, length in segments for i in range(length)]
        found = pool.hit(hashes, len(hashes))
        allocated = pool.allocate(found, hashes, len(hashes) + num_tail)
        hit, admitted = counted.admit(segments, len(hashes), num_tail)
        assert hit == len(found)
        assert (admitted is None) is (allocated is None)
        if admitted is not None and allocated is not None:
            running.append((allocated, admitted))
        assert counted.num_free == len(pool.free)
        counted.cache.check_integrity(counted.num_free)
        assert counted.cache.num_held == sum(pool.references.get(b, 0) > 0 for b in pool.hash_of)


def test_of_a_request_the_last_block_is_taken_first() -> None:
    counted = Counted(10)
    _, share = counted.admit(((1, 4), (2, 4)), 8, 0)
    assert share is not None
    counted.release(share, 8)
    counted.cache.take(2 + 3)  # the two that were never used, then three of the second segment
    assert counted.cache.find(((1, 4), (2, 4)), 99) == ([4, 1], 5)
    counted.cache.take(2)
    assert counted.cache.find(((1, 4), (2, 4)), 99) == ([3], 3)


def test_what_two_compute_at_a_time_is_known_once_and_nothing_is_lost() -> None:
    cache = PrefixCache(20)
    shares = [Share(((1, 4), (2, 4))) for _ in range(2)]
    cache.take(16)
    for share in shares:
        cache.computed(share, 2)  # only the first of the two is known with it
    assert [share.held for share in shares] == [[2], [0]]
    for share in shares:
        cache.computed(share, 8)
    assert [share.held for share in shares] == [[4, 4], [0, 0]]
    assert cache.let_go(shares[1], 8, 8) == 8
    cache.check_integrity(12)
    assert cache.let_go(shares[0], 8, 8) == 8
    cache.check_integrity(20)
    assert cache.find(((1, 4), (2, 4)), 99) == ([4, 4], 8)


def test_the_books_are_checked() -> None:
    with pytest.raises(ProtocolError, match="5 blocks are listed as free, not 4"):
        PrefixCache(5).check_integrity(4)


# ---------------------------------------------------------------------- in the engine

PER_TOKEN = StepTimeModel(a_mem=0, a=0, b=1, c=0, d=0, e=0, host_ms=0)


def engine(**facts: Any) -> FastEngine:
    defaults = {"num_blocks": 100, "block_size": 16, "with_contents": False, "step_time": PER_TOKEN}
    return FastEngine(SimEngineConfig(**{**defaults, "prefix_caching": True, **facts}))


def request(name: str, prompt: int, output: int, *ids: int) -> FastSequence:
    blocks = tuple((i, i) for i in ids)
    return FastSequence(name, prompt, output, share=Share(prompt_segments(Arrival(0, prompt, output, 0, blocks), 16)))


def step(of: FastEngine) -> list[tuple[str, int, int]]:
    """The chunks of the next step: request, tokens computed before, new ones."""
    segment = of.begin(0.0)
    assert segment is not None
    chunks = [(s.request_id, s.num_computed, n) for s, n in segment.chunks]
    of.finish()
    check_integrity(of)
    return chunks


def test_a_prompt_that_begins_like_another_is_computed_from_where_it_differs() -> None:
    """600 tokens: id 7 has 32 blocks, the 88 tokens of id 8 make 5 full ones. The last token is never a hit."""
    of = engine()
    of.add(request("a", 600, 1, 7, 8))
    of.add(request("b", 600, 1, 7, 8))
    of.add(request("c", 592, 1, 7, 9))
    assert step(of) == [("a", 0, 600), ("b", 592, 8), ("c", 512, 80)]
    of.add(request("d", 512, 1, 7))  # its last block is computed again
    assert step(of) == [("d", 496, 16)]
    assert (of.num_hit, of.num_looked_up) == (592 + 512 + 496, 600 + 600 + 592 + 512)
    assert of.num_free == 100


def test_shared_blocks_count_once() -> None:
    of = engine(num_blocks=40)
    for name in "abc":
        of.add(request(name, 512 + 16, 3, 7))
    assert step(of) == [("a", 0, 528), ("b", 512, 16), ("c", 512, 16)]
    assert of.num_free == 40 - 32 - 3


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    """Prompts of 31 tokens, 4 blocks: b gives way to a after the step that fills them, with 32 tokens computed. Its
    first block is taken by a later; the second was freed first, and is taken first: nothing is left but that one.
    """
    of = engine(num_blocks=4)
    of.add(request("a", 31, 11))
    of.add(request("b", 31, 11))
    assert step(of) == [("a", 0, 31), ("b", 0, 31)]
    assert step(of) == [("a", 31, 1), ("b", 31, 1)]
    steps = [step(of) for _ in range(10)]
    assert steps[:9] == [[("a", 32 + n, 1)] for n in range(9)]
    assert steps[9] == [("b", 16, 17)]


def test_an_instance_process_has_no_prefix_cache() -> None:
    spec = b'{"instance": 0, "input_address": "", "output_address": "", "engine": {"prefix_caching": true}}'
    with pytest.raises(ConfigError, match="prefix_caching=True is for the simulator"):
        SimSpec.from_json(spec)


def test_blocks_must_not_straddle_those_of_the_trace() -> None:
    with pytest.raises(ConfigError, match="block_size=48 does not divide the 512 tokens"):
        prompt_segments(Arrival(0.0, 600, 1, 0, ((0, 1),)), 48)


# ---------------------------------------------------------------------- in the simulator

MOONCAKE = read_trace(Path(str(files("arriero") / "data" / "mooncake_conversation_200.csv")))


def run(log: Path, policy: str, **facts: Any) -> Simulator:
    prompts = [replace(a, prompt_tokens=min(a.prompt_tokens, 20_000)) for a in MOONCAKE.arrivals]
    cut = [replace(a, prefix_blocks=tuple(_cut(a))) for a in prompts]
    config = SimulatorConfig(
        engine=SimEngineConfig(
            num_blocks=2000, with_contents=False, prefix_caching=True, step_time=StepTimeModel(b=0.02), block_bytes=4096
        ),
        num_instances=3,
        scheduler=scheduler_config(policy),
        **facts,
    )
    events: list[EventLog] = []

    def make_events(clock: Any) -> EventLog:
        events.append(EventLog(clock, log))
        return events[0]

    simulator = Simulator(config, Workload("mooncake", cut), make_events=make_events)
    result = simulator.run()
    events[0].close()
    simulator.check_integrity()
    assert all(r.num_output == r.arrival.output_tokens for r in result.records)
    return simulator


def _cut(arrival: Arrival) -> list[tuple[int, int]]:
    ids = list(arrival.prefix_ids())[: -(-arrival.prompt_tokens // 512)]
    return [(i, i) for i in ids]


@pytest.mark.parametrize("policy", ["round_robin", "llumnix"])
def test_bulk_and_single_steps_give_the_same_bytes_with_a_prefix_cache(tmp_path: Path, policy: str) -> None:
    logs = []
    for max_steps in (128, 1):
        simulator = run(tmp_path / f"{max_steps}", policy, max_steps=max_steps)
        logs.append((tmp_path / f"{max_steps}").read_bytes())
        assert sum(i.engine.num_hit for i in simulator.instances) > 0
    assert logs[0] == logs[1]
