"""Runs over one another: their curves as one picture, their held-out figures as one table.

    python -m rr1.evaluation.compare runs/brevity runs/grpo       # -> runs/compare/curves.png
    python -m rr1.evaluation.compare runs/sweep/*-0 runs/sweep/*-1 --evaluation runs/sweep/eval

Runs whose settings differ in nothing but the seed are one setting: they are drawn as one band, from
the lowest to the highest seed, with the mean as its line. The table (table.md) needs the answers to
the held-out records, which `evaluate.py --models NAME=runs/NAME/model .. --out FOLDER` writes; NAME
is the run's folder name.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rr1.evaluation import metrics
from rr1.evaluation.statistics import cell, markdown
from rr1.files import read_lines, save_figure, write_text
from rr1.run_folder import smooth

# `steps`: a longer run of the same kind is comparable
NOT_A_SETTING = {"seed", "out", "resume", "save_every", "tracker", "steps"}
CURVES = {
    "reward": "reward of the run itself",
    "kl": "KL to the reference (nats a token)",
    "entropy": "entropy (nats a token)",
    "length": "length (tokens)",
    "loss": "loss",
}
Groups = dict[str, list[Path]]


def read_run(folder: Path) -> tuple:
    """A run's settings, without what does not make a setting, and its rows of metrics."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is not a run's folder with config.json: {error}") from error
    rows = read_lines(folder / "metrics.jsonl")
    if not rows:
        raise SystemExit(f"{folder}/metrics.jsonl holds no step yet")
    return {name: value for name, value in config.items() if name not in NOT_A_SETTING}, rows


def by_setting(folders: list[Path]) -> Groups:
    """Runs that differ only in the seed, under a label that says in what the settings differ."""
    settings = [read_run(folder)[0] for folder in folders]
    names = sorted(set().union(*settings))
    differ = []
    for name in names:
        values = [config.get(name) for config in settings]
        if any(value != values[0] for value in values):
            differ.append(name)
    alone = folders[0].name if len(folders) == 1 else "all runs"
    groups: Groups = {}
    for folder, config in zip(folders, settings):
        words = [f"{name} {as_words(config.get(name))}".strip() for name in differ]
        groups.setdefault(", ".join(words) or alone, []).append(folder)
    return groups


def as_words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def draw(groups: Groups, path: Path) -> None:
    """One panel a metric; single steps light, over them a moving average, of seeds a band."""
    rows = {run: read_run(run)[1] for runs in groups.values() for run in runs}
    names = dict.fromkeys(name for table in rows.values() for row in table for name in row)
    panels = [name for name in names if name in CURVES or name.startswith("reward/")]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (4.6 * columns, 3 * lines + 0.3)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    for place, name in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for color, (label, runs) in enumerate(groups.items()):
            curves = [curve_of(rows[run], name) for run in runs]
            draw_band(axes, [curve for curve in curves if len(curve)], f"C{color}", label)
        axes.set_title(CURVES.get(name, name), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 1 and len(groups) > 1:
            handles = axes.get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower left", fontsize=9, frameon=False)
    save_figure(figure, path)


def curve_of(rows: list[dict], name: str) -> np.ndarray:
    """(steps, 2): step and value, of the steps that have one."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array(points, float)


def draw_band(axes: Axes, curves: list[np.ndarray], color: str, label: str) -> None:
    """One setting: the smoothed mean over its seeds, within their range."""
    if not curves:
        return
    for curve in curves:
        axes.plot(*curve.T, ".", markersize=2, alpha=0.3, color=color)
    shared = min(map(len, curves))
    steps = curves[0][:shared, 0]
    smoothed = np.stack(
        [smooth(smooth(curve[:, 1]))[:shared] for curve in curves]
    )  # (seeds, steps)
    if len(curves) > 1:
        label += f" ({len(curves)} seeds)"
        low, high = smoothed.min(0), smoothed.max(0)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(steps, smoothed.mean(0), color=color, linewidth=1.8, label=label)


def table(groups: Groups, evaluation: Path) -> str:
    """Held-out figures on damaged pictures, with 95 % intervals; a row a run."""
    lines, measures = [], []
    for label, runs in groups.items():
        for run in runs:
            path = evaluation / run.name / "predictions.jsonl"
            if not path.is_file():
                command = f"evaluate.py --models {run.name}={run}/model --out {evaluation}"
                raise SystemExit(f"{path} is not there: python {command}")
            judged = metrics.damaged([metrics.judge(row) for row in read_lines(path)])
            found = metrics.summary(judged)
            measures = list(found)
            cells = [cell(found[name]._asdict()).partition(" n ")[0] for name in measures]
            lines.append([label, run.name, *cells, str(len(judged))])
    return markdown(["setting", "run", *measures, "pictures"], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--evaluation", type=Path, help="where evaluate.py wrote; empty: no table")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="default: %(default)s"
    )
    options = parser.parse_args(argv)
    groups = by_setting(options.runs)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(groups, options.out / "curves.png")
    for label, runs in groups.items():
        print(f"{label}: {', '.join(run.name for run in runs)}")
    if options.evaluation:
        text = table(groups, options.evaluation)
        write_text(options.out / "table.md", text + "\n")
        print(f"\n{text}")
    print(f"\nwritten: {options.out}/curves.png{', table.md' if options.evaluation else ''}")


if __name__ == "__main__":
    main()
