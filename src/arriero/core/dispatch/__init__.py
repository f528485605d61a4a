"""Dispatch: which instance takes a new request. One rule a file; all are pure."""

from __future__ import annotations

import importlib
from typing import cast

from arriero.core.dispatch.cache_aware import CacheAware
from arriero.core.dispatch.least_outstanding import LeastOutstanding
from arriero.core.dispatch.max_freeness import MaxFreeness
from arriero.core.dispatch.port import DispatchPolicy
from arriero.core.dispatch.power_of_two import PowerOfTwo
from arriero.core.dispatch.prefix_freeness import PrefixFreeness
from arriero.core.dispatch.round_robin import RoundRobin
from arriero.core.dispatch.vllm_dp import VllmDataParallel
from arriero.core.errors import ConfigError
from arriero.core.view import ClusterView

__all__ = [
    "DISPATCH_POLICIES",
    "CacheAware",
    "ClusterView",
    "DispatchPolicy",
    "LeastOutstanding",
    "MaxFreeness",
    "PowerOfTwo",
    "PrefixFreeness",
    "RoundRobin",
    "VllmDataParallel",
    "make_dispatch_policy",
]


def make_dispatch_policy(name: str) -> DispatchPolicy:
    """The policy called ``name``, or the class at a dotted path. Raises ConfigError."""
    if name in DISPATCH_POLICIES:
        return DISPATCH_POLICIES[name]()
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigError(
            f"dispatch policy {name!r} is unknown: use one of {', '.join(DISPATCH_POLICIES)} "
            "or the dotted path of your own class"
        )
    try:
        policy = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"dispatch policy {name!r} cannot be loaded: {error}") from error
    if not callable(getattr(policy, "choose", None)):
        raise ConfigError(f"dispatch policy {name!r} has no method choose(request, view)")
    return cast(DispatchPolicy, policy)


DISPATCH_POLICIES: dict[str, type[DispatchPolicy]] = {
    "freeness": MaxFreeness,
    "prefix_freeness": PrefixFreeness,
    "least_outstanding": LeastOutstanding,
    "round_robin": RoundRobin,
    "power_of_two": PowerOfTwo,
    "cache_aware": CacheAware,
    "vllm_dp": VllmDataParallel,
}
