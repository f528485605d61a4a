"""What a simulation is made of: the scheduler that a policy's name stands for, the engines, and the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from arriero.core.config import CopyConfig, MigrationConfig, RecoveryConfig, SchedulerConfig
from arriero.core.errors import ConfigError
from arriero.core.policies import policy_config
from arriero.sim.config import SimEngineConfig
from arriero.sim.kills import Kill, check_kills
from arriero.sim.network import NetworkConfig
from arriero.sim.profiles import Profile

BLIND = frozenset({"round_robin", "least_outstanding", "power_of_two", "cache_aware"})
"""Dispatch policies that look at no snapshot: none is made for them, unless requests are rebalanced."""

CLAIRVOYANT = "clairvoyant"
"""A policy of the simulator alone: `arriero` that knows when each request will end, and who will come within a horizon.
It shows what is left to gain.
"""

HORIZON_S = 5.0
PATIENCE_S = 30.0  # of a long prompt that short ones go before


def scheduler_config(policy: str, seed: int = 0, horizon_s: float = HORIZON_S) -> SchedulerConfig:
    """What ``--policy`` means; ``horizon_s`` is that of the clairvoyant. Raises ConfigError."""
    if policy == CLAIRVOYANT:
        config = policy_config("arriero")
        assert config.queueing is not None
        queueing = replace(
            config.queueing,
            trusts_max_tokens=True,
            horizon_s=horizon_s,
            patience_s=PATIENCE_S,
            ttft_target_s_per_token=0.0,  # by arrival behind those
        )
        return replace(config, queueing=queueing, seed=seed)
    return replace(policy_config(policy), seed=seed)


def engine_config(profile: Profile, **facts: Any) -> SimEngineConfig:
    """An engine of this profile; ``facts`` override fields, like ``max_num_seqs``."""
    defaults = {
        "num_blocks": profile.kv_tokens // profile.block_size,
        "block_size": profile.block_size,
        "block_bytes": profile.block_size * profile.kv_bytes_per_token,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "step_time": profile.step_time,
        "with_contents": False,
    }
    return SimEngineConfig(**{**defaults, **facts})


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorConfig:
    """A cluster of equal instances. ``max_steps``: alike steps taken at once; 1 gives the same log, slowly."""

    engine: SimEngineConfig
    num_instances: int = 1
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    copy: CopyConfig = field(default_factory=CopyConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    prefill_first: bool = False  #: as vLLM v0 schedules
    max_steps: int = 128
    launch_s: float = 30.0  #: from the decision to start an instance until it serves
    sample_s: float = 0.0  #: between two samples of the instances' memory; 0: none
    kills: tuple[Kill, ...] = ()  #: instances that die; each is replaced, after ``launch_s``

    def __post_init__(self) -> None:
        for name in ("num_instances", "max_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} is invalid: it must be 1 or more")
        if self.launch_s < 0:
            raise ConfigError(f"launch_s={self.launch_s!r} is invalid: it must be 0 or more seconds")
        if self.sample_s < 0:
            raise ConfigError(f"sample_s={self.sample_s!r} is invalid: it must be 0 or more seconds")
        check_kills(self.kills, self.num_instances, may_grow=self.scheduler.scaling is not None)

    @property
    def effective_scheduler(self) -> SchedulerConfig:
        """The scheduler as it runs here: a policy's mistake stops the run, and where instances die requests wait for
        the next one as long as a server has them wait.
        """
        config = replace(self.scheduler, policy_errors_stop=True)
        if self.kills and not config.no_instance_timeout_s:
            patience_s = max(RecoveryConfig().no_instance_timeout_s, 2 * self.launch_s)
            config = replace(config, no_instance_timeout_s=patience_s)
        return config

    @property
    def effective_engine(self) -> SimEngineConfig:
        """An engine as it runs here: what it does when its memory has run out is a part of the policy."""
        return replace(self.engine, preemption=self.scheduler.preemption)
