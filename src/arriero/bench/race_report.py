"""What the race's samples come to: one row a system, over the seeds that count, and the targets."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from statistics import fmean
from typing import Any

from arriero.bench.replay import spread
from arriero.bench.report import Target
from arriero.bench.systems import ARRIERO, SYSTEMS

MIN_GAIN = 4.0  #: of the tails, over the best of the others
MIN_THROUGHPUT = 1.0  #: over the best of the others
MIN_SPEED = 0.9  #: of the machine for a system, over that for the system for which it was fastest
FIGURES = ("ttft_s", "tpot_s", "silence_s", "e2e_s")
UNITS = "all seeds together; times in s (TPOT in ms), as mean / P50 / P99"

Sample = dict[str, Any]


def put(samples: Sequence[Sample], sample: Sample, *, only_if_faster: bool) -> list[Sample]:
    """``samples`` with ``sample`` in the place of that of the same system and seed.

    ``only_if_faster``: unless the machine was faster for that.
    """
    place = (sample["system"], sample["seed"])
    here = [s for s in samples if (s["system"], s["seed"]) == place]
    if only_if_faster and any(old["machine_speed"] > sample["machine_speed"] for old in here):
        return list(samples)
    return [*(s for s in samples if (s["system"], s["seed"]) != place), sample]


def common_seeds(samples: Sequence[Sample]) -> set[int]:
    """Those that all systems in ``samples`` have run."""
    by_system: dict[str, set[int]] = {}
    for sample in samples:
        by_system.setdefault(sample["system"], set()).add(sample["seed"])
    return set.intersection(*by_system.values()) if by_system else set()


def on_a_slower_machine(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Seeds, by system, for which the machine was slower than for another system that ran the same seed."""
    found: dict[str, list[int]] = {}
    for sample in samples:
        best = max(s["machine_speed"] for s in samples if s["seed"] == sample["seed"])
        if sample["machine_speed"] < MIN_SPEED * best:
            found.setdefault(sample["system"], []).append(sample["seed"])
    return found


def counted_seeds(samples: Sequence[Sample]) -> set[int]:
    """Of the common seeds, those for which the machine was about equally fast for all: only on those is compared."""
    uneven = {seed for seeds in on_a_slower_machine(samples).values() for seed in seeds}
    return common_seeds(samples) - uneven


def summarise(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row a system: the requests of all seeds that count together; of the common ones if none counts."""
    seeds = counted_seeds(samples) or common_seeds(samples)
    rows = []
    for name in (s for s in SYSTEMS if any(sample["system"] == s for sample in samples)):
        here = [s for s in samples if s["system"] == name and s["seed"] in seeds]
        requests = [r for s in here for r in s["requests"]]
        seconds = sum(s["duration_s"] for s in here)
        rows.append(
            {
                "system": name,
                "seeds": len(here),
                "requests": len(requests),
                **{figure: spread(r[figure] for r in requests) for figure in FIGURES},
                "num_preemptions": sum(s["num_preemptions"] for s in here),
                "num_avoidable": sum(p["avoidable"] for s in here for p in s.get("preemptions", ())),
                "num_moves": sum(s.get("num_moves", 0) for s in here),
                "stalled_s": sum(s["machine_stalled_s"] for s in here),
                "machine_speed": fmean(s["machine_speed"] for s in here) if here else nan,
                "tokens_per_s": sum(r["output_tokens"] for r in requests) / seconds if seconds else 0.0,
            }
        )
    return rows


def targets_of(samples: Sequence[Sample]) -> list[Target]:
    """What is aimed at; none unless arriero and another have run, on a machine that was equally fast for both."""
    if not counted_seeds(samples):
        return []
    summary = summarise(samples)
    ours = [row for row in summary if row["system"] == ARRIERO]
    others = [row for row in summary if row["system"] != ARRIERO]
    if not ours or not others:
        return []
    tails = [
        Target.at_least(
            f"P99 {what} of the best other over arriero's",
            min(row[figure]["p99"] for row in others) / ours[0][figure]["p99"],
            MIN_GAIN,
            "times",
        )
        for figure, what in (("ttft_s", "TTFT"), ("silence_s", "silence"))
    ]
    best = max(row["tokens_per_s"] for row in others)
    return [
        *tails,
        Target.at_most("preemptions that a move could have avoided", ours[0]["num_avoidable"], 0),
        Target.at_least("throughput over the best other's", ours[0]["tokens_per_s"] / best, MIN_THROUGHPUT),
    ]


def table(summary: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is printed; the machine's speed as a share of what all systems had on average."""
    usual = fmean(row["machine_speed"] for row in summary)
    return [
        {
            "system": row["system"],
            "n": row["requests"],
            "TTFT": three(row["ttft_s"]),
            "TPOT": three(row["tpot_s"], 1e3),
            "silence": three(row["silence_s"]),
            "preempted": int(row["num_preemptions"]),
            "moves": row["num_moves"],
            "tokens_/s": row["tokens_per_s"],
            "stalled_s": row["stalled_s"],
            "speed": f"{row['machine_speed'] / usual:.2f}",
        }
        for row in summary
    ]


def three(values: dict[str, float], scale: float = 1.0) -> str:
    """Mean, P50 and P99 in one cell."""
    return " / ".join(f"{scale * values[q]:.3g}" for q in ("mean", "p50", "p99"))


def title(samples: Sequence[Sample]) -> str:
    """Of the table: its units, and which seeds it is about."""
    counted, common = counted_seeds(samples), common_seeds(samples)
    if not common:
        return f"{UNITS}; NOTHING TO COMPARE: no seed has been run by all of them"
    if not counted:
        return f"{UNITS}; NOT COMPARABLE: in no seed was the machine equally fast for all"
    left_out = sorted(common - counted)
    without = f" but {', '.join(map(str, left_out))}, in which the machine was not equally fast" if left_out else ""
    return UNITS.replace("all seeds", f"all seeds{without}")
