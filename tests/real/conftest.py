"""Two real vLLM engines in child processes, the front end in this one; one pair for each dtype."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from arriero.core.types import MigrationMode, RequestSnapshot
from arriero.frontend.cluster import Cluster
from arriero.frontend.migrations import MigrationReport
from arriero.model.bundled import ensure_bundled_model
from arriero.model.dtype import fast_dtype

FLAGS = ["--served-model-name", "smollm2", "--instances", "2", "--max-model-len", "8192", "--enforce-eager"]
FLAGS += ["--block-size", "32", "--kv-cache-memory-bytes", "402653184", "--port", "0", "--disable-log-stats"]
FLAGS += ["--instances-per-gpu", "2"]  # one GPU is enough for them
FLAGS += ["--dtype", fast_dtype()]  # steps of bfloat16 take seconds where the CPU does not compute it


@dataclass
class Run:
    """What one request produced."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish: tuple[Any, Any] = (None, None)
    moves: list[MigrationReport] = field(default_factory=list)

    def same_as(self, other: Run) -> bool:
        return (self.tokens, self.text, self.logprobs, self.finish) == (
            other.tokens,
            other.text,
            other.logprobs,
            other.finish,
        )


@dataclass
class Move:
    """Move the request once ``at`` tokens have arrived."""

    at: int
    to: int
    mode: MigrationMode = MigrationMode.LIVE


class Engines:
    """Drives vLLM's AsyncLLM over the cluster."""

    def __init__(self, llm: Any, cluster: Cluster) -> None:
        self.llm = llm
        self.cluster = cluster
        self.tokenizer = llm.get_tokenizer()
        self._count = 0

    def prompt(self, num_tokens: int, offset: int = 0) -> list[int]:
        """Plain text as token ids: the licence of this project, repeated."""
        text = " ".join(f"Article {i}: the llama carries its load over pass number {i * 7}." for i in range(900))
        return self.tokenizer.encode(text)[offset : offset + num_tokens]

    def internal_id(self, name: str) -> str | None:
        """The live request that ``generate`` was called with ``name`` for."""
        return next((r.request_id for r in self.cluster.requests if r.external_id == name), None)

    def seen_at(self, instance: int) -> list[RequestSnapshot]:
        """What the scheduler has been told of the requests there, after the last step that it has heard of."""
        snapshot = self.cluster.scheduler.snapshot_of(instance)
        return [] if snapshot is None else list(snapshot.requests)

    async def run(self, prompt: Any, params: Any, moves: list[Move] | None = None, name: str | None = None) -> Run:
        """Generate, moving on the way; every move has ended when this returns."""
        self._count += 1
        name = name or f"test-{self._count}"
        pending, tasks, result = list(moves or []), [], Run()
        prompt = {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
        async for output in self.llm.generate(prompt, params, name):
            completion = output.outputs[0]
            result.tokens += list(completion.token_ids)
            result.text += completion.text
            result.finish = (completion.finish_reason, completion.stop_reason)
            if completion.logprobs:
                pairs = zip(completion.logprobs, completion.token_ids, strict=True)
                result.logprobs += [entry[token].logprob for entry, token in pairs]
            while pending and len(result.tokens) >= pending[0].at:
                move = pending.pop(0)
                request_id = self.internal_id(name)
                if request_id is not None:
                    tasks.append(asyncio.create_task(self._move(request_id, move, tasks[-1:])))
                    await asyncio.sleep(0)
        result.moves = [await task for task in tasks]
        return result

    async def _move(self, request_id: str, move: Move, earlier: list[asyncio.Task[Any]]) -> MigrationReport:
        await asyncio.gather(*earlier)
        request = self.cluster.requests.get(request_id)
        if request is not None and request.route == move.to:  # dispatch is free to choose
            return await self.cluster.migrate(request_id, 1 - move.to, move.mode)
        return await self.cluster.migrate(request_id, move.to, move.mode)

    async def forget_prefixes(self) -> None:
        """Empty both prefix caches: a warm one changes bf16 results by itself."""
        await self.llm.reset_prefix_cache()

    async def holdings(self) -> dict[int, dict[str, Any]]:
        """What the instances hold, after their books were checked."""
        ids = self.cluster.instances.ready_ids()
        return {i: await self.cluster.links.utility(i, "arriero_check") for i in ids}

    async def assert_no_leaks(self) -> None:
        """Everything is free, here and there, soon after the last request."""
        for _ in range(100):
            held = await self.holdings()
            if not self.cluster.migrations.open_migrations() and all(_is_empty(h) for h in held.values()):
                break
            await asyncio.sleep(0.05)
        assert not self.cluster.migrations.open_migrations()
        assert all(_is_empty(h) for h in held.values()), held
        assert len(self.cluster.requests) == 0


def _is_empty(held: dict[str, Any]) -> bool:
    return held["free_blocks"] == held["num_blocks"] and not any(
        held[k] for k in ("requests", "frozen", "parked", "reserved", "open")
    )


@contextlib.asynccontextmanager
async def start_engines(*flags: str) -> AsyncIterator[Engines]:
    """Two engines with the bundled model; ended at exit."""
    from arriero.vllm.arguments import parse
    from arriero.vllm.compat import cli_env_setup
    from arriero.vllm.instance_specs import engine_config
    from arriero.vllm.server import make_async_llm, running_cluster

    cli_env_setup()
    argv = [str(ensure_bundled_model()), *FLAGS, *flags]
    args, options = parse(argv)
    config = engine_config(args, options)
    async with running_cluster(args, options, config, argv) as cluster:
        llm = make_async_llm(config, cluster, args)
        try:
            yield Engines(llm, cluster)
        finally:
            await asyncio.to_thread(llm.shutdown)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(request: pytest.FixtureRequest) -> AsyncIterator[Engines]:
    """Module-wide engines; a module chooses flags with ``ENGINE_FLAGS``."""
    async with start_engines(*getattr(request.module, "ENGINE_FLAGS", ())) as started:
        yield started


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def no_leaks(engines: Engines) -> AsyncIterator[None]:
    """No test may leave anything behind."""
    await engines.forget_prefixes()
    yield
    await engines.assert_no_leaks()
