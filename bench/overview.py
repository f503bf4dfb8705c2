"""The README's picture: a damaged scene, the chain that the model writes about it, curves of a run.

python bench/overview.py                # after bench/paper.py; writes docs/overview.png
"""

import tempfile
import textwrap
from pathlib import Path

import held_out
import matplotlib.image
from matplotlib.figure import Figure

from rr1 import files, records, tiny
from rr1.curves import draw_curve

RUN = Path("runs/paper/longer-0")  # the shipped grpo
RECORD = 268  # of the held-out data
CURVES = ("reward/accuracy", "reward/deg")
OUT = "docs/overview.png"


def main() -> None:
    record = records.read(tiny.dataset("test"))[RECORD]
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one"
        [row] = held_out.answers(str(RUN / "model"), [record], one, plain=False)

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
    metrics = files.read_lines(RUN / "metrics.jsonl")
    for name in CURVES:
        draw_curve(curve, metrics, name)
    curve.set(xlabel="GRPO step", ylabel="mean over the responses")
    curve.legend(frameon=False, fontsize=8)
    files.save_figure(figure, OUT)
    print("written:", OUT)


if __name__ == "__main__":
    main()
