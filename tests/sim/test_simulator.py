"""The simulator: hand-computed schedules, queueing theory, and the laws that every run keeps."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.core.config import RebalancingConfig, SchedulerConfig
from arriero.core.dispatch import ClusterView
from arriero.core.errors import ArrieroError, ConfigError
from arriero.core.types import Dispatchable, MigrationMode
from arriero.observe.events import EventLog
from arriero.sim import simulator as simulator_module
from arriero.sim.config import SimEngineConfig
from arriero.sim.network import NetworkConfig
from arriero.sim.report import latencies, summarize
from arriero.sim.simulator import SimulationResult, Simulator, SimulatorConfig, scheduler_config
from arriero.sim.step_time import StepTimeModel
from arriero.workload.arrivals import poisson_arrivals
from arriero.workload.workload import Arrival, Workload, make_workload

PER_TOKEN = StepTimeModel(a_mem=0, a=0, b=1, c=0, d=0, e=0, host_ms=0)
"""One millisecond for each token of the step."""


def engine(**facts: Any) -> SimEngineConfig:
    defaults = {"num_blocks": 1000, "block_bytes": 1 << 20, "step_time": PER_TOKEN, "with_contents": False}
    return SimEngineConfig(**{**defaults, **facts})


def simulate(
    arrivals: Sequence[Arrival], config: SimulatorConfig, events: Path | None = None
) -> tuple[SimulationResult, Simulator]:
    """Run it, and check what holds for every run: nobody is lost, nothing is left behind."""
    logs: list[EventLog] = []

    def make_events(clock: Callable[[], float]) -> EventLog:
        logs.append(EventLog(clock, events))
        return logs[0]

    simulator = Simulator(config, Workload("test", arrivals), make_events=make_events if events else None)
    result = simulator.run()
    for log in logs:
        log.close()
    simulator.check_integrity()
    assert [r.arrival for r in result.records] == list(arrivals)
    for record in result.records:
        if not record.rejected:
            assert record.num_output == record.arrival.output_tokens
            assert record.arrival.arrival_s <= record.dispatch_s < record.first_token_s <= record.finish_s
    for instance in simulator.instances:
        assert instance.engine.num_free == config.engine.num_blocks
        assert not instance.engine.live
        assert not instance.port.parked
        assert instance.llumlet.is_idle
    assert simulator.migrations.open_migrations() == []
    return result, simulator


def cluster(num_instances: int, policy: str = "freeness", **facts: Any) -> SimulatorConfig:
    return SimulatorConfig(num_instances=num_instances, scheduler=SchedulerConfig(dispatch_policy=policy), **facts)


# ---------------------------------------------------------------------- golden schedules


def test_a_request_alone() -> None:
    """100 ms for the prompt and its first token, 1 ms for each other token."""
    result, _ = simulate([Arrival(2.0, 100, 11)], cluster(1, engine=engine()))
    (record,) = result.records
    assert (record.first_token_s, record.finish_s) == pytest.approx((2.1, 2.11))
    assert latencies(record) == pytest.approx({"ttft_s": 0.1, "tpot_s": 0.001, "e2e_s": 0.11})
    assert (result.num_steps, result.end_s) == (11, record.finish_s)


def test_a_request_joins_the_batch_with_the_step_after_its_arrival() -> None:
    """a: prefill 0 - 10 ms, then steps of 1 ms. b comes at 12.5 ms, in the step that ends at 13: prefill with a's next
    token takes 21 ms, until 34. Then both decode, 2 ms a step: a has 5 tokens then, its other 5 take until 44; b has 1,
    6 at 44 ms, its last 4 at 1 ms take until 48.
    """
    arrivals = [Arrival(0.0, 10, 10), Arrival(0.0125, 20, 10)]
    result, _ = simulate(arrivals, cluster(1, engine=engine()))
    a, b = result.records
    assert (a.first_token_s, a.finish_s) == pytest.approx((0.010, 0.044))
    assert (b.first_token_s, b.finish_s) == pytest.approx((0.034, 0.048))


def test_a_long_prompt_goes_in_chunks() -> None:
    """250 tokens at 100 a step: 100, 100, 50 ms."""
    result, _ = simulate([Arrival(0.0, 250, 1)], cluster(1, engine=engine(max_num_batched_tokens=100)))
    assert result.records[0].first_token_s == pytest.approx(0.25)
    assert result.num_steps == 3


def test_the_steps_of_an_instance_know_of_its_moves() -> None:
    """Also of those after it was lost and came again."""
    _, simulator = simulate([Arrival(0.0, 10, 2)], cluster(1, engine=engine()))
    (instance,) = simulator.instances
    for _ in range(2):
        assert not instance.engine.limits.has_moves()
        instance.llumlet.parked("guest", 0.0)
        assert instance.engine.limits.has_moves()
        instance.die()


def test_preemption_recomputes_and_its_loss_is_measured() -> None:
    """4 blocks of 16, prompts of 31: both run from 62 ms on with 2 blocks each, step 2 fills them (64 ms). Then b gives
    way, a takes 9 more steps of 1 ms (73 ms). Then b's 33 tokens are computed again (106 ms) and the other 8 follow.
    """
    arrivals = [Arrival(0.0, 31, 11), Arrival(0.0, 31, 11)]
    result, _ = simulate(arrivals, cluster(1, engine=engine(num_blocks=4)))
    a, b = result.records
    assert (a.finish_s, a.num_preemptions, a.preemption_loss_s) == (pytest.approx(0.073), 0, 0.0)
    assert (b.finish_s, b.num_preemptions) == (pytest.approx(0.114), 1)
    assert b.preemption_loss_s == pytest.approx(0.106 - 0.064)


def test_the_urgent_leave_the_queue_first() -> None:
    """One place, 10 ms each: c came after b, and goes before it."""
    arrivals = [Arrival(0.0, 10, 1), Arrival(0.001, 10, 1), Arrival(0.002, 10, 1, -1)]
    result, _ = simulate(arrivals, cluster(1, engine=engine(priority_scheduling=True, max_num_seqs=1)))
    assert [r.finish_s for r in result.records] == pytest.approx([0.010, 0.030, 0.020])


def test_under_priorities_the_least_urgent_gives_way() -> None:
    """6 blocks of 16, prompts of 31 tokens, hence 2 blocks each. a's prefill takes until 31 ms, those of b and c with a
    token of a until 94. Then a needs a third block: b gives it, for c is urgent. a's 6 other tokens take 2 ms each with
    c, until 106. Then b's 32 tokens are computed again, with c's last token, until 139; b's other 2 take until 141.
    """
    arrivals = [Arrival(0.0, 31, 8), Arrival(0.001, 31, 4), Arrival(0.002, 31, 8, -1)]
    result, _ = simulate(arrivals, cluster(1, engine=engine(num_blocks=6, priority_scheduling=True)))
    a, b, c = result.records
    assert [r.first_token_s for r in (a, b, c)] == pytest.approx([0.031, 0.094, 0.094])
    assert [r.finish_s for r in (a, b, c)] == pytest.approx([0.106, 0.141, 0.139])
    assert [r.num_preemptions for r in (a, b, c)] == [0, 1, 0]
    assert b.preemption_loss_s == pytest.approx(0.139 - 0.094)


def test_round_robin_takes_turns_and_freeness_looks() -> None:
    arrivals = [Arrival(0.0, 1000, 50), Arrival(0.0, 10, 5), Arrival(2.0, 10, 5), Arrival(2.0, 10, 5)]
    for policy, expected in (("round_robin", [0, 1, 0, 1]), ("freeness", [0, 1, 0, 1])):
        result, _ = simulate(arrivals, cluster(2, policy, engine=engine()))
        assert [r.instance for r in result.records] == expected
    arrivals[2:] = [Arrival(1.02, 10, 5), Arrival(1.021, 10, 5)]  # the long one decodes still
    result, _ = simulate(arrivals, cluster(2, "freeness", engine=engine()))
    assert [r.instance for r in result.records] == [0, 1, 1, 1]


def test_what_is_longer_than_the_memory_is_rejected(tmp_path: Path) -> None:
    arrivals = [Arrival(0.0, 60, 5), Arrival(0.0, 60, 4), Arrival(1.0, 2000, 1)]
    result, _ = simulate(arrivals, cluster(1, engine=engine(num_blocks=4)), tmp_path / "log")
    assert [bool(r.rejected) for r in result.records] == [True, False, True]
    assert result.records[0].rejected == "60 + 5 tokens are more than max_model_len=64"
    summary = summarize(result)
    assert (summary["num_requests"], summary["num_rejected"]) == (3, 2)
    events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()[1:]]
    assert events == ["instance_ready", "reject", "dispatch", "finish", "reject"]


def test_no_requests_at_all() -> None:
    result, _ = simulate([], cluster(2, "freeness", engine=engine(), sample_s=1.0))
    assert (result.end_s, result.records) == (0.0, [])
    assert summarize(result)["ttft_s"] is None


# ---------------------------------------------------------------------- queueing theory


NUM_RUNS, NUM_SERVED, NUM_WARM_UP = 8, 4000, 800
T_99 = 3.499  # of Student's t with 7 degrees of freedom: the half width of a 99 % interval, in standard errors


def mean_wait(prompts: Sequence[int], rate: float, seed: int) -> float:
    """One place, one token out: a queue. The mean wait in seconds, after the warm-up.

    Every single wait is Lindley's: what was left of the work before, less the gap.
    """
    times = poisson_arrivals(len(prompts), rate, np.random.default_rng([seed, 1]))
    arrivals = [Arrival(t, p, 1) for t, p in zip(times, prompts, strict=True)]
    config = cluster(1, "round_robin", engine=engine(max_num_seqs=1, max_num_batched_tokens=16_000))
    result, _ = simulate(arrivals, config)
    services = np.array(prompts) / 1000
    waits = np.array([r.finish_s - r.arrival.arrival_s for r in result.records]) - services
    expected = [0.0]
    for gap, service in zip(np.diff(times), services[:-1], strict=True):
        expected.append(max(0.0, expected[-1] + service - gap))
    np.testing.assert_allclose(waits, expected, atol=1e-6)
    return float(waits[NUM_WARM_UP:].mean())


def assert_within_the_interval(waits: Sequence[float], formula: float) -> None:
    """The formula lies in the 99 % confidence interval of the runs' mean, and the interval is narrow enough to tell."""
    half = T_99 * float(np.std(waits, ddof=1)) / math.sqrt(len(waits))
    assert abs(float(np.mean(waits)) - formula) <= half
    assert half < 0.25 * formula


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_m_d_1(load: float) -> None:
    """Mean wait rho * s / (2 * (1 - rho)) with equal services."""
    waits = [mean_wait([100] * NUM_SERVED, load / 0.1, seed) for seed in range(NUM_RUNS)]
    assert_within_the_interval(waits, load * 0.1 / (2 * (1 - load)))


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_m_m_1(load: float) -> None:
    """Mean wait rho * s / (1 - rho) with exponential services; in whole tokens they are geometric, 0.5 % longer."""
    p = 1 - math.exp(-1 / 100)
    rate, service, second = load * p * 1000, 1e-3 / p, 1e-6 * (2 - p) / p**2
    formula = rate * second / (2 * (1 - load))  # Pollaczek and Khinchine's, for any services
    assert formula == pytest.approx(load * service / (1 - load), rel=0.01)
    waits = []
    for seed in range(NUM_RUNS):
        prompts = np.ceil(np.random.default_rng([seed, 2]).exponential(100, size=NUM_SERVED)).astype(int).tolist()
        waits.append(mean_wait(prompts, rate, seed))
    assert_within_the_interval(waits, formula)


