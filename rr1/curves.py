"""The curves of a run: single steps light, a moving average over them."""

import fnmatch
import math
from pathlib import Path
from typing import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rr1 import files


def draw_curves(
    rows: Sequence[Mapping], panels: Mapping[str, Sequence[str]], path: Path, title: str
) -> None:
    """Plot rows of metrics over their steps: single steps light, a moving average over them."""
    names: list[str] = []  # of what has a value anywhere
    for row in rows:
        drawn = [name for name, value in row.items() if value is not None]
        names += [name for name in drawn if name not in ("step", *names)]
    panels = panels or {name: [name] for name in names}
    plots = {}
    for heading, patterns in panels.items():
        shown = []
        for pattern in patterns:
            shown += fnmatch.filter(names, pattern)
        if shown:
            plots[heading] = shown
    figure, all_axes = new_panels(plots)
    figure.suptitle(f"{title}, step {rows[-1]['step']}")
    for axes, shown in zip(all_axes, plots.values()):
        for name in shown:
            draw_curve(axes, rows, name)
        if len(shown) > 1:
            axes.legend(fontsize=7, frameon=False)
    files.save_figure(figure, path)


def draw_curve(axes: Axes, rows: Sequence[Mapping], name: str) -> None:
    """A metric over steps: each value in light, their trend in full."""
    steps, values = curve_of(rows, name).T
    light = {"markersize": 3, "linewidth": 0.6, "alpha": 0.35}
    [line] = axes.plot(steps, values, ".-", **light)
    axes.plot(steps, smooth(smooth(values)), color=line.get_color(), label=name)


def new_panels(headings: Iterable[str]) -> tuple[Figure, list[Axes]]:
    """A figure of curves over steps, a panel a heading, three in a line."""
    headings = list(headings)
    columns = min(3, len(headings))
    lines = math.ceil(len(headings) / columns)
    size = (4.4 * columns, 2.8 * lines + 0.4)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    for place, heading in enumerate(headings, start=1):
        axes = figure.add_subplot(lines, columns, place)
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.25)
    return figure, figure.axes


def curve_of(rows: Sequence[Mapping], name: str) -> np.ndarray:
    """(steps, 2): step and value, of the steps that have one."""
    points = []
    for row in rows:
        if row.get(name) is not None:
            points.append((row["step"], row[name]))
    return np.array(points, float)


def smooth(values: Sequence[float]) -> np.ndarray:
    """Moving average over a fifteenth of the curve, over what there is of it at the ends."""
    half = len(values) // 30
    window = np.ones(2 * half + 1)
    there = np.ones(len(values))
    sums = np.convolve(values, window, "same")
    return sums / np.convolve(there, window, "same")
