"""The plots of an evaluation, drawn from its reports (`rr1.evaluation.report`).

Each has one message; bars and bands are 95 % intervals.

    table_1.png              are answers right, by form of question and strength of the damage?
    table_2.png              how fast does accuracy fall as the damage grows?
    figure_6a_types.png      which type of damage is taken for which?
    figure_6a_intensity.png  is the intensity read right?
    figure_6b_length.png     does the chain grow with the damage, as the true one does?
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rr1.evaluation.figure_6 import TYPES
from rr1.files import save_figure

# the first: base, plain
COLORS = "#7f7f7f #1f77b4 #d62728 #2ca02c #9467bd #8c564b #e377c2 #bcbd22".split()
Reports = dict[str, dict]


def draw_all(reports: Reports, out: Path) -> list[str]:
    """Draw what there is data for, for each plot all models together; returns the files' names."""
    chains = {name: report for name, report in reports.items() if "figure_6" in report}
    plots = {}
    if all(report["table_1"] for report in reports.values()):
        plots["table_1.png"] = table_1(reports)
    if any(len(report["table_2"]) > 1 for report in reports.values()):
        plots["table_2.png"] = table_2(reports)
    if chains:
        plots["figure_6a_types.png"] = types(chains)
    if any(report["figure_6"]["intensity"] for report in chains.values()):
        plots["figure_6a_intensity.png"] = intensity(chains, reports)
    if any(report["figure_6"]["length"] for report in chains.values()):
        plots["figure_6b_length.png"] = length(chains, reports)
    for name, figure in plots.items():
        save_figure(figure, out / name)
    return list(plots)


def new_axes(width: float, height: float, **labels) -> Axes:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.add_subplot(**labels)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def values(estimates: list[dict], key: str = "value") -> np.ndarray:
    return np.array([estimate[key] for estimate in estimates])


def draw(
    axes: Axes, x: np.ndarray, estimates: list, place: int, label: str, line: str = "-"
):
    """Values with their intervals; the model at a place has its colour in all plots."""
    value = values(estimates)
    errors = np.stack([value - values(estimates, "low"), values(estimates, "high") - value])
    axes.errorbar(
        x,
        value,
        errors.clip(min=0),  # (2, n)
        color=COLORS[place % len(COLORS)],
        fmt="o" + line,
        markersize=5,
        capsize=3,
        label=label,
    )
    axes.legend(frameon=False, fontsize=9)


def table_1(reports: Reports) -> Figure:
    """A point a model in each cell, with n below."""
    title = "Right answers by form of question and strength of the damage"
    axes = new_axes(10, 4.2, title=title, ylabel="share right (captions: F1)")
    for place, (name, report) in enumerate(reports.items()):
        table = report["table_1"]
        cells = {key: table[key] for key in table if key not in ("overall", "per question")}
        n = values(cells.values(), "n")
        aside = (place - (len(reports) - 1) / 2) * 0.6 / len(reports)
        x = np.arange(len(cells)) + aside
        there = [cell for cell in cells.values() if cell["n"]]
        overall = table["overall"]["value"]
        label = name if overall is None else f"{name} (overall {overall:.3f})"
        draw(axes, x[n > 0], there, place, label, line="")
    names = [key.replace(" ", "\n") + f"\nn {count}" for key, count in zip(cells, n)]
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(top=1.05)
    return axes.figure


def table_2(reports: Reports) -> Figure:
    """Accuracy against the intensity of one degradation, a line a model."""
    title = "Choice questions as one degradation grows"
    axes = new_axes(6, 4.2, title=title, xlabel="intensity", ylabel="share right")
    ticks = {0.0: "clean"}
    for place, (name, report) in enumerate(reports.items()):
        table = report["table_2"]
        if table:
            x = np.array([0.0 if key == "clean" else float(key) for key in table])
            ticks = {s: f"{s:.0%}" for s in x} | ticks
            # so that no interval hides another
            aside = 0.008 * (place - (len(reports) - 1) / 2)
            estimates = list(table.values())
            draw(axes, x + aside, estimates, place, f"{name} (n {estimates[0]['n']} each)")
    axes.set_xticks(list(ticks), list(ticks.values()))
    return axes.figure


def types(reports: Reports) -> Figure:
    """Heat maps: of each true type, how often it was named as which. The diagonal is right."""
    figure = Figure(figsize=(1.5 + 6.6 * len(reports), 7.2), dpi=110, layout="constrained")
    figure.suptitle(
        "Which damage is taken for which: "
        "the percentage of each true type (row) that the chain names so (column)"
    )
    for place, (name, report) in enumerate(reports.items(), start=1):
        counts = np.array(report["figure_6"]["confusion"])  # (18, 18)
        times = counts.sum(1)
        percent = 100 * counts / times[:, None].clip(min=1e-9)
        axes = figure.add_subplot(1, len(reports), place)
        axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for y, x in np.argwhere(percent >= 3):
            value = percent[y, x]
            color = "white" if value > 55 else "#222222"
            axes.text(
                x,
                y,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color=color,
            )
        places = range(len(counts))
        true_types = [*TYPES, "nothing (invented)"]
        rows = [f"{type} ({n:.0f})" for type, n in zip(true_types, times)]
        axes.set_yticks(places, rows, fontsize=8)
        axes.set_xticks(places, [*TYPES, "missed"], rotation=90, fontsize=8)
        axes.set_xlabel("type in the chain")
        axes.set_ylabel("true type (how often)")
        f1 = report["summary"]["type_f1"]["value"]
        axes.set_title(name if f1 is None else f"{name}: type F1 {f1:.3f}")
    return figure


def intensity(reports: Reports, all_reports: Reports) -> Figure:
    """Mean predicted intensity of rightly named types against the true one."""
    labels = {"xlabel": "true intensity", "ylabel": "mean intensity in the chain"}
    title = "Intensity of the types that were named rightly"
    axes = new_axes(5.6, 5, title=title, xlim=(0, 1), ylim=(0, 1), aspect="equal", **labels)
    axes.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="true")
    for name, report in reports.items():
        curve = report["figure_6"]["intensity"]
        error = report["summary"]["intensity_error"]["value"]
        label = name if error is None else f"{name}: mean error {error:.3f}"
        if curve:
            draw(axes, values(curve, "true"), curve, list(all_reports).index(name), label)
    return axes.figure


def length(reports: Reports, all_reports: Reports) -> Figure:
    """Mean chain length against total intensity, and the true chains' own."""
    labels = {"xlabel": "total intensity (0: clean)", "ylabel": "tokens, mean"}
    axes = new_axes(
        6.4, 4.2, title="Chain length against the damage (black: true chains)", **labels
    )
    for name, report in reports.items():
        curve = report["figure_6"]["length"]
        if curve:
            total = values(curve, "total")
            draw(axes, total, curve, list(all_reports).index(name), name)
            axes.plot(total, values(curve, "truth"), "--s", color="black", zorder=0)
    axes.set_ylim(bottom=0)
    return axes.figure
