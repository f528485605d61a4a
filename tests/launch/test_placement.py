"""Placement: equal, disjoint shares of the machine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.core.errors import ConfigError
from arriero.launch.placement import split_cores, split_devices

repeatable = settings(deadline=None, derandomize=True, database=None)

core_sets = st.sets(st.integers(0, 300), min_size=1, max_size=64)


@repeatable
@given(core_sets, st.integers(1, 80))
def test_every_instance_gets_cores_of_the_machine_and_all_get_the_same_number(cores: set[int], instances: int) -> None:
    shares = split_cores(list(cores), instances)
    assert len(shares) == instances
    assert all(share <= cores for share in shares)
    assert {len(share) for share in shares} == {max(1, len(cores) // instances)}


@repeatable
@given(core_sets, st.integers(1, 64))
def test_no_core_is_shared_while_there_are_enough(cores: set[int], instances: int) -> None:
    shares = split_cores(list(cores), instances)
    if instances <= len(cores):
        assert len(frozenset().union(*shares)) == sum(map(len, shares))


@repeatable
@given(core_sets, st.integers(1, 80))
def test_with_too_few_cores_no_core_gets_two_instances_more_than_another(cores: set[int], instances: int) -> None:
    shares = split_cores(list(cores), instances)
    if instances > len(cores):
        counts = [sum(core in share for share in shares) for core in cores]
        assert max(counts) - min(counts) <= 1


@repeatable
@given(st.permutations(range(8)), st.integers(1, 10))
def test_the_order_in_which_cores_are_listed_does_not_matter(cores: list[int], instances: int) -> None:
    assert split_cores(cores, instances) == split_cores(range(8), instances)


def test_neighbouring_cores_stay_together() -> None:
    """They share caches and memory."""
    assert split_cores([7, 6, 5, 4, 3, 2, 1, 0], 3) == [{0, 1}, {2, 3}, {4, 5}]


@repeatable
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 3))
def test_every_instance_gets_its_own_devices_in_the_order_in_which_they_are_visible(
    instances: int, world_size: int, spare: int
) -> None:
    devices = [f"GPU-{n}" for n in range(instances * world_size + spare)]
    shares = split_devices(devices, instances, world_size)
    assert [len(share) for share in shares] == [world_size] * instances
    assert [device for share in shares for device in share] == devices[: instances * world_size]


def test_instances_share_a_device_only_when_all_devices_have_one() -> None:
    assert split_devices(["0", "1"], 2, 1, 2) == [["0"], ["1"]]
    assert split_devices(["0", "1"], 4, 1, 2) == [["0"], ["1"], ["0"], ["1"]]
    assert split_devices(["0", "1", "2"], 2, 2, 2) == [["0", "1"], ["0", "1"]]
    with pytest.raises(
        ConfigError, match=r"--instances 5 with 1 GPU\(s\) each, 2 on a GPU, needs 3 GPUs, 2 are visible"
    ):
        split_devices(["0", "1"], 5, 1, 2)


def test_too_few_devices_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"--instances 2 with 4 GPU.* needs 8 GPUs, 7 are visible"):
        split_devices([str(n) for n in range(7)], 2, 4)
