"""The plots: the curves of a run (`draw_curves`), and those of an evaluation, drawn from `metrics.report` (`draw_all`). Each of
these has one message; bars and bands are 95 % intervals.

    table_1.png              are answers right, by form and total intensity?
    table_2.png              how fast does accuracy fall as the damage grows?
    figure_6a_types.png      which type of damage is taken for which?
    figure_6a_intensity.png  is the intensity read right?
    figure_6b_length.png     does the chain grow with the damage, as the true one does?
"""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rr1.evaluation.metrics import FORMS, LEVELS, TYPES

COLORS = ("#7f7f7f", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22")    # the first: base, plain
Reports = dict[str, dict]


def draw_all(reports: Reports, out: Path) -> list[str]:
    """Draw what there is data for, for each plot all models together; returns the files' names."""
    chains = {name: r for name, r in reports.items() if "figure_6" in r}
    plots = {"table_1.png": table_1(reports)} if all(r["table_1"] for r in reports.values()) else {}
    if any(len(r["table_2"]) > 1 for r in reports.values()):
        plots["table_2.png"] = table_2(reports)
    if chains:
        plots["figure_6a_types.png"] = types(chains)
        if any(r["figure_6"]["intensity"] for r in chains.values()):
            plots["figure_6a_intensity.png"] = intensity(chains, reports)
        if any(r["figure_6"]["length"] for r in chains.values()):
            plots["figure_6b_length.png"] = length(chains, reports)
    for name, figure in plots.items():
        temporary = out / (name + ".tmp")
        figure.savefig(temporary, format="png")
        os.replace(temporary, out / name)
    return list(plots)


def _style(name: str, reports: Reports) -> dict:
    """A model keeps its colour in all plots."""
    return {"color": COLORS[list(reports).index(name) % len(COLORS)], "marker": "o", "markersize": 5, "capsize": 3}


def _axes(width: float, height: float, **labels: str) -> tuple[Figure, object]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.add_subplot(**labels)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(estimates: list[dict]) -> np.ndarray:
    """(2, n): from the value down to the interval's low end and up to its high one."""
    return np.clip([[e["value"] - e["low"] for e in estimates], [e["high"] - e["value"] for e in estimates]], 0, None)


def table_1(reports: Reports) -> Figure:
    """Grouped bars: nine cells, a bar a model, with n below."""
    figure, axes = _axes(10, 4.2, title="Right answers on damaged pictures, by form of question and total intensity",
                         ylabel="share right (captions: F1)")
    keys = [f"{form} {level}" for form in FORMS for level in LEVELS]
    width = 0.8 / len(reports)
    for i, (name, report) in enumerate(reports.items()):
        there = [(x + x // 3 * 0.5, report["table_1"][key]) for x, key in enumerate(keys) if report["table_1"][key]["n"]]
        places, estimates = [x + (i - (len(reports) - 1) / 2) * width for x, _ in there], [e for _, e in there]
        overall = report["table_1"]["overall"]["value"]
        label = name if overall is None else f"{name} (overall {overall:.3f})"
        axes.bar(places, [e["value"] for e in estimates], width * 0.95, color=_style(name, reports)["color"], label=label,
                 yerr=_bars(estimates), error_kw={"elinewidth": 1, "ecolor": "#333333"})
    n = [max(r["table_1"][key]["n"] for r in reports.values()) for key in keys]
    axes.set_xticks([x + x // 3 * 0.5 for x in range(9)], [f"{key}\nn {count}" for key, count in zip(keys, n)], fontsize=9)
    axes.legend(frameon=False, ncols=len(reports), loc="upper right", fontsize=9)
    axes.set_ylim(0, 1.12)
    return figure


def table_2(reports: Reports) -> Figure:
    """Accuracy against the intensity of one degradation, a line a model."""
    figure, axes = _axes(6, 4.2, title="Choice questions as one degradation grows", xlabel="intensity of the degradation",
                         ylabel="share right")
    ticks = set()
    for i, (name, report) in enumerate(reports.items()):
        points = [(0.0 if key == "clean" else float(key), e) for key, e in report["table_2"].items()]
        if points:
            x, estimates = zip(*points)
            ticks |= set(x)
            aside = 0.008 * (i - (len(reports) - 1) / 2)                            # so that the intervals do not hide each other
            axes.errorbar(np.array(x) + aside, [e["value"] for e in estimates], _bars(estimates), **_style(name, reports),
                          label=f"{name} (n {estimates[0]['n']} each)")
    axes.set_xticks(sorted(ticks), ["clean" if x == 0 else f"{x:.0%}" for x in sorted(ticks)])
    axes.legend(frameon=False, fontsize=9)
    return figure


def types(reports: Reports) -> Figure:
    """Heat maps: of each true type, how often it was named as which. The diagonal is right."""
    figure = Figure(figsize=(1.5 + 6.6 * len(reports), 7.2), dpi=110, layout="constrained")
    figure.suptitle("Which damage is taken for which: the percentage of each true type (row) that the chain names so (column)")
    for place, (name, report) in enumerate(reports.items(), start=1):
        counts = np.array(report["figure_6"]["confusion"])
        keep_row, keep_column = counts.any(1), counts.any(0)                        # rows and columns with nothing in them go,
        keep_row[:16] = keep_column[:16] = keep_column[-1] = True                   # but not those of the sixteen types
        rows = [f"{t} ({n:.0f})" for t, n in zip((*TYPES, "nothing (invented)"), counts.sum(1))]
        columns = [*TYPES, "missed"]
        shares = 100 * counts / counts.sum(1, keepdims=True).clip(min=1e-9)
        shares, rows = shares[keep_row][:, keep_column], [t for t, kept in zip(rows, keep_row) if kept]
        columns = [t for t, kept in zip(columns, keep_column) if kept]
        f1 = report["summary"]["type_f1"]["value"]
        axes = figure.add_subplot(1, len(reports), place)
        axes.set_title(name + (f": type F1 {f1:.3f}" if f1 is not None else ""))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for y, x in zip(*np.nonzero(shares >= 3)):
            axes.text(x, y, f"{shares[y, x]:.0f}", ha="center", va="center", fontsize=7.5,
                      color="white" if shares[y, x] > 55 else "#222222")
        axes.set_xticks(range(len(columns)), columns, rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_xlabel("type in the chain")
        if place == 1:
            axes.set_ylabel("true type (how often)")
    return figure


def intensity(reports: Reports, all_reports: Reports) -> Figure:
    """Mean predicted intensity of rightly named types against the true one."""
    figure, axes = _axes(5.6, 5, title="Intensity of the types that were named rightly", xlabel="true intensity",
                         ylabel="mean intensity in the chain", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="true")
    for name, report in reports.items():
        curve, error = report["figure_6"]["intensity"], report["summary"]["intensity_error"]["value"]
        if curve:
            axes.errorbar([p["true"] for p in curve], [p["value"] for p in curve], _bars(curve), **_style(name, all_reports),
                          label=f"{name}: mean error {error:.3f}")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def length(reports: Reports, all_reports: Reports) -> Figure:
    """Mean chain length against total intensity, and the true chains' own."""
    figure, axes = _axes(6.4, 4.2, title="Chain length against the damage", ylabel="tokens, mean",
                         xlabel="total intensity of the degradations (0: clean)")
    longest = max((r["figure_6"]["length"] for r in reports.values()), key=len)
    axes.plot([p["total"] for p in longest], [p["truth"] for p in longest], "--s", color="black", label="true chains")
    for name, report in reports.items():
        curve = report["figure_6"]["length"]
        axes.errorbar([p["total"] for p in curve], [p["value"] for p in curve], _bars(curve), **_style(name, all_reports),
                      label=name)
    axes.legend(frameon=False, fontsize=9)
    axes.set_ylim(bottom=0)
    return figure