# ---------------------------------------------------------------------- the same log, however it is computed

TIGHT = {"num_blocks": 130, "max_num_seqs": 24, "max_num_batched_tokens": 512}
REBALANCED = SchedulerConfig(
    dispatch_policy="round_robin", rebalancing=RebalancingConfig(cooldown_s=0.3, low_freeness=5, high_freeness=6)
)


def busy(seed: int) -> list[Arrival]:
    """More than four tight instances bear without queues."""
    rng = random.Random(seed)
    now, found = 0.0, []
    for _ in range(250):
        now += rng.expovariate(9.0)
        prompt = rng.choice([rng.randint(1, 100), rng.randint(1, 900)])
        found.append(Arrival(now, prompt, rng.randint(1, 200), rng.choice([0, 0, 0, -1])))
    return found


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("policy", ["round_robin", "freeness", "rebalanced", "arriero"])
def test_bulk_and_single_steps_and_repetition_give_the_same_bytes(tmp_path: Path, policy: str, priority: bool) -> None:
    arrivals, logs, results = busy(1), [], []
    for number, max_steps in enumerate((128, 128, 7, 1)):
        config = SimulatorConfig(
            engine=engine(**TIGHT, priority_scheduling=priority, step_time=StepTimeModel()),
            num_instances=4,
            scheduler=REBALANCED if policy == "rebalanced" else scheduler_config(policy),
            max_steps=max_steps,
            sample_s=0.25,
        )
        path = tmp_path / f"{number}"
        result, _ = simulate(arrivals, config, path)
        logs.append(path.read_bytes())
        results.append((result.samples, result.num_steps, summarize(result)))
    assert logs[0] == logs[1] == logs[2] == logs[3]
    assert results[0] == results[1] == results[2] == results[3]
    summary = results[0][2]
    assert summary["num_preemptions"] > 0
    if policy == "rebalanced":
        assert summary["num_migrations"] > 10


