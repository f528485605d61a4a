"""`arriero calibrate MODEL`: how long the steps of one engine take, as a profile for `arriero simulate --profile`.

The engine is vLLM's EngineCore in this process, with its worker in its own, as in an instance of `arriero serve` with
the same flags, on the cores of its first instance. What is timed is a step as the engine's loop sees it: scheduling,
the model, sampling, and taking in the outputs. Not in it: the front end, HTTP, and other instances on the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from vllm.platforms import current_platform

from arriero.core.errors import ConfigError
from arriero.launch.placement import split_cores
from arriero.sim.fit import FitErrors, StepPoint, fit_step_time
from arriero.sim.profiles import Profile, write_profile
from arriero.tables import output, print_table
from arriero.vllm import compat
from arriero.vllm.arguments import ServeOptions, parse
from arriero.vllm.compat import EngineCore, Executor, SamplingParams
from arriero.vllm.warm_up import own_request

DECODES: tuple[tuple[int, int], ...] = (
    *((1, 64), (1, 512), (1, 1536), (2, 256), (4, 64), (4, 512), (4, 1024), (8, 64), (8, 384), (8, 768)),
    *((16, 64), (16, 256), (16, 512), (32, 64), (32, 256), (64, 64)),
)
PREFILLS = (16, 32, 64, 128, 256, 512, 1024, 2048)
CHUNKS = ((64, 512), (256, 512), (64, 1536), (256, 1536), (512, 1024))
MIXED = ((4, 256, 64), (4, 256, 256), (8, 256, 128), (8, 256, 512), (16, 128, 64), (16, 128, 256), (16, 128, 1024))
"""(sequences, tokens of each); new tokens; (new tokens, computed before); (sequences, tokens of each, new tokens)."""

DECODE_STEPS = 9
SETTLING_STEPS = 2  #: the first steps of a new batch build its state
REPEATS = 3  #: of a prefill, unless one takes long: what disturbs it is small beside it
LONG_S = 2.0  #: of a prefill's repeats together, from which there is no other
MEMORY_SHARE = 0.9  #: of the KV memory, at most


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits into the engine, in tokens and sequences."""

    kv_tokens: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def fits(self, num_seqs: int, tokens_of_each: int, new_tokens: int = 0) -> bool:
        """Whether so many sequences decode here beside a prefill of ``new_tokens``, without a preemption."""
        size, slack = self.block_size, SETTLING_STEPS + DECODE_STEPS + 2
        blocks = num_seqs * -(-(tokens_of_each + slack) // size) + -(-(new_tokens + slack) // size)
        longest = max(tokens_of_each + slack, new_tokens + slack)
        return (
            longest <= self.max_model_len
            and num_seqs + bool(new_tokens) <= self.max_num_seqs
            and num_seqs + new_tokens <= self.max_num_batched_tokens
            and blocks * size <= MEMORY_SHARE * self.kv_tokens
        )


class Bench:
    """An engine whose steps are timed, one by one."""

    def __init__(
        self, engine: Any, limits: Limits, vocab_size: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._limits = limits
        self._rng = random.Random(0)
        self._vocab_size = vocab_size
        self._num_requests = 0
        self._last_s = 0.0

    def points(self, progress: Callable[[float], None] = lambda share: None) -> Iterator[StepPoint]:
        """Measure all that fits; each point is the median of some steps. ``progress`` is told the share done."""
        fits, size = self._limits.fits, self._limits.block_size
        self._prefill(min(256, self._limits.max_num_batched_tokens // 2), 0)  # the first step of all is slow
        chunks = [(new, before - before % size) for new, before in CHUNKS]  # a prefix cache holds whole blocks
        wanted: list[Callable[[], StepPoint | None]] = [
            *(partial(self._decode, num, context) for num, context in DECODES if fits(num, context)),
            *(partial(self._prefill, new, 0) for new in PREFILLS if fits(0, 0, new)),
            *(partial(self._chunk, new, before) for new, before in chunks if before and fits(0, 0, before + new)),
            *(partial(self._mixed, num, context, new) for num, context, new in MIXED if fits(num, context, new)),
        ]
        for done, measure in enumerate(wanted, start=1):
            if point := measure():
                yield point
            progress(done / len(wanted))

    # ------------------------------------------------------------------ kinds of steps

    def _decode(self, num_seqs: int, context: int) -> StepPoint:
        with self._decoding(num_seqs, context) as requests:
            tokens, times = [], []
            for _ in range(DECODE_STEPS):
                tokens.append(sum(r.num_tokens for r in requests))
                times.append(self._step()[0])
        return StepPoint((), num_seqs, int(median(tokens)), 1e3 * median(times))

    def _chunk(self, new: int, before: int) -> StepPoint | None:
        """None if there is no prefix cache that has what came before."""
        point = self._prefill(new, before)
        return point if point.prefills[0][1] == before else None

    def _prefill(self, new: int, before: int) -> StepPoint:
        times: list[float] = []
        cached = 0
        while self._repeats(times):
            prefix = self._tokens(before)
            if before:
                self._run([self._add(prefix, 1)])
            request = self._add(prefix + self._tokens(new), 1)
            seconds, outputs = self._first_token(request)
            times.append(seconds)
            stats = outputs[request.request_id].prefill_stats
            cached = stats.num_cached_tokens if stats is not None else 0
        return StepPoint(((new + before - cached, cached),), 0, 0, 1e3 * median(times))

    def _mixed(self, num_seqs: int, context: int, new: int) -> StepPoint:
        times: list[float] = []
        while self._repeats(times):
            with self._decoding(num_seqs, context) as requests:
                newcomer = self._add(self._tokens(new), 1)
                tokens = sum(r.num_tokens for r in requests)
                times.append(self._first_token(newcomer)[0])
        return StepPoint(((new, 0),), num_seqs, tokens, 1e3 * median(times))

    @staticmethod
    def _repeats(times: Sequence[float]) -> bool:
        """Whether a prefill is measured once more."""
        return len(times) < REPEATS and sum(times) < LONG_S

    # ------------------------------------------------------------------ requests and steps

    @contextmanager
    def _decoding(self, num_seqs: int, context: int) -> Iterator[list[Any]]:
        """So many sequences that decode, with contexts of so many tokens."""
        requests = [self._add(self._tokens(context), self._limits.max_model_len - context) for _ in range(num_seqs)]
        while not all(r.num_output_tokens for r in requests):
            self._step()
        for _ in range(SETTLING_STEPS):
            self._step()
        try:
            yield requests
        finally:
            self._engine.abort_requests([r.request_id for r in requests])
            self._drain()

    def _add(self, tokens: list[int], max_tokens: int) -> Any:
        self._num_requests += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = own_request(self._engine, f"calibrate-{self._num_requests}", tokens, params)
        self._engine.add_request(request)
        if not self._engine.batch_queue:  # no step is in flight: the next one begins now
            self._last_s = self._clock()
        return request

    def _step(self) -> tuple[float, dict[str, Any]]:
        """Until the next batch is done: seconds since the last one, and the outputs by request."""
        while True:
            outputs, executed = self._engine.step_fn()
            self._engine.post_step(executed)
            if outputs is not None:  # None: under asynchronous scheduling, a batch was only submitted
                break
        now = self._clock()
        seconds, self._last_s = now - self._last_s, now
        return seconds, {o.request_id: o for group in outputs.values() for o in group.outputs}

    def _first_token(self, request: Any) -> tuple[float, dict[str, Any]]:
        while True:
            seconds, outputs = self._step()
            if request.request_id in outputs:
                self._drain_finished()
                return seconds, outputs

    def _run(self, requests: Sequence[Any]) -> None:
        while not all(r.is_finished() for r in requests):
            self._step()
        self._drain_finished()

    def _drain_finished(self) -> None:
        """Let the worker hear of requests that ended, which it does with the next step, outside of what is timed."""
        if not self._engine.scheduler.running:
            self._drain()

    def _drain(self) -> None:
        while self._engine.scheduler.has_requests() or self._engine.batch_queue:
            self._step()

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(100, min(self._vocab_size, 40_000)) for _ in range(count)]


# ---------------------------------------------------------------------- the command


def calibrate(args: argparse.Namespace, options: ServeOptions) -> tuple[Profile, list[StepPoint], FitErrors]:
    """Start the engine, measure, fit. Raises ConfigError."""
    from arriero.vllm.instance_specs import engine_config

    vllm_config = engine_config(args, options)
    cores = split_cores(sorted(os.sched_getaffinity(0)), options.num_instances)[0]
    if current_platform.is_cpu() and options.pin_cores:
        os.sched_setaffinity(0, cores)
    engine = EngineCore(vllm_config, Executor.get_class(vllm_config), log_stats=True)
    try:
        limits = _limits(engine)
        started = time.monotonic()
        bench = Bench(engine, limits, vllm_config.model_config.get_vocab_size())
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("measuring", total=1.0)
            points = list(bench.points(lambda share: progress.update(task, completed=share)))
        seconds = time.monotonic() - started
        model, errors = fit_step_time(points)
        cache = engine.scheduler.kv_cache_config
        block_bytes = sum(t.size for t in cache.kv_cache_tensors) // cache.num_blocks
    finally:
        engine.shutdown()
    name = Path(args.model).name
    return (
        Profile(
            name=name,
            step_time=model,
            kv_tokens=limits.kv_tokens,
            kv_bytes_per_token=block_bytes // limits.block_size,
            block_size=limits.block_size,
            provenance={
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": "arriero " + " ".join(sys.argv[1:]),
                "cores": sorted(cores) if current_platform.is_cpu() else None,
                "async_scheduling": bool(vllm_config.scheduler_config.async_scheduling),
                "what": "steps of one engine alone: scheduling, model, sampling; no front end, no HTTP",
                "measuring_s": round(seconds, 1),
                "mape": {kind: round(value, 2) for kind, value in errors.mape.items()},
                "worst": round(errors.worst, 2),
                "points": [
                    [list(map(list, p.prefills)), p.num_decodes, p.context_tokens, round(p.ms, 4)] for p in points
                ],
            },
        ),
        points,
        errors,
    )


def _limits(engine: Any) -> Limits:
    scheduler, config = engine.scheduler, engine.vllm_config
    cache = scheduler.kv_cache_config
    return Limits(
        kv_tokens=(cache.num_blocks - 1) * scheduler.block_size,  # block 0 is vLLM's null block
        block_size=scheduler.block_size,
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
    )


def main(argv: list[str]) -> int:
    """Run it; the exit code: 0, or 2 for bad arguments or surroundings."""
    own = argparse.ArgumentParser(prog="arriero calibrate", add_help=False, allow_abbrev=False)
    own.add_argument("--output", type=Path, help="the file to write (default: MODEL.json)")
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\nusage: arriero calibrate MODEL [--output FILE] [any flag of arriero serve]\n")
        return 0 if argv else 2
    mine, rest = own.parse_known_args(argv)
    try:
        compat.self_check()
        args, options = parse(rest)
        output = mine.output or Path(f"{Path(args.model).name}.json")
        if not output.absolute().parent.is_dir():
            raise ConfigError(f"--output {output}: there is no folder {output.absolute().parent}")
        profile, points, errors = calibrate(args, options)
    except ConfigError as error:
        sys.stderr.write(f"arriero calibrate: {error}\n")
        return 2
    write_profile(profile, output)
    _show(profile, points, errors)
    print(f"written to {output}; try: arriero simulate --profile {output} --workload M-M --rate 1 --instances 2")
    return 0


def _show(profile: Profile, points: Sequence[StepPoint], errors: FitErrors) -> None:
    model = profile.step_time
    headings = ("kind", "new tokens", "before", "sequences", "context", "measured", "fitted", "error %")
    rows = []
    for p in points:
        fitted = model.step_ms(p.prefills, p.num_decodes, p.context_tokens)
        new, before = p.prefills[0] if p.prefills else ("", "")
        numbers = (f"{p.ms:.2f}", f"{fitted:.2f}", f"{100 * (fitted / p.ms - 1):+.1f}")
        rows.append((p.kind, str(new), str(before), str(p.num_decodes), str(p.context_tokens), *numbers))
    print_table(f"{profile.name}: ms of a step", headings, rows)
    console = output()
    a, b, c, d, e = model.a, model.b, model.c, model.d, model.e
    console.print(
        f"t = max({model.a_mem:.4g}, {a:.4g} + {b:.4g} (P+B)) + {c:.4g} sum P (C + P/2) + {d:.4g} B + {e:.4g} S"
    )
    means = ", ".join(f"{kind} {value:.1f} %" for kind, value in errors.mape.items())
    console.print(f"mean absolute error: {means}; worst {errors.worst:.1f} %")
