"""What a simulated engine is told at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import msgspec

from arriero.core.config import PreemptionConfig, StepConfig
from arriero.core.errors import ConfigError
from arriero.sim.step_time import StepTimeModel
from arriero.sim.tokens import DEFAULT_VOCAB_SIZE

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimEngineConfig:
    """Size and habits of a simulated engine; the names are vLLM's where it has one."""

    num_blocks: int = 512
    block_size: int = 16  #: tokens a block
    block_bytes: int = 1024
    with_contents: bool = True  #: False: blocks are only counted and every token is 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    itl_target_s: float = 0.0  #: see StepConfig
    preemption: PreemptionConfig | None = None  #: None: vLLM's own
    max_model_len: int = 0  #: 0: what the blocks hold
    vocab_size: int = DEFAULT_VOCAB_SIZE
    priority_scheduling: bool = False  #: lower number sooner; otherwise first come, first served
    admit_whole_prompt: bool = True  #: a request waits until its whole prompt fits, not just the first chunk
    async_scheduling: bool = False  #: the process handles its input while a step runs, not between steps
    prefix_caching: bool = False  #: for the simulator: full blocks of equal prefixes are computed once
    eos_probability: float = 0.0  #: of each token, unless the request ignores the end
    eos_token_id: int = 2
    crash_token_id: int = -1  #: the engine dies when it computes this token, as real ones do of some requests
    crash_length: int = 0  #: the engine dies when a sequence reaches so many tokens; 0: never
    step_time: StepTimeModel = field(default_factory=StepTimeModel)

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is invalid: it must be 1 or more")
        StepConfig(itl_target_s=self.itl_target_s)
        if not 0 <= self.eos_probability < 1:
            raise ConfigError(f"eos_probability={self.eos_probability} is invalid: it must be in [0, 1)")
        capacity = self.num_blocks * self.block_size
        if not 0 <= self.max_model_len <= capacity:
            raise ConfigError(
                f"max_model_len={self.max_model_len} is invalid: {self.num_blocks} blocks of {self.block_size} tokens "
                f"hold {capacity}, so one request of that length would never fit"
            )
        if not self.max_model_len:
            object.__setattr__(self, "max_model_len", capacity)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SimEngineConfig:
        """From JSON; ``time_scale`` stands for ``step_time.scale``. Raises ConfigError."""
        values = dict(values)
        time_scale = values.pop("time_scale", None)
        config = from_dict(cls, values, "engine")
        if time_scale is not None:
            config = replace(config, step_time=replace(config.step_time, scale=float(time_scale)))
        return config


def from_dict(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A config dataclass from JSON values. Raises ConfigError, naming what is unknown or of a wrong type."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"{where}: {', '.join(unknown)} is unknown: it takes {', '.join(sorted(known))}")
    try:
        return msgspec.convert(dict(values), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
