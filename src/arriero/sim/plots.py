"""A picture of a simulation: latencies, memory of the instances with migrations as arrows, fragmentation and queues.

Drawn with matplotlib, which is imported only here and only when a picture is wanted (`pip install 'arriero[plot]'`).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arriero.core.errors import ConfigError
from arriero.sim.report import LATENCIES, latencies
from arriero.sim.simulator import SimulationResult

KINDS = (".png", ".html")
_TITLES = {
    "ttft_s": "prefill latency (time to first token)",
    "tpot_s": "decode latency (time per output token)",
    "e2e_s": "request latency",
}
_COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#b39200", "#6b6b6b", "#d44c47")
_MAX_ARROWS = 600  # more of them in one panel would hide what is below


def check_plot_file(path: Path) -> None:
    """Raises ConfigError if no picture can be written there: before the work, not after it."""
    if path.suffix not in KINDS:
        raise ConfigError(f"--plot {path}: the name must end with {' or '.join(KINDS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"--plot needs matplotlib: pip install 'arriero[plot]' ({error})") from error


def plot_results(path: Path, title: str, results: Mapping[str, SimulationResult]) -> None:
    """Draw the results by policy to ``path``, PNG or HTML by its suffix."""
    save_figure(path, title, _figure(title, results))


def save_figure(path: Path, title: str, figure: Any) -> None:
    """As PNG, or as an HTML page that needs nothing beside it."""
    if path.suffix == ".png":
        figure.savefig(path, dpi=120)
        return
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=160)
    data = base64.b64encode(image.getvalue()).decode("ascii")
    name = html.escape(title)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{name}</title>\n'
        "<style>body{margin:0;background:#fff}img{display:block;max-width:1400px;width:100%;margin:auto}</style>\n"
        f'<img alt="{name}" src="data:image/png;base64,{data}"></html>\n',
        encoding="utf-8",
    )


def new_figure(width: float, height: float, title: str) -> Any:
    """An empty figure, outside of any display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    return figure


def style(axes: Any, title: str, x: str, y: str) -> None:
    """Titles, a light grid, no box."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def colours(names: Mapping[str, Any]) -> dict[str, str]:
    """One for each name, always the same ones in the same order."""
    return {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}


# ---------------------------------------------------------------------- the panels


def _figure(title: str, results: Mapping[str, SimulationResult]) -> Any:
    with_samples = {name: result for name, result in results.items() if len(result.samples) > 1}
    most = max(result.config.num_instances for result in results.values())
    memory_height = min(4.5, max(1.6, 0.9 + 0.11 * most))
    rows = [3.0] + ([2.2] if with_samples else []) + [memory_height] * len(with_samples)
    figure = new_figure(13, sum(rows) + 0.5, title)
    grid = figure.add_gridspec(len(rows), 6, height_ratios=rows)
    paint = colours(results)
    for number, name in enumerate(LATENCIES):
        _distribution(figure.add_subplot(grid[0, 2 * number : 2 * number + 2]), name, results, paint)
    if with_samples:
        _over_time(figure.add_subplot(grid[1, :3]), "fragmentation", with_samples, paint)
        _over_time(figure.add_subplot(grid[1, 3:]), "waiting", with_samples, paint)
    last_s = max((result.samples[-1].time_s for result in with_samples.values()), default=0.0)
    for number, (policy, result) in enumerate(with_samples.items()):
        _memory(figure, figure.add_subplot(grid[2 + number, :]), policy, result, last_s)
    return figure


def _distribution(axes: Any, name: str, results: Mapping[str, SimulationResult], paint: Mapping[str, str]) -> None:
    """The share of requests that took longer, on two logarithmic axes: tails are what policies differ in."""
    for policy, result in results.items():
        found = [latencies(r) for r in result.records if not r.rejected]
        values = np.sort([v[name] for v in found if name in v])
        if not len(values):
            continue
        shares = 1 - np.arange(len(values)) / len(values)
        few = np.unique(np.geomspace(1, len(values), 400).astype(int))  # dense where the tail is
        kept = len(values) - few[::-1]
        width = max(1.0, 2.8 - 0.6 * list(results).index(policy))  # equal curves show as one inside the other
        axes.step(values[kept], shares[kept], where="pre", color=paint[policy], linewidth=width, label=policy)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_ylim(top=1.0)
    axes.set_yticks([1, 0.5, 0.1, 0.01, 0.001], ["P0", "P50", "P90", "P99", "P99.9"])
    axes.minorticks_off()
    style(axes, _TITLES[name], "seconds", "percentile" if name == LATENCIES[0] else "")
    if name == LATENCIES[0]:
        axes.legend(fontsize=8, frameon=False, loc="lower left")


def _over_time(axes: Any, what: str, results: Mapping[str, SimulationResult], paint: Mapping[str, str]) -> None:
    for policy, result in results.items():
        times = [s.time_s for s in result.samples]
        if what == "waiting":
            values = np.array([s.num_waiting for s in result.samples], dtype=float)
        else:
            size = result.config.engine.num_blocks
            values = np.array([100 * s.fragmented / (size * max(1, len(s.used))) for s in result.samples])
        axes.plot(times, values, color=paint[policy], linewidth=1.0, alpha=0.85, label=policy)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    if what == "waiting":
        style(axes, "requests that wait", "seconds", "requests")
    else:
        style(axes, "fragmentation: memory that queues lack, free elsewhere", "seconds", "%")


def _memory(figure: Any, axes: Any, policy: str, result: SimulationResult, last_s: float) -> None:
    """Used memory by instance and time; arrows are migrations, grey those of waiting requests: nothing was copied."""
    num_instances = 1 + max((max(s.instances, default=0) for s in result.samples), default=0)
    shares = np.full((num_instances, len(result.samples)), np.nan)  # where an instance is not there, nothing is drawn
    for column, sample in enumerate(result.samples):
        shares[list(sample.instances), column] = 100 * np.array(sample.used) / result.config.engine.num_blocks
    times = np.array([s.time_s for s in result.samples])
    edges = np.append(times, times[-1] + (times[-1] - times[-2]))
    rows = np.arange(len(shares) + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, shares, cmap="YlGnBu", vmin=0, vmax=100, rasterized=True)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12)
    bar.set_label("KV memory used, %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    moves = [m for m in result.moves if m.ok and m.source is not None and m.started_s <= edges[-1]]
    shown = moves[:: max(1, -(-len(moves) // _MAX_ARROWS))]
    for move in shown:
        arrow = {"arrowstyle": "-|>", "color": "#d44c47", "lw": 0.8, "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0}
        if not move.num_bytes:
            arrow |= {"color": "#6b6b6b", "lw": 0.5}
        axes.annotate("", xy=(move.started_s + move.total_s, move.destination), xytext=(move.started_s, move.source),
                      arrowprops=arrow)  # fmt: skip
    note = f"{len(moves)} migrations" + (f" ({len(shown)} shown)" if len(shown) < len(moves) else "")
    style(axes, f"{policy}: memory of the instances, {note}", "seconds", "instance")
    axes.grid(False)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_xlim(0, last_s)
