"""Runs over one another: their curves as one picture.

    python -m rr1.evaluation.compare runs/brevity runs/grpo       # -> runs/compare/curves.png

Runs whose settings differ in nothing but the seed are one setting: they are drawn as one band, from
the lowest to the highest seed, with the mean as its line. Held-out curves are there if the runs
were made with --eval-every; the table of held-out figures is evaluate.py's.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from rr1.curves import curve_of, new_panels, smooth
from rr1.files import read_lines, save_figure

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
        raise SystemExit(
            f"{folder} is not a run's folder with config.json: {error}"
        ) from error
    rows = read_lines(folder / "metrics.jsonl")
    if not rows:
        raise SystemExit(f"{folder}/metrics.jsonl holds no step yet")
    return {
        name: value for name, value in config.items() if name not in NOT_A_SETTING
    }, rows


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
    parts = ("reward/", "eval/")
    panels = [name for name in names if name in CURVES or name.startswith(parts)]
    figure, all_axes = new_panels(CURVES.get(name, name) for name in panels)
    for axes, name in zip(all_axes, panels):
        for color, (label, runs) in enumerate(groups.items()):
            curves = [curve_of(rows[run], name) for run in runs]
            draw_band(axes, [curve for curve in curves if len(curve)], f"C{color}", label)
    if len(groups) > 1:
        handles = all_axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower left", fontsize=9, frameon=False)
    save_figure(figure, path)


def draw_band(axes: Axes, curves: list[np.ndarray], color: str, label: str) -> None:
    """One setting: the smoothed mean over its seeds, within their range."""
    if not curves:
        return
    for curve in curves:
        axes.plot(*curve.T, ".", markersize=2, alpha=0.3, color=color)
    shared = min(map(len, curves))
    steps = curves[0][:shared, 0]
    smoothed = [smooth(smooth(curve[:, 1]))[:shared] for curve in curves]
    smoothed = np.stack(smoothed)  # (seeds, steps)
    if len(curves) > 1:
        label += f" ({len(curves)} seeds)"
        low, high = smoothed.min(0), smoothed.max(0)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(steps, smoothed.mean(0), color=color, linewidth=1.8, label=label)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="default: %(default)s"
    )
    options = parser.parse_args(argv)
    groups = by_setting(options.runs)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(groups, options.out / "curves.png")
    for label, runs in groups.items():
        print(f"{label}: {', '.join(run.name for run in runs)}")
    print(f"\nwritten: {options.out}/curves.png")


if __name__ == "__main__":
    main()
