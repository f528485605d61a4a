"""The race in the simulator: what policies come to with this machine's step times, and what more memory would bring.

With ten times the memory nobody waits for KV cache and nobody is preempted: what is left of a tail there is computing,
which no scheduling of memory takes away. ``clairvoyant`` knows when each request will end and who comes next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from arriero.bench.replay import spread
from arriero.core.config import StepConfig
from arriero.sim.network import NetworkConfig
from arriero.sim.profiles import Profile
from arriero.sim.report import LATENCIES, latencies
from arriero.sim.simulator import CLAIRVOYANT, Simulator, SimulatorConfig, engine_config, scheduler_config
from arriero.workload.workload import Workload

MAX_NUM_SEQS = 128  #: vLLM's own on a CPU
MAX_NUM_BATCHED_TOKENS = 2048  #: likewise


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table. ``itl_target_s``: see StepConfig; ``memory``: times what the engines of the race have."""

    policy: str
    itl_target_s: float = 0.0
    memory: int = 1


_ITL_S = StepConfig().itl_target_s
CASES = (
    Case("arriero", _ITL_S),
    Case("arriero"),
    Case(CLAIRVOYANT, _ITL_S),
    Case("power_of_two"),
    Case("vllm_dp"),
    Case("arriero", _ITL_S, memory=10),
    Case("power_of_two", memory=10),
    Case("vllm_dp", memory=10),
)


def simulate(
    workloads: Mapping[int, Workload], profile: Profile, *, num_blocks: int, engines: int, cases: Sequence[Case] = CASES
) -> list[dict[str, Any]]:
    """A row for each case: the requests of all ``workloads`` (by seed) together, latencies in seconds.

    ``preemption_loss_s`` is what its preemptions silenced a request for, 0 for one that was never preempted.
    ``num_blocks``: KV blocks of an engine, of the profile's size.
    """
    jobs = [(case, seed, workloads[seed], profile, num_blocks, engines) for case in cases for seed in workloads]
    with ProcessPoolExecutor() as pool:
        runs = list(pool.map(_run, jobs))
    rows = []
    for case in cases:
        here = [run for (of, *_), run in zip(jobs, runs, strict=True) if of == case]
        requests = [request for run in here for request in run["requests"]]
        rows.append(
            {
                "system": case.policy,
                "itl_target_s": case.itl_target_s,
                "memory": case.memory,
                "requests": len(requests),
                **{figure: spread(r[figure] for r in requests if figure in r) for figure in LATENCIES},
                "num_preemptions": sum(run["num_preemptions"] for run in here),
                "preemption_loss_s": spread(loss_s for run in here for loss_s in run["preemption_loss_s"]),
                "num_moves": sum(run["num_moves"] for run in here),
                "tokens_per_s": sum(run["num_tokens"] for run in here) / sum(run["duration_s"] for run in here),
            }
        )
    return rows


def _run(job: tuple[Case, int, Workload, Profile, int, int]) -> dict[str, Any]:
    case, seed, workload, profile, num_blocks, engines = job
    config = SimulatorConfig(
        engine=engine_config(
            replace(profile, kv_tokens=case.memory * num_blocks * profile.block_size),
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            itl_target_s=case.itl_target_s,
        ),
        num_instances=engines,
        scheduler=scheduler_config(case.policy, seed),
        network=profile.network or NetworkConfig(),
    )
    result = Simulator(config, workload).run()
    return {
        "requests": [latencies(record) for record in result.records],
        "num_preemptions": sum(record.num_preemptions for record in result.records),
        "preemption_loss_s": [record.preemption_loss_s for record in result.records],
        "num_moves": sum(record.num_moves for record in result.records),
        "num_tokens": sum(record.num_output for record in result.records),
        "duration_s": result.end_s,
    }
