"""The README's picture: a damaged scene, the chain that the trained model writes about it, and the
reward while it learnt.

    python bench/overview.py      # after train_grpo.py; writes docs/overview.png
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rr1 import data, files, records, run_folder, runtime, tiny, vlm
from rr1.rollout import sample_group
from rr1.runtime import opt


@dataclass
class Config:
    run: str = opt("runs/grpo", "folder of a GRPO run: its model and its metrics are shown")
    record: int = opt(156, "which damaged record of the held-out data to show")
    out: str = opt("docs/overview.png", "picture to write")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    damaged = [r for r in records.read(tiny.dataset("test")) if r["degradations"]]
    record = damaged[config.record]
    figure = Figure(figsize=(13, 3.4), dpi=110, layout="constrained")
    clean, hurt, text, curve = figure.subplots(1, 4, width_ratios=[1, 1, 2, 1.5])
    truth = ",\n".join(f"{kind} {s:.2f}" for kind, s in record["degradations"])
    show(clean, record["clean_image"], "X, never shown\nto the model")
    show(hurt, record["image"], f"X_d: {truth}")
    write(text, record, chain_about(record, f"{config.run}/model"))
    draw_rewards(curve, files.read_lines(f"{config.run}/metrics.jsonl"))
    files.save_figure(figure, config.out)
    print("written:", config.out)


def chain_about(record: dict, checkpoint: str) -> str:
    model, processor = vlm.load(checkpoint)
    prompts = data.encode(model, data.load_batch([record], processor))
    [[answer]] = sample_group(
        model,
        prompts,
        1,
        [0],
        end_id=processor.end_id,
        max_new_tokens=128,
        temperature=0,
        banned=processor.banned_ids,
    )
    return processor.decode(answer.ids)


def show(axes: Axes, path: str, title: str) -> None:
    axes.imshow(matplotlib.image.imread(path))
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def write(axes: Axes, record: dict, chain: str) -> None:
    lines = [textwrap.fill(line, 62) for line in chain.splitlines()]
    words = "\n".join([record["question"], "", *lines])
    axes.text(0, 1, words, va="top", family="monospace", fontsize=8)
    axes.set_title("the chain that the model writes", fontsize=9)
    axes.axis("off")


def draw_rewards(axes: Axes, rows: list[dict]) -> None:
    """The rewards of each step's responses as dots, and their moving average."""
    steps = [row["step"] for row in rows]
    for name, label in (("reward/deg", "r_deg, Eq. (6)"), ("reward/len", "r_len, Eq. (8)")):
        values = np.array([row[name] for row in rows])
        [points] = axes.plot(steps, values, ".", markersize=3, alpha=0.35)
        average = run_folder.smooth(values, 1 / 3)
        axes.plot(steps, average, color=points.get_color(), label=label)
    axes.set_xlabel("GRPO step (dots: each with other pictures)")
    axes.set_ylabel("mean reward of what was sampled")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