def test_policies_that_are_called_blind_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logs = []
    for number, blind in enumerate((simulator_module.BLIND, frozenset())):
        monkeypatch.setattr(simulator_module, "BLIND", blind)
        for policy in ("round_robin", "least_outstanding"):
            simulate(busy(2), cluster(3, policy, engine=engine(**TIGHT)), tmp_path / f"{policy}{number}")
            logs.append((tmp_path / f"{policy}{number}").read_bytes())
    assert logs[:2] == logs[2:]
    assert logs[0] != logs[1]


# ---------------------------------------------------------------------- migrations


def moved(
    mode: MigrationMode,
    at_s: float,
    arrivals: Sequence[Arrival],
    *,
    num_moves: int = 1,
    who: str = "r0",
    network: NetworkConfig | None = None,
    **config: Any,
) -> SimulationResult:
    """Two instances; request ``who`` moves to the other one at ``at_s``, and back and forth every second."""
    settings = SimulatorConfig(
        engine=engine(**config),
        num_instances=2,
        scheduler=SchedulerConfig(
            dispatch_policy="round_robin", rebalancing=RebalancingConfig(low_freeness=-1e9, high_freeness=1e9)
        ),
        network=network or NetworkConfig(),
    )
    simulator = Simulator(settings, Workload("moves", arrivals))

    def move() -> None:
        record = simulator.records[who]
        source, destination = record.instance, 1 - record.instance
        if simulator.migrations.move(record, destination, mode, "test"):
            simulator.scheduler.migration_started(who, source, destination, simulator.kernel.now)

    for number in range(num_moves):
        simulator.kernel.at(at_s + number, move)
    result = simulator.run()
    simulator.check_integrity()
    assert all(i.engine.num_free == settings.engine.num_blocks and i.llumlet.is_idle for i in simulator.instances)
    assert all(r.num_output == r.arrival.output_tokens for r in result.records)
    return result


