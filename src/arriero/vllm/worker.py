"""Worker extension: export and import of KV blocks beside the model's steps, and the V1 runner's state.

vLLM mixes this class into its worker (`--worker-extension-cls`). Long copies run on a thread of the worker
that takes its orders from a socket of its own: `collective_rpc` from a second thread would hang the engine,
and through the first one every copy would wait for a step.
"""

from __future__ import annotations

import atexit
import mmap
import threading
import warnings
from typing import Any

import msgspec
import numpy as np
import torch
import zmq
from msgspec import structs

from arriero.core.errors import ArrieroError, TransportError
from arriero.transport.checksum import FIELD as CHECKSUM
from arriero.transport.port import BlockTransport
from arriero.transport.shm import SharedMemoryTransport
from arriero.vllm.blocks import BlockLayout, KvBlocks, Pacer


class CopyJob(msgspec.Struct, frozen=True, kw_only=True):
    """An order to the copy thread."""

    migration_id: str
    kind: str  #: "export", "import" or "release"
    block_ids: list[int] = []
    ticket: Any = None  #: import: of this rank
    share: float = 1.0  #: of the time


class CopyDone(msgspec.Struct, frozen=True, kw_only=True):
    """Its report."""

    migration_id: str
    rank: int
    ticket: Any = None  #: export
    num_bytes: int = 0
    copy_s: float = 0.0
    error: str | None = None


class RestOfImport(msgspec.Struct, frozen=True, kw_only=True):
    """The last blocks of a request that is admitted."""

    migration_id: str
    block_ids: list[int]
    tickets: list[Any]  #: by rank


