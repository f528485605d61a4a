"""The race: its arrivals, how parts are put together, and what counts as avoidable."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from arriero.bench import inside, race
from arriero.bench.client import Client
from arriero.bench.inside import EventWatch, SpeedWatch, beside, seen_inside
from arriero.bench.race import Plan, least_stalled, workload_of
from arriero.bench.race_report import (
    common_seeds,
    counted_seeds,
    on_a_slower_machine,
    put,
    summarise,
    table,
    targets_of,
    title,
)
from arriero.bench.report import kept_samples
from arriero.bench.systems import ARRIERO, GROUPS, SYSTEMS, VLLM_DP, Fleet
from arriero.core.errors import ArrieroError
from arriero.sim.profiles import load_profile, write_profile

PLAN = Plan(requests=50, rate=2.0, cv=4.0, longest=300, scale=1.0, engines=2, flags=["--x"], arriero_flags=[])


def request(ttft_s: float = 1.0, silence_s: float = 1.0) -> dict[str, float]:
    return {"ttft_s": ttft_s, "tpot_s": 0.02, "silence_s": silence_s, "e2e_s": 3.0, "output_tokens": 100}


def sample(system: str, seed: int, *requests: dict[str, float], **fields: Any) -> dict[str, Any]:
    sample = {"system": system, "seed": seed, "requests": list(requests), "num_preemptions": 0, "duration_s": 10.0}
    sample |= {"machine_stalled_s": 0.0, "machine_speed": 400.0}
    return sample | fields


def test_every_seed_has_the_plan_s_rate_and_lengths_and_its_own_arrivals() -> None:
    first, again, other = workload_of(PLAN, 1), workload_of(PLAN, 1), workload_of(PLAN, 2)
    assert first == again != other
    for workload in (first, other):
        assert len(workload.arrivals) == 50
        assert workload.arrivals[-1].arrival_s == pytest.approx(49 / 2.0)
        assert all(1 <= a.prompt_tokens <= 300 and 1 <= a.output_tokens <= 300 for a in workload.arrivals)


def test_lengths_can_be_scaled() -> None:
    whole, small = workload_of(PLAN, 1), workload_of(replace(PLAN, scale=0.1), 1)
    for a, b in zip(whole.arrivals, small.arrivals, strict=True):
        assert b.prompt_tokens == max(1, round(0.1 * a.prompt_tokens))
        assert (b.arrival_s, b.output_tokens) == (a.arrival_s, max(1, round(0.1 * a.output_tokens)))


@pytest.mark.parametrize("scale", ["0", "-1", "2", "nan"])
def test_a_scale_that_makes_no_race_is_refused(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        race.main(["--scale", scale])
    assert f"--scale {scale}: it must be between" in capsys.readouterr().err


def test_every_system_belongs_to_one_group() -> None:
    assert sorted(name for _, members in GROUPS.values() for name in members) == sorted(SYSTEMS)


def test_only_seeds_that_all_systems_have_run_are_compared() -> None:
    samples = [sample(ARRIERO, 1, request(1.0)), sample(ARRIERO, 2, request(9.0)), sample(VLLM_DP, 1, request(5.0))]
    assert common_seeds(samples) == {1}
    ours, theirs = summarise(samples)
    assert (ours["seeds"], ours["ttft_s"]["p99"], theirs["ttft_s"]["p99"]) == (1, 1.0, 5.0)


@pytest.mark.parametrize(
    ("ours", "met"),
    [
        (sample(ARRIERO, 1, request(1.0, 0.5)), [True, True, True, True]),
        (sample(ARRIERO, 1, request(1.1, 0.5)), [False, True, True, True]),
        (sample(ARRIERO, 1, request(1.0, 0.6)), [True, False, True, True]),
        (sample(ARRIERO, 1, request(), preemptions=[{"count": 1, "avoidable": True}]), [True, False, False, True]),
        (sample(ARRIERO, 1, request(1.0, 0.5), duration_s=10.1), [True, True, True, False]),
    ],
)
def test_targets_are_measured_against_the_best_of_the_others(ours: dict[str, Any], met: list[bool]) -> None:
    others = [sample(VLLM_DP, 1, request(4.0, 3.0)), sample(SYSTEMS[1], 1, request(8.0, 2.0))]
    assert [t.met for t in targets_of([ours, *others])] == met


@pytest.mark.parametrize(
    ("stalled_s", "taken", "tries"),
    [([0.9, 0.0], 0.9, 1), ([30.0, 0.5, 0.0], 0.5, 2), ([30.0, 5.0, 7.0, 0.0], 5.0, 3)],
)
def test_a_run_in_which_the_client_was_held_up_is_repeated(
    stalled_s: list[float], taken: float, tries: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = least_stalled(lambda number: sample(VLLM_DP, 1, request(), machine_stalled_s=stalled_s[number]))
    assert (found["machine_stalled_s"], found["tries"]) == (taken, tries)
    said = capsys.readouterr().err
    assert (said.count("once more"), "the least of it is taken" in said) == (
        min(sum(s > 1 for s in stalled_s), 2),
        taken > 1,
    )
    assert summarise([found])[0]["stalled_s"] == taken


def test_without_another_system_nothing_is_claimed() -> None:
    assert targets_of([sample(ARRIERO, 1, request())]) == []


def event(seq: int, name: str, **fields: Any) -> dict[str, Any]:
    return {"seq": seq, "time_s": 100.0 + seq, "event": name, **fields}


class Events:
    """A server's `/events`: the last ``keep`` of ``held``."""

    def __init__(self, held: list[dict[str, Any]], keep: int = 1000) -> None:
        self.held, self.keep = held, keep

    async def get(self, path: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        assert path == "/events"
        return [e for e in self.held[-self.keep :] if e["seq"] > after][-limit:]


def test_moves_and_preemptions_of_a_run_are_told_from_its_events() -> None:
    server = Events([event(1, "migration", ok=True), event(2, "preempt", avoidable=True)])
    watch = EventWatch(cast(Client, server))

    async def run() -> None:
        await watch.begin()
        server.held += [event(3, "migration", ok=True), event(4, "migration", ok=False), event(5, "finish")]
        await watch.gather()
        server.held += [event(6, "preempt", avoidable=True), event(7, "preempt", avoidable=False)]
        await watch.gather()

    asyncio.run(run())
    found = seen_inside(watch.events, started_s=102.0)
    assert (found["num_moves"], [m["seq"] for m in found["moves"]]) == (1, [3, 4])
    assert [(p["time_s"], p["avoidable"]) for p in found["preemptions"]] == [(4.0, True), (5.0, False)]
    assert watch.num_missed == 0
    row = summarise([sample(ARRIERO, 1, request(), **found)])[0]
    assert (row["num_moves"], row["num_avoidable"]) == (1, 1)


def test_events_that_a_server_no_longer_has_are_counted() -> None:
    server = Events([event(seq, "finish") for seq in range(1, 5)], keep=2)
    watch = EventWatch(cast(Client, server))
    asyncio.run(watch.begin())
    assert watch.num_missed == 0
    server.held += [event(seq, "finish") for seq in range(5, 10)]
    asyncio.run(watch.gather())
    assert (len(watch.events), watch.num_missed) == (2, 3)


def test_watches_end_with_what_they_stand_beside() -> None:
    async def run() -> None:
        watch = asyncio.Event()

        async def forever() -> None:
            try:
                await asyncio.sleep(1e6)
            finally:
                watch.set()

        async def fail() -> None:
            async with beside(forever()):
                await asyncio.sleep(0)
                raise KeyError

        with pytest.raises(KeyError):
            await fail()
        assert watch.is_set()

    asyncio.run(run())


def test_the_machine_s_speed_is_a_rate_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = SpeedWatch()
    assert watch.speed > 0  # though nothing was timed: a run can be that short
    monkeypatch.setattr(inside, "PROBE_S", 0.0)
    taken = iter([0.5, 0.1, 0.2])
    monkeypatch.setattr(watch, "probe", lambda: next(taken))

    async def run() -> None:
        with pytest.raises(RuntimeError):  # the fourth portion
            await watch.run()

    asyncio.run(run())
    assert watch.speed == pytest.approx(1 / 0.2)
    assert watch.speeds(2) == pytest.approx([1 / 0.3, 1 / 0.2])
    assert watch.speeds(9) == pytest.approx([1 / 0.5, 1 / 0.1, 1 / 0.2])


def test_the_table_shows_how_fast_the_machine_was_for_each_system() -> None:
    samples = [sample(ARRIERO, 1, request(), machine_speed=300.0), sample(VLLM_DP, 1, request(), machine_speed=500.0)]
    assert [row["speed"] for row in table(summarise(samples))] == ["0.75", "1.25"]


def test_a_seed_counts_only_if_the_machine_was_equally_fast_for_all() -> None:
    even = [sample(ARRIERO, 1, request(1.0)), sample(VLLM_DP, 1, request(5.0), machine_speed=361.0)]
    assert (counted_seeds(even), on_a_slower_machine(even)) == ({1}, {})
    assert "not equally fast" not in title(even)
    uneven = [sample(ARRIERO, 2, request(7.0), machine_speed=500.0), sample(VLLM_DP, 2, request(9.0))]
    both = even + uneven
    assert (counted_seeds(both), common_seeds(both)) == ({1}, {1, 2})
    assert on_a_slower_machine(both) == {VLLM_DP: [2]}
    assert [row["ttft_s"]["p99"] for row in summarise(both)] == [1.0, 5.0]
    assert "all seeds but 2, in which" in title(both)
    assert targets_of(uneven) == []
    assert [row["ttft_s"]["p99"] for row in summarise(uneven)] == [7.0, 9.0]
    assert "NOT COMPARABLE" in title(uneven)
    apart = [sample(ARRIERO, 1, request()), sample(VLLM_DP, 2, request())]
    assert "no seed has been run by all" in title(apart)


def test_of_a_repeated_run_the_one_on_the_faster_machine_is_kept() -> None:
    first, other = sample(ARRIERO, 1, machine_speed=300.0), sample(VLLM_DP, 1)
    slower, faster = sample(ARRIERO, 1, machine_speed=200.0), sample(ARRIERO, 1, machine_speed=400.0)
    assert put([first, other], slower, only_if_faster=True) == [first, other]
    assert put([first, other], slower, only_if_faster=False) == [other, slower]
    assert put([first, other], faster, only_if_faster=True) == [other, faster]
    assert put([other], slower, only_if_faster=True) == [other, slower]


def test_what_ran_on_a_slower_machine_runs_again_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    speeds = {(ARRIERO, 1): [500.0], (ARRIERO, 2): [300.0, 510.0], (VLLM_DP, 1): [500.0], (VLLM_DP, 2): [500.0]}
    started: list[tuple[str, int]] = []

    def take(plan: Plan, model: str, running: Any, name: str, seed: int) -> dict[str, Any]:
        started.append((name, seed))
        return sample(name, seed, request(), machine_speed=speeds[name, seed].pop(0))

    def group(name: str) -> Any:
        return lambda fleet, tag: nullcontext({name: nullcontext})

    monkeypatch.setattr(race, "_take", take)
    monkeypatch.setattr(race, "GROUPS", {name: (group(name), (name,)) for name in (ARRIERO, VLLM_DP)})
    fleet = Fleet(model="m", flags=[], num_engines=2, port=1, start_timeout_s=1.0)
    samples = race.run(PLAN, fleet, [[1, 2]], [ARRIERO, VLLM_DP], [])
    assert sorted(started[:4]) == sorted(speeds)
    assert started[4:] == [(ARRIERO, 2)]
    assert counted_seeds(samples) == {1, 2}
    assert "slower than for others (arriero: seed 2): once more" in capsys.readouterr().err
    started.clear()
    speeds[ARRIERO, 3] = [400.0, 490.0]
    samples = race.run(PLAN, fleet, [[3]], [ARRIERO], [sample(VLLM_DP, 3, request(), machine_speed=500.0)])
    assert started == [(ARRIERO, 3)] * 2  # beside what was kept of another system
    assert counted_seeds(samples) == {3}


def test_parts_are_merged_if_they_are_of_one_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert kept_samples(race.RESULT, PLAN, "machine_speed") == []
    race.write(PLAN, [sample(ARRIERO, 1, request())])
    assert [s["seed"] for s in kept_samples(race.RESULT, PLAN, "machine_speed")] == [1]
    with pytest.raises(ArrieroError, match="another plan"):
        kept_samples(race.RESULT, replace(PLAN, rate=3.0), "machine_speed")


def test_samples_of_an_unknown_speed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    race.write(PLAN, [sample(ARRIERO, 1, request())])
    result = json.loads(race.RESULT.read_text())
    del result["samples"][0]["machine_speed"]
    race.RESULT.write_text(json.dumps(result))
    with pytest.raises(ArrieroError, match="say --fresh"):
        kept_samples(race.RESULT, PLAN, "machine_speed")


def test_the_race_can_be_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ten times the memory nobody is preempted, and no server is started."""
    monkeypatch.chdir(tmp_path)
    write_profile(replace(load_profile("cpu-smollm2"), block_size=32), Path("profile.json"))
    given = ["--simulate", "--model", "some", "--profile", "profile.json", "--seeds", "1", "2", "--requests", "60"]
    assert race.main([*given, "--load", "1.2"]) == 0
    assert "simulated" in capsys.readouterr().out
    rows = json.loads(Path("results/race_simulated.json").read_text())["samples"]
    assert {row["requests"] for row in rows} == {120}
    scarce = {row["system"]: row for row in rows if row["memory"] == 1}
    ample = {row["system"]: row for row in rows if row["memory"] == 10}
    assert scarce["power_of_two"]["num_preemptions"] > scarce["arriero"]["num_preemptions"]
    assert scarce["arriero"]["num_moves"] > 0
    assert scarce["power_of_two"]["preemption_loss_s"]["p99"] > scarce["arriero"]["preemption_loss_s"]["p99"]
    assert all(row["num_preemptions"] == row["preemption_loss_s"]["mean"] == 0 for row in ample.values())
    assert ample["power_of_two"]["ttft_s"]["p99"] < scarce["power_of_two"]["ttft_s"]["p99"]


def test_a_simulated_race_wants_memory_for_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_profile(load_profile("cpu-smollm2"), Path("profile.json"))
    given = ["--simulate", "--model", "some", "--profile", "profile.json", "--kv-cache-memory-bytes", "1000"]
    assert race.main(given) == 1
    assert "--kv-cache-memory-bytes 1000: too few for a block" in capsys.readouterr().err
