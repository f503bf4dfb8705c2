"""The plots of an evaluation, drawn from its reports (`rr1.evaluation.report`).

Each has one message; bars and bands are 95 % intervals.

    table_1.png              are answers right, by form and total intensity?
    table_2.png              how fast does accuracy fall as the damage grows?
    figure_6a_types.png      which type of damage is taken for which?
    figure_6a_intensity.png  is the intensity read right?
    figure_6b_length.png     does the chain grow with the damage, as the true one does?
"""

from collections.abc import Sequence
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


def color_of(name: str, reports: Reports) -> str:
    """A model keeps its colour in all plots."""
    return COLORS[list(reports).index(name) % len(COLORS)]


def new_axes(width: float, height: float, **labels) -> Axes:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.add_subplot(**labels)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def values(estimates: Sequence[dict], key: str = "value") -> np.ndarray:
    return np.array([estimate[key] for estimate in estimates])


def error_bars(estimates: Sequence[dict]) -> np.ndarray:
    """(2, n): from the value down to the interval's low end and up to its high one."""
    middle = values(estimates)
    bars = np.stack([middle - values(estimates, "low"), values(estimates, "high") - middle])
    return bars.clip(min=0)


def draw_curve(axes: Axes, x: np.ndarray, estimates: list[dict], color: str, label: str) -> None:
    axes.errorbar(
        x,
        values(estimates),
        error_bars(estimates),
        color=color,
        marker="o",
        markersize=5,
        capsize=3,
        label=label,
    )


def table_1(reports: Reports) -> Figure:
    """Grouped bars: a bar a model in each cell, with n below."""
    title = "Right answers by form of question and strength of the damage"
    axes = new_axes(10, 4.2, title=title, ylabel="share right (captions: F1)")
    first = next(iter(reports.values()))
    keys = [key for key in first["table_1"] if key not in ("overall", "per question")]
    order = np.arange(len(keys))
    centres = order + order // (len(keys) // 3) * 0.5  # a gap between the three forms
    width = 0.8 / len(reports)
    counts = np.zeros(len(keys), int)
    for i, (name, report) in enumerate(reports.items()):
        cells = [report["table_1"][key] for key in keys]
        n = values(cells, "n")
        counts = np.maximum(counts, n)
        there = [cell for cell in cells if cell["n"]]
        overall = report["table_1"]["overall"]["value"]
        axes.bar(
            centres[n > 0] + (i - (len(reports) - 1) / 2) * width,
            values(there),
            width * 0.95,
            color=color_of(name, reports),
            label=name if overall is None else f"{name} (overall {overall:.3f})",
            yerr=error_bars(there),
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )
    names = [key.replace(" ", "\n") + f"\nn {count}" for key, count in zip(keys, counts)]
    axes.set_xticks(centres, names, fontsize=9)
    axes.legend(frameon=False, ncols=len(reports), loc="upper right", fontsize=9)
    axes.set_ylim(0, 1.12)
    return axes.figure


def table_2(reports: Reports) -> Figure:
    """Accuracy against the intensity of one degradation, a line a model."""
    title = "Choice questions as one degradation grows"
    axes = new_axes(
        6, 4.2, title=title, xlabel="intensity of the degradation", ylabel="share right"
    )
    ticks = {}
    for i, (name, report) in enumerate(reports.items()):
        table = report["table_2"]
        if table:
            x = np.array([0.0 if key == "clean" else float(key) for key in table])
            ticks |= {s: f"{s:.0%}" for s in x}
            aside = 0.008 * (i - (len(reports) - 1) / 2)  # so that no interval hides another
            estimates = list(table.values())
            label = f"{name} (n {estimates[0]['n']} each)"
            draw_curve(axes, x + aside, estimates, color_of(name, reports), label)
    ticks |= {0.0: "clean"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.legend(frameon=False, fontsize=9)
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
        rows = [f"{type} ({n:.0f})" for type, n in zip((*TYPES, "nothing (invented)"), times)]
        columns = [*TYPES, "missed"]
        # rows and columns with nothing in them go, but not those of the sixteen types
        keep_row = times > 0
        keep_column = counts.any(0)
        keep_row[:16] = keep_column[:16] = keep_column[-1] = True
        percent = percent[keep_row][:, keep_column]
        f1 = report["summary"]["type_f1"]["value"]
        axes = figure.add_subplot(1, len(reports), place)
        axes.set_title(name if f1 is None else f"{name}: type F1 {f1:.3f}")
        axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for y, x in np.argwhere(percent >= 3):
            value = percent[y, x]
            color = "white" if value > 55 else "#222222"
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=color)
        axes.set_xticks(
            range(keep_column.sum()),
            np.array(columns)[keep_column],
            rotation=55,
            ha="right",
            rotation_mode="anchor",
            fontsize=8,
        )
        axes.set_yticks(range(keep_row.sum()), np.array(rows)[keep_row], fontsize=8)
        axes.set_xlabel("type in the chain")
        if place == 1:
            axes.set_ylabel("true type (how often)")
    return figure


def intensity(reports: Reports, all_reports: Reports) -> Figure:
    """Mean predicted intensity of rightly named types against the true one."""
    axes = new_axes(
        5.6,
        5,
        title="Intensity of the types that were named rightly",
        xlabel="true intensity",
        ylabel="mean intensity in the chain",
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
    )
    axes.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="true")
    for name, report in reports.items():
        curve = report["figure_6"]["intensity"]
        if curve:
            error = report["summary"]["intensity_error"]["value"]
            label = name if error is None else f"{name}: mean error {error:.3f}"
            draw_curve(axes, values(curve, "true"), curve, color_of(name, all_reports), label)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return axes.figure


def length(reports: Reports, all_reports: Reports) -> Figure:
    """Mean chain length against total intensity, and the true chains' own."""
    axes = new_axes(
        6.4,
        4.2,
        title="Chain length against the damage",
        xlabel="total intensity of the degradations (0: clean)",
        ylabel="tokens, mean",
    )
    curves = {name: report["figure_6"]["length"] for name, report in reports.items()}
    longest = max(curves.values(), key=len)
    totals, truth = values(longest, "total"), values(longest, "truth")
    axes.plot(totals, truth, "--s", color="black", label="true chains")
    for name, curve in curves.items():
        if curve:
            draw_curve(axes, values(curve, "total"), curve, color_of(name, all_reports), name)
    axes.legend(frameon=False, fontsize=9)
    axes.set_ylim(bottom=0)
    return axes.figure