class ArrieroWorkerExtension:
    """Methods that the engine calls with `collective_rpc`; all names start with ``arriero_``."""

    rank: int
    model_runner: Any

    # ------------------------------------------------------------------ life

    def arriero_open(
        self, orders: str, reports: str, prefix: str, slice_bytes: int, stage_bytes: int
    ) -> dict[str, Any]:
        """Open the transport and start the copy thread; returns the block layout, or why there is none."""
        self._arriero_spare_generators()
        try:
            self._arriero_blocks = KvBlocks(self.model_runner.kv_caches, self.model_runner.kv_cache_config.num_blocks)
        except ArrieroError as error:
            return {"error": str(error)}
        self._arriero_slice_bytes = slice_bytes
        self._arriero_transport: BlockTransport = SharedMemoryTransport(f"{prefix}-r{self.rank}")
        atexit.register(self._arriero_transport.close)
        self._arriero_touch(stage_bytes)
        # Staged bytes of a peer are mapped read-only; they are only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        threading.Thread(
            target=self._arriero_copy_loop, args=(f"{orders}-{self.rank}", reports), daemon=True, name="arriero copies"
        ).start()
        return {"layout": msgspec.to_builtins(self._arriero_blocks.layout)}

    def _arriero_touch(self, num_bytes: int) -> None:
        """Have staging memory ready: the first touch of a page costs more than the copy into it."""
        stage = np.frombuffer(self._arriero_transport.stage("touch", num_bytes), dtype=np.uint8)
        stage[:: mmap.PAGESIZE] = 0
        self._arriero_transport.release("touch")

    def _arriero_copy_loop(self, orders: str, reports: str) -> None:
        context = zmq.Context()
        inbox = context.socket(zmq.PULL)
        inbox.bind(orders)
        outbox = context.socket(zmq.PUSH)
        outbox.connect(reports)
        decoder = msgspec.msgpack.Decoder(CopyJob)
        while True:
            job = decoder.decode(inbox.recv())
            if job.kind == "release":
                self._arriero_transport.release(job.migration_id)
            else:
                outbox.send(msgspec.msgpack.encode(self._arriero_run(job)))

    def _arriero_run(self, job: CopyJob) -> CopyDone:
        pacer = Pacer(job.share, self._arriero_slice_bytes)
        try:
            return self._arriero_copy(job, pacer)
        except ArrieroError as error:
            return CopyDone(migration_id=job.migration_id, rank=self.rank, error=str(error))
        except Exception as error:  # noqa: BLE001 - a process edge: the thread must go on, the migration aborts
            return CopyDone(migration_id=job.migration_id, rank=self.rank, error=f"{type(error).__name__}: {error}")

    def _arriero_copy(self, job: CopyJob, pacer: Pacer) -> CopyDone:
        layout = self._arriero_blocks.layout
        num_bytes = len(job.block_ids) * layout.bytes_per_block
        ticket = None
        if job.kind == "export":
            stage = self._arriero_transport.stage(job.migration_id, num_bytes)
            checksum = self._arriero_blocks.gather(job.block_ids, stage, pacer)
            ticket = {
                "layout": msgspec.to_builtins(layout),
                "num_blocks": len(job.block_ids),
                CHECKSUM: checksum.value,
                "transport": self._arriero_transport.ticket(job.migration_id),
            }
        else:
            _check_ticket(job.ticket, layout, len(job.block_ids))
            stage = self._arriero_transport.fetch(job.ticket["transport"])
            self._arriero_blocks.scatter(job.block_ids, stage, pacer).require(job.ticket)
        return CopyDone(
            migration_id=job.migration_id, rank=self.rank, ticket=ticket, num_bytes=num_bytes, copy_s=pacer.finish()
        )

    # ------------------------------------------------------------------ in the pause

    def arriero_export_rest(
        self, migration_id: str, request_id: str, block_ids: list[int]
    ) -> tuple[CopyDone | None, bytes | None]:
        """The last blocks and the sampler's state, between two steps."""
        done = None
        if block_ids:
            done = self._arriero_run(CopyJob(migration_id=migration_id, kind="export", block_ids=block_ids))
        return done, self._arriero_generator_state(request_id)

    # ------------------------------------------------------------------ state of the V1 model runner

    def _arriero_spare_generators(self) -> None:
        """Let no request draw from its generator before its whole prompt is computed.

        vLLM samples from every request of a step, and takes back the draws of those whose prompts are not done by the
        generator's offset. Generators on a CPU have none: the first seeded prompt in parts would end the engine.
        """
        runner = self.model_runner
        if getattr(self, "use_v2_model_runner", False) or runner.device.type != "cpu":
            return
        sample = runner.sample_tokens

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            generators, discarded = runner.input_batch.generators, runner.discard_request_mask.np
            spared = {i: generators.pop(i) for i in list(generators) if discarded[i]}
            try:
                return sample(*args, **kwargs)
            finally:
                generators.update(spared)

        runner.sample_tokens = sample_tokens

    def _arriero_generator_state(self, request_id: str) -> bytes | None:
        state = getattr(self.model_runner, "requests", {}).get(request_id)
        generator = getattr(state, "generator", None)
        return None if generator is None else bytes(generator.get_state().numpy().tobytes())

    def arriero_admit(self, state: dict[str, Any], sampler_state: bytes | None, rest: RestOfImport | None) -> CopyDone:
        """Import the last blocks, then let the model runner know the request, between two steps."""
        done = CopyDone(migration_id="", rank=self.rank)
        if rest is not None:
            job = CopyJob(migration_id=rest.migration_id, kind="import", block_ids=rest.block_ids)
            done = self._arriero_run(structs.replace(job, ticket=rest.tickets[self.rank]))
        if done.error is None:
            self._arriero_add_to_runner(state, sampler_state)
        return done

    def _arriero_add_to_runner(self, state: dict[str, Any], sampler_state: bytes | None) -> None:
        """Let the V1 runner know a request that arrives with output tokens.

        It keeps prompt and output apart, which the resumed path alone would not. The V2 runner takes a resumed
        request as new, with all its tokens, and its sampler has no state (a hash of seed and position).
        """
        if getattr(self, "use_v2_model_runner", False):
            return
        from arriero.vllm.compat import CachedRequestState, SamplingType

        params = state["sampling_params"]
        generator = None
        if params.sampling_type == SamplingType.RANDOM_SEED:
            generator = torch.Generator(device=self.model_runner.device)
            if sampler_state is not None:
                generator.set_state(torch.frombuffer(bytearray(sampler_state), dtype=torch.uint8))
            else:
                _fast_forward(generator, params.seed, len(state["output_token_ids"]))
        self.model_runner.requests[state["req_id"]] = CachedRequestState(mm_features=[], generator=generator, **state)


def _fast_forward(generator: torch.Generator, seed: int, num_tokens: int) -> None:
    """The state after ``num_tokens`` sampled tokens: the CPU sampler draws once a token."""
    generator.manual_seed(seed)
    for _ in range(num_tokens):
        torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long, device=generator.device)


def _check_ticket(ticket: Any, layout: BlockLayout, num_blocks: int) -> None:
    theirs = msgspec.convert(ticket["layout"], BlockLayout)
    if theirs != layout:
        raise TransportError(f"incompatible KV layouts: source has {theirs}, destination has {layout}")
    if ticket["num_blocks"] != num_blocks:
        raise TransportError(f"{ticket['num_blocks']} blocks were exported, {num_blocks} are to be imported")
