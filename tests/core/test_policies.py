"""Policies by name: each stands for a whole set of rules."""

from __future__ import annotations

import pytest

from arriero.core.config import QueueTerm, RebalancingRule
from arriero.core.errors import ConfigError
from arriero.core.policies import POLICIES, policy_config
from arriero.core.scheduler import GlobalScheduler


@pytest.mark.parametrize("name", POLICIES)
def test_every_name_makes_a_scheduler(name: str) -> None:
    assert GlobalScheduler(policy_config(name)).config == POLICIES[name]


def test_the_default_binds_late_and_rebalances_and_the_paper_does_not_bind_late() -> None:
    arriero, llumnix, infaas = (policy_config(n) for n in ("arriero", "llumnix", "infaas"))
    assert arriero.queueing is not None
    assert arriero.rebalancing is not None
    assert arriero.rebalancing.rule is RebalancingRule.RELIEF
    assert llumnix.queueing is None
    assert llumnix.rebalancing is not None
    assert llumnix.rebalancing.rule is RebalancingRule.PAPER
    assert infaas.rebalancing is None
    assert infaas.load.queue_term is QueueTerm.ALL


def test_a_dotted_path_is_a_dispatch_policy_of_the_users_own() -> None:
    assert policy_config("my.Policy").dispatch_policy == "my.Policy"


def test_an_unknown_name_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(
        ConfigError, match="policy 'magic' is unknown: use one of arriero, llumnix, llumnix_artifact, infaas"
    ):
        policy_config("magic")
