"""How fast this machine is, and the rate that is a given load for it: so a bench means the same anywhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from arriero.bench.server import die_with_parent, log_file, say
from arriero.core.errors import ArrieroError
from arriero.sim.profiles import Profile, read_profile
from arriero.sim.step_time import StepTimeModel
from arriero.workload.workload import Arrival

CALIBRATION_KV_BYTES = 1 << 29
BATCH = 4  #: sequences that decode together, for the estimate of what a request costs


def rate_of(load: float, arrivals: Iterable[Arrival], instances: int, model: StepTimeModel) -> float:
    """Requests a second with which ``instances`` work ``load`` of the time."""
    return load * instances / (fmean(work_ms(model, a.prompt_tokens, a.output_tokens) for a in arrivals) / 1e3)


def work_ms(model: StepTimeModel, prompt_tokens: int, output_tokens: int) -> float:
    """Time of an engine that a request takes, when it decodes among ``BATCH`` sequences."""
    context = prompt_tokens + output_tokens // 2
    decode = model.step_ms([], BATCH, BATCH * context) / BATCH
    # Its prefill shares a step with the others' decodes, which pay for reading the weights.
    return model.step_ms([(prompt_tokens, 0)], 0, 0) - model.step_ms([(1, 0)], 0, 0) + output_tokens * decode


def calibrated(model: str, path: Path, flags: Sequence[str], instances: int) -> Profile:
    """The profile of one engine alone, from ``path`` or measured into it. Raises ArrieroError."""
    if not path.exists():
        say("calibrating one engine")
        command = [sys.executable, "-m", "arriero.cli", "calibrate", model, "--output", str(path), *flags]
        command += ["--kv-cache-memory-bytes", str(CALIBRATION_KV_BYTES)]  # room for large batches
        with log_file("calibrate").open("wb") as log:
            done = subprocess.run(
                [*command, "--instances", str(instances)], stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        if done.returncode:
            raise ArrieroError(f"arriero calibrate ended with exit code {done.returncode}: see {log.name}")
    return read_profile(path)