DECODE = StepTimeModel(a_mem=20, a=5, b=0.1, c=0, d=0.1, e=0.001, host_ms=0)


@pytest.mark.parametrize("mode", list(MigrationMode))
def test_a_moved_request_gets_every_token_once_and_pauses_as_the_formulas_say(mode: MigrationMode) -> None:
    """1,000 tokens are 63 blocks of 1 MiB: 2.3 GiB/s takes 27 ms; live, the rest is a block or two."""
    result = moved(mode, 1.0, [Arrival(0.0, 1000, 300)], step_time=DECODE)
    (move,), (record,) = result.moves, result.records
    assert move.ok
    assert (move.source, move.destination, record.instance, record.num_moves) == (0, 1, 1, 1)
    assert 30 < move.num_tokens < 60
    step_s, network = 0.0211, NetworkConfig()
    carried = 0.0 if mode is MigrationMode.RECOMPUTE else 65 if mode is MigrationMode.STOP_AND_COPY else 1
    again_s = 0.11 - step_s if mode is MigrationMode.RECOMPUTE else 0.0
    copy_s = carried * (1 << 20) * (1 / network.bytes_per_s + 1 / network.staging_bytes_per_s)
    expected = step_s + again_s + copy_s + 2 * network.latency_s + (2 * network.setup_s if carried else 0)
    assert record.paused_s == pytest.approx(expected, rel=0.12)
    assert (len(move.stages) > 1) is (mode is MigrationMode.LIVE)
    assert record.finish_s == pytest.approx(result.end_s)


