"""The README's picture: a damaged scene, the chain that the model writes about it, curves of a run.

python bench/overview.py                # after train_grpo.py; writes docs/overview.png
"""

import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import held_out
import matplotlib.image
from matplotlib.figure import Figure

from rr1 import files, records, runtime, tiny
from rr1.runtime import opt


@dataclass
class Config:
    run: str = opt("runs/grpo", "folder of a GRPO run: its model and its metrics are shown")
    record: int = opt(26, "which record of the held-out data to show")
    curves: list[str] = opt(["reward/deg", "reward/len"], "names in metrics.jsonl")
    out: str = opt("docs/overview.png", "picture to write")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    record = records.read(tiny.dataset("test"))[config.record]
    with tempfile.TemporaryDirectory() as folder:
        [row] = held_out.answers(
            f"{config.run}/model", [record], Path(folder) / "one", plain=False
        )

    figure = Figure(figsize=(13, 3.4), dpi=110, layout="constrained")
    clean, damaged, text, curve = figure.subplots(1, 4, width_ratios=[1, 1, 2, 1.5])
    truth = ",\n".join(f"{d.type} {d.intensity:.2f}" for d in record["degradations"])
    shown = {
        clean: ("clean_image", "X, never shown\nto the model"),
        damaged: ("image", f"X_d: {truth}"),
    }
    for axes, (name, title) in shown.items():
        axes.imshow(matplotlib.image.imread(record[name]))
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    lines = [record["question"], "", *row["response"].splitlines()]
    chain = "\n".join(textwrap.fill(line, 62) for line in lines)
    text.text(0, 1, chain, va="top", family="monospace", fontsize=8)
    text.axis("off")
    metrics = files.read_lines(Path(config.run) / "metrics.jsonl")
    for name in config.curves:
        points = [(m["step"], m[name]) for m in metrics if name in m]
        curve.plot(*zip(*points), label=name)
    curve.set(xlabel="GRPO step", ylabel="mean over the responses")
    curve.legend(frameon=False, fontsize=8)
    files.save_figure(figure, config.out)
    print("written:", config.out)


if __name__ == "__main__":
    main()
