"""``docs/benchmarks.md`` and its pictures, from ``results/policies.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from arriero.bench.policies import MAIN, POINTS, SCALING

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = {
    "prefill_mean": "prefill mean s",
    "prefill_P99": "P99 s",
    "decode_mean_ms": "decode mean ms",
    "decode_P99_ms": "P99 ms",
    "request_mean": "request mean s",
    "request_P99": "P99 s ",
    "preemption_loss": "preemption loss s",
    "fragmentation_%": "fragm. %",
    "migrations": "migrations",
    "downtime_ms": "downtime ms",
}
COLOURS = {"infaas": "#c44e52", "llumnix": "#4c72b0", "arriero": "#2a9d5c"}


def page(result: Mapping[str, Any], command: str) -> str:
    """Markdown: a table a point, beside the paper's figures, and every target."""
    commit = result["commit"] or {"id": "unknown", "dirty": False}
    seeds = sorted({s["seed"] for s in result["samples"]})
    num_requests = sorted({s["num_requests"] for s in result["samples"]})
    lines = [
        "# Benchmarks",
        "",
        "## Policies at the points of Llumnix, simulated",
        "",
        f"`{command}` at commit {commit['id'][:7]}: 16 instances of `llama-7b_a10`,",
        f"{' / '.join(map(str, num_requests))} requests, means over the seeds {', '.join(map(str, seeds))}",
        "(fewer where a row says so). The paper's engine (vLLM v0) sustains less than ours (v1, chunked prefill),",
        "so its rates are scaled to equal utilisation: to where `infaas` is about as congested as the paper's",
        "INFaaS++ (prefill P99). [What the policies do](policies.md), what bounds the missed aims.",
        "",
        "![Prefill P99 by point and policy](img/policies.png)",
        "",
    ]
    for point in POINTS:
        rows = [r for r in result["rows"] if r["point"] == point.name]
        if rows:
            lines += _table(point, rows, result["samples"])
    lines += _others(result)
    lines += ["## Targets", "", "| | value | target | |", "|---|---|---|---|"]
    for target in result["targets"]:
        value = "-" if target["value"] is None else f"{target['value']:.3g}"
        met = "met" if target["met"] else "**missed**"
        lines.append(f"| {target['name']} | {value} {target['unit']} | {target['target']:.3g} | {met} |")
    return "\n".join([*lines, ""])


def _table(point: Any, rows: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> list[str]:
    infaas, llumnix = point.paper
    lines = [
        f"### {point.name} (here {point.rate:g} requests a second)",
        "",
        f"The paper, prefill P99: INFaaS++ {infaas:g} s, Llumnix {llumnix:g} s.",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in rows:
        seeds = sum((s["point"], s["policy"]) == (row["point"], row["policy"]) for s in samples)
        name = row["policy"] + ("" if seeds >= 3 else f" ({seeds} seed{'s' * (seeds > 1)})")
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.3g}" for c in COLUMNS) + " |")
    return [*lines, ""]


def _others(result: Mapping[str, Any]) -> list[str]:
    """Priorities and scaling, if they were run."""
    points = {p.name for p in POINTS}
    rows = [r for r in result["rows"] if r["point"] not in points]
    if not rows:
        return []
    lines = [
        "### Priorities, scaling and other rates",
        "",
        "`ignored`: the same requests and arrivals, and nobody is told of the priorities.",
        "Scaling: 1 to 16 instances, 30 s until one serves; the range of the average freeness is 10 wide for `arriero`",
        "and 50, as in the paper, for the others.",
        "",
        "| point | policy | prefill mean s | P99 s | request mean s | high: request mean s | normal | instance-hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [s for s in result["samples"] if (s["point"], s["policy"]) == (row["point"], row["policy"])]
        by = [s["by_priority"] for s in same if "by_priority" in s]
        means = [f"{sum(b[p]['e2e_s']['mean'] for b in by) / len(by):.3g}" if by else "" for p in ("-1", "0")]
        figures = [f"{row[c]:.3g}" for c in ("prefill_mean", "prefill_P99", "request_mean")]
        cells = [row["point"], row["policy"], *figures, *means, f"{row['instance_hours']:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    if _curves(rows):
        lines += ["", "![Instance-hours against prefill P99](img/scaling.png)"]
    return [*lines, ""]


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The points of scaling that all have run; they are drawn."""
    found = {(r["point"], r["policy"]) for r in rows}
    return [p.name for p in SCALING if all((p.name, q) in found for q in MAIN)]


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """The pictures."""
    rows = {(r["point"], r["policy"]): r for r in result["rows"]}
    points = [p for p in POINTS if all((p.name, q) in rows for q in MAIN)]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for number, policy in enumerate(MAIN):
        places = [n + 0.27 * (number - 1) for n in range(len(points))]
        heights = [rows[p.name, policy]["prefill_P99"] for p in points]
        axes.bar(places, heights, 0.25, label=policy, color=COLOURS[policy])
    for number, name in ((0, "INFaaS++"), (1, "Llumnix")):
        places = [n + 0.27 * (number - 1) for n in range(len(points))]
        heights = [p.paper[number] for p in points if p.paper]
        axes.plot(places, heights, "kx" if number else "k+", label=f"{name}, in the paper")
    axes.set(yscale="log", ylabel="prefill P99, s", xticks=range(len(points)), xticklabels=[p.name for p in points])
    axes.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False)
    figure.savefig(folder / "policies.png", dpi=110)
    curves = _curves(result["rows"])
    if curves:
        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for policy in MAIN:
            found = [rows[p, policy] for p in curves]
            hours, p99 = [r["instance_hours"] for r in found], [r["prefill_P99"] for r in found]
            axes.plot(hours, p99, "o-", label=policy, color=COLOURS[policy])
        axes.set(xlabel="instance-hours", ylabel="prefill P99, s", yscale="log")
        axes.legend(frameon=False)
        figure.savefig(folder / "scaling.png", dpi=110)


def main() -> int:
    """Read, draw, write."""
    result = json.loads(Path("results/policies.json").read_text(encoding="utf-8"))
    draw(result, Path("docs/img"))
    seeds = " ".join(str(seed) for seed in sorted({s["seed"] for s in result["samples"]}))
    command = f'make bench-policies ARGS="--seeds {seeds}"'
    Path("docs/benchmarks.md").write_text(page(result, command), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
