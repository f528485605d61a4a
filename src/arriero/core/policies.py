"""Policies by name: a name stands for a whole set of rules."""

from __future__ import annotations

from dataclasses import replace

from arriero.core.config import (
    LoadConfig,
    PreemptionConfig,
    QueueingConfig,
    QueueTerm,
    RebalancingConfig,
    RebalancingRule,
    SchedulerConfig,
)
from arriero.core.dispatch import DISPATCH_POLICIES
from arriero.core.errors import ConfigError

_TARGETS = ((-1, 0.1175),)  # the paper's 1,600 of 13,616 tokens, where requests of priority -1 and below run
_PAPER = RebalancingConfig(
    rule=RebalancingRule.PAPER, low_freeness=3.0, high_freeness=3.0, cooldown_s=0.0, max_migrations_per_instance=1
)

POLICIES: dict[str, SchedulerConfig] = {
    "arriero": SchedulerConfig(
        dispatch_policy="prefix_freeness",
        load=LoadConfig(queue_term=QueueTerm.ALL, load_targets=_TARGETS),
        queueing=QueueingConfig(),
        rebalancing=RebalancingConfig(),
        preemption=PreemptionConfig(),
    ),
    "llumnix": SchedulerConfig(dispatch_policy="freeness", load=LoadConfig(load_targets=_TARGETS), rebalancing=_PAPER),
    "llumnix_artifact": SchedulerConfig(
        dispatch_policy="freeness",
        load=LoadConfig(queue_term=QueueTerm.ALL, load_targets=_TARGETS),
        rebalancing=replace(_PAPER, low_freeness=10.0, high_freeness=10.0),
    ),
    "infaas": SchedulerConfig(dispatch_policy="freeness", load=LoadConfig(queue_term=QueueTerm.ALL)),
    **{name: SchedulerConfig(dispatch_policy=name) for name in DISPATCH_POLICIES},
}
"""`arriero` is the default. `llumnix` is the paper; `llumnix_artifact` counts all who wait, as its artifact does, and
has the thresholds that the paper takes for M-M and S-L. `infaas` is its INFaaS++: dispatch by freeness, no migration.
"""


def policy_config(name: str) -> SchedulerConfig:
    """All rules that ``name`` stands for; a dotted path is a dispatch policy of the user's own. Raises ConfigError."""
    if name in POLICIES:
        return POLICIES[name]
    if "." not in name:
        raise ConfigError(
            f"policy {name!r} is unknown: use one of {', '.join(POLICIES)} or the dotted path of your own class"
        )
    return SchedulerConfig(dispatch_policy=name)
