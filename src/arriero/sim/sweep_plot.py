"""A picture of a sweep: the latencies over the rate, or over the number of instances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.sim.plots import colours, new_figure, save_figure, style
from arriero.sim.sweep import Sweep, Targets


def plot_sweeps(path: Path, title: str, sweeps: Mapping[str, Sweep], targets: Targets, *, by_rate: bool) -> None:
    """Draw the sweeps by policy to ``path``, PNG or HTML by its suffix."""
    figure = new_figure(11, 4.2, title)
    panels = figure.subplots(1, 2)
    _panel(panels[0], "ttft_s", targets.ttft_s, sweeps, targets, by_rate=by_rate)
    _panel(panels[1], "tpot_s", targets.tpot_s, sweeps, targets, by_rate=by_rate)
    panels[0].legend(fontsize=8, frameon=False)
    save_figure(path, title, figure)


def _panel(
    axes: Any, name: str, target: float | None, sweeps: Mapping[str, Sweep], targets: Targets, *, by_rate: bool
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    x = "rate" if by_rate else "num_instances"
    paint = colours(sweeps)
    for policy, sweep in sweeps.items():
        points = sorted((getattr(p, x), getattr(p, name)) for p in sweep.points if math.isfinite(getattr(p, name)))
        axes.plot(
            *zip(*points, strict=True), color=paint[policy], marker=".", markersize=4, linewidth=1.3, label=policy
        )
        if sweep.best is not None:
            axes.plot(getattr(sweep.best, x), getattr(sweep.best, name), "o", color=paint[policy], markersize=8)
    if target is not None:
        axes.axhline(target, color="#d44c47", linewidth=1.0, linestyle="--")
        axes.annotate("target", (0.01, target), xycoords=("axes fraction", "data"), fontsize=8, color="#d44c47",
                      va="bottom")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):  # decades alone say little here: 1, 2 and 5 of each, as plain numbers
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    level = f"P{targets.percentile:g}"
    title = f"{level} time to first token" if name == "ttft_s" else f"{level} time per output token"
    style(axes, title, "requests a second" if by_rate else "instances", "seconds")