def test_a_request_moves_back_and_forth_among_others() -> None:
    arrivals = [Arrival(0.0, 500, 600), *[Arrival(0.01 * i, 100 + i, 400) for i in range(1, 9)]]
    result = moved(MigrationMode.LIVE, 0.5, arrivals, num_moves=8, step_time=DECODE)
    assert [m.ok for m in result.moves] == [True] * 8
    assert result.records[0].num_moves == 8
    assert 8 * 0.02 < result.records[0].paused_s < 8 * 0.09


def test_a_request_that_ends_on_the_way_ends_once() -> None:
    result = moved(MigrationMode.LIVE, 0.985, [Arrival(0.0, 4000, 29)], step_time=DECODE)
    (move,) = result.moves
    assert (move.ok, move.reason) == (False, "finished")


def test_steps_are_slower_while_a_copy_runs() -> None:
    """188 MiB at 2.3 GiB/s and at 15 GB/s take 93 ms; steps that begin in that time take twice as long."""
    arrivals = [Arrival(0.0, 3000, 300), Arrival(0.0, 3000, 300)]
    ends = [
        moved(MigrationMode.LIVE, 1.0, arrivals, network=NetworkConfig(decode_slow_down=factor), step_time=DECODE)
        for factor in (0.0, 1.0)
    ]
    late_s = ends[1].records[1].finish_s - ends[0].records[1].finish_s
    assert 2 * 0.0235 < late_s < 7 * 0.0235


def test_a_waiting_request_moves_without_a_copy() -> None:
    """One place: the third waits behind the first on instance 0, until it moves to instance 1, idle by then."""
    arrivals = [Arrival(0.0, 100, 100), Arrival(0.0, 9, 1), Arrival(0.0, 90, 5)]
    result = moved(MigrationMode.LIVE, 0.5, arrivals, who="r2", max_num_seqs=1, step_time=DECODE)
    (move,) = result.moves
    assert (move.ok, move.num_bytes, result.records[2].instance) == (True, 0, 1)
    assert 0.5 < result.records[2].first_token_s < 0.6
    assert result.records[2].paused_s == 0.0


