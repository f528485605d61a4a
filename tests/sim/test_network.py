"""The network: copies take their time, share what an instance has, and slow its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from arriero.core.errors import ConfigError
from arriero.sim.kernel import Kernel
from arriero.sim.network import Network, NetworkConfig

Copy = tuple[float, int, tuple[int, ...]]  # start, bytes, endpoints


def run(copies: list[Copy], **config: Any) -> tuple[list[float], list[tuple[float, int, float]]]:
    """When each copy ends, and every change of an instance's slow-down."""
    kernel, ends, changes = Kernel(), [0.0] * len(copies), []
    network = Network(
        NetworkConfig(**{"setup_s": 0.0, "bytes_per_s": 100.0, "decode_slow_down": 0.02, **config}),
        kernel,
        lambda instance: changes.append((kernel.now, instance, network.slow_down(instance))),
    )

    def starter(number: int, num_bytes: int, endpoints: tuple[int, ...]) -> Callable[[], None]:
        def done(copy_s: float) -> None:
            ends[number] = kernel.now
            assert kernel.now - copies[number][0] == pytest.approx(copy_s)

        return lambda: network.copy(num_bytes, network.config.bytes_per_s, endpoints, done)

    for number, (start_s, num_bytes, endpoints) in enumerate(copies):
        kernel.at(start_s, starter(number, num_bytes, endpoints))
    kernel.run()
    return ends, changes


def test_a_copy_alone_takes_its_setup_and_its_bytes() -> None:
    ends, _ = run([(1.0, 300, (0, 1))], setup_s=0.5)
    assert ends == pytest.approx([1 + 0.5 + 3])


def test_two_copies_at_one_endpoint_share_it() -> None:
    """Both at half the rate for 2 s: the first has 100 left when the second is done, and goes on alone."""
    ends, _ = run([(0.0, 200, (0, 1)), (0.0, 100, (0, 2))])
    assert ends == pytest.approx([3.0, 2.0])


def test_a_copy_that_comes_later_slows_the_one_that_runs() -> None:
    """100 alone until 1 s, then both at 50 a second: the first ends at 3 s, the second has 100 left then."""
    ends, _ = run([(0.0, 200, (0, 1)), (1.0, 200, (2, 1))])
    assert ends == pytest.approx([3.0, 4.0])


def test_copies_between_other_instances_do_not_disturb() -> None:
    ends, _ = run([(0.0, 200, (0, 1)), (0.0, 200, (2, 3))])
    assert ends == pytest.approx([2.0, 2.0])


def test_the_busier_endpoint_decides() -> None:
    """Instance 0 has three copies, instances 1 to 3 one each: a third of the rate for all."""
    ends, _ = run([(0.0, 100, (0, 1)), (0.0, 100, (0, 2)), (0.0, 100, (0, 3))])
    assert ends == pytest.approx([3.0, 3.0, 3.0])


def test_instances_are_slower_while_a_copy_runs_there_and_hear_of_it() -> None:
    _, changes = run([(0.0, 100, (0, 1)), (0.5, 100, (0,))])
    assert [(pytest.approx(t), i, f) for t, i, f in changes] == [
        (0.0, 0, 1.02),
        (0.0, 1, 1.02),
        (1.5, 1, 1.0),
        (2.0, 0, 1.0),
    ]


@pytest.mark.parametrize(
    "wrong",
    [{"latency_s": -1}, {"bytes_per_s": 0}, {"decode_slow_down": -0.1}, {"setup_s": -1}, {"staging_bytes_per_s": 0}],
)
def test_impossible_figures_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* is invalid"):
        NetworkConfig(**wrong)
