"""Runs over one another: their curves as one picture, their held-out figures as one table.

    python -m rr1.evaluation.compare runs/brevity runs/grpo                                   # -> runs/compare/curves.png, table.md
    python -m rr1.evaluation.compare runs/sweep/*-0 runs/sweep/*-1 --evaluation runs/sweep/eval

Runs whose settings differ in nothing but the seed are one setting: they are drawn as one band, from the lowest to the highest seed,
with the mean as its line. The table needs the answers to the held-out records, which `evaluate.py --models NAME=runs/NAME/model ..
--out FOLDER` writes; NAME is the run's folder name.
"""
from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rr1.evaluation import metrics
from rr1.run_folder import smooth
from rr1.files import write_text
from rr1.evaluation.statistics import cell, markdown

NOT_A_SETTING = {"seed", "out", "resume", "save_every", "tracker", "steps"}      # `steps`: a longer run of the same kind is comparable
CURVES = {"reward": "reward of the run itself", "reward/*": "", "kl": "KL to the reference (nats a token)", "entropy": "entropy (nats a token)",
          "length": "length (tokens)", "loss": "loss"}


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """A run's settings, without what does not make a setting, and its rows of metrics."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is not a run's folder with config.json and metrics.jsonl: {error}") from error
    if not rows:
        raise SystemExit(f"{folder}/metrics.jsonl holds no step yet")
    return {k: v for k, v in config.items() if k not in NOT_A_SETTING}, rows


def by_setting(folders: list[Path]) -> dict[str, list[Path]]:
    """Runs that differ only in the seed, under a label that says in what the settings differ."""
    settings = {folder: read_run(folder)[0] for folder in folders}
    names = sorted({name for config in settings.values() for name in config})
    differ = [name for name in names if len({json.dumps(config.get(name)) for config in settings.values()}) > 1]
    words = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    groups: dict[str, list[Path]] = {}
    alone = folders[0].name if len(folders) == 1 else "all runs"
    for folder, config in settings.items():
        label = ", ".join(f"{name} {words(config.get(name))}".strip() for name in differ) or alone
        groups.setdefault(label, []).append(folder)
    return groups


def draw(groups: dict[str, list[Path]], path: Path) -> None:
    """One panel a metric; single steps light, a moving average over them, a band where a setting has several seeds."""
    rows = {folder: read_run(folder)[1] for runs in groups.values() for folder in runs}
    found = list(dict.fromkeys(key for table in rows.values() for row in table for key in row))
    keys = [key for key in found if key in CURVES or key.startswith("reward/")]
    columns = min(3, len(keys))
    figure = Figure(figsize=(4.6 * columns, 3 * -(-len(keys) // columns) + 0.3), dpi=110, layout="constrained")
    for place, key in enumerate(keys, start=1):
        axes = figure.add_subplot(-(-len(keys) // columns), columns, place)
        for color, (label, runs) in enumerate(groups.items()):
            curves = [np.array([(row["step"], row[key]) for row in rows[run] if row.get(key) is not None], float).reshape(-1, 2) for run in runs]
            curves = [curve for curve in curves if len(curve)]
            if not curves:
                continue
            for curve in curves:
                axes.plot(*curve.T, ".", markersize=2, alpha=0.3, color=f"C{color}")
            shared = min(map(len, curves))
            smoothed = np.array([smooth(smooth(curve[:, 1]))[:shared] for curve in curves])
            steps = curves[0][:shared, 0]
            axes.plot(steps, smoothed.mean(0), color=f"C{color}", linewidth=1.8, label=label + (f" ({len(curves)} seeds)" if len(curves) > 1 else ""))
            if len(curves) > 1:
                axes.fill_between(steps, smoothed.min(0), smoothed.max(0), color=f"C{color}", alpha=0.2, linewidth=0)
        axes.set_title(CURVES.get(key) or key, fontsize=10), axes.set_xlabel("step", fontsize=8), axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8), axes.spines[["top", "right"]].set_visible(False)
        if place == 1 and len(groups) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", fontsize=9, frameon=False)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def table(groups: dict[str, list[Path]], evaluation: Path) -> str:
    """Held-out figures on damaged pictures, with 95 % intervals; a row a run."""
    lines, measures = [], []
    for label, runs in groups.items():
        for run in runs:
            path = evaluation / run.name / "predictions.jsonl"
            if not path.is_file():
                raise SystemExit(f"{path} is not there: python evaluate.py --models {run.name}={run}/model --out {evaluation}")
            judged = metrics.damaged([metrics.judge(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()])
            found = metrics.summary(judged)
            measures = list(found)
            lines.append([label, run.name, *(cell(found[m]._asdict()).partition(" n ")[0] for m in measures), str(len(judged))])
    return markdown(["setting", "run", *measures, "pictures"], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--evaluation", type=Path, help="where evaluate.py wrote; without it there is no table")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for curves.png and table.md (default: %(default)s)")
    a = parser.parse_args(argv)
    groups = by_setting(a.runs)
    a.out.mkdir(parents=True, exist_ok=True)
    draw(groups, a.out / "curves.png")
    for label, runs in groups.items():
        print(f"{label}: {', '.join(run.name for run in runs)}")
    if a.evaluation:
        text = table(groups, a.evaluation)
        write_text(a.out / "table.md", text + "\n")
        print(f"\n{text}")
    print(f"\nwritten: {a.out}/curves.png" + (", table.md" if a.evaluation else ""))


if __name__ == "__main__":
    main()