# ---------------------------------------------------------------------- reports, profiles, errors


def test_the_summary_of_a_busy_run_is_complete() -> None:
    config = SimulatorConfig(
        engine=engine(**TIGHT, priority_scheduling=True, step_time=StepTimeModel()),
        num_instances=4,
        scheduler=REBALANCED,
        sample_s=0.25,
    )
    result, _ = simulate(busy(3), config)
    summary = summarize(result)
    assert 0 < summary["fragmentation"] < summary["memory"] < 1
    assert summary["ttft_s"]["p50"] < summary["ttft_s"]["mean"] < summary["ttft_s"]["p99"] < summary["e2e_s"]["p99"]
    assert set(summary["by_priority"]) == {"-1", "0"}
    assert summary["by_priority"]["-1"]["ttft_s"]["mean"] < summary["by_priority"]["0"]["ttft_s"]["mean"]
    assert summary["instance_hours"] == pytest.approx(4 * result.end_s / 3600)
    assert 0.001 < summary["downtime_s"]["p50"] < 0.2
    json.dumps(summary)


def test_who_knows_when_each_request_ends_preempts_hardly_anybody() -> None:
    found, loss_s = Counter[str](), Counter[str]()
    for policy in ("infaas", "arriero", "clairvoyant"):
        scheduler = scheduler_config(policy, horizon_s=0.0)
        config = SimulatorConfig(engine=engine(**TIGHT), num_instances=4, scheduler=scheduler)
        for seed in range(1, 7):
            summary = summarize(simulate(busy(seed), config)[0])
            found[policy] += summary["num_preemptions"]
            loss_s[policy] += summary["preemption_loss_s"]
    assert found["clairvoyant"] < found["arriero"] < found["infaas"]
    assert 7 * found["clairvoyant"] <= found["infaas"]
    assert loss_s["clairvoyant"] < loss_s["arriero"]
    assert 8 * loss_s["clairvoyant"] <= loss_s["infaas"]


@pytest.mark.parametrize(("policy", "victim"), [("arriero", "r0"), ("clairvoyant", None), ("infaas", "r1")])
def test_who_gives_way_is_a_part_of_the_policy(policy: str, victim: str | None, tmp_path: Path) -> None:
    """The smallest, or the last as in vLLM; who knows that both will not fit lets one wait."""
    config = SimulatorConfig(engine=engine(num_blocks=30), scheduler=scheduler_config(policy, horizon_s=0.0))
    log = tmp_path / "log"
    simulate([Arrival(0.0, 64, 160), Arrival(0.0, 200, 160)], config, log)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert next((e["request"] for e in events if e.get("event") == "preempt"), None) == victim


class Broken:
    """A user's policy with a mistake."""

    def choose(self, request: Dispatchable, view: ClusterView) -> int:
        raise ZeroDivisionError(request.request_id)


def test_a_policy_that_raises_stops_the_run_with_its_inputs() -> None:
    simulator = Simulator(cluster(1, f"{__name__}.Broken", engine=engine()), Workload("one", [Arrival(0.5, 10, 5)]))
    with pytest.raises(ArrieroError, match=r"Broken' raised ZeroDivisionError.*at 0\.5 s.*num_prompt_tokens=10"):
        simulator.run()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy 'magic' is unknown: use one of .*arriero"):
        scheduler_config("magic")
    with pytest.raises(ConfigError, match="num_instances=0 is invalid"):
        SimulatorConfig(engine=engine(), num_instances=0)
    with pytest.raises(ConfigError, match="sample_s=-1 is invalid"):
        SimulatorConfig(engine=engine(), sample_s=-1)


def test_progress_is_told() -> None:
    told: list[int] = []
    workload = make_workload("S-S", num_requests=600, rate=30, seed=1)
    Simulator(cluster(2, "round_robin", engine=engine()), workload, on_progress=told.append).run()
    assert told == [256, 512]
