"""The README's picture: a damaged scene, the chain that the trained model writes about it, and the reward while it learnt.

    python bench/overview.py                               # after train_grpo.py; writes docs/overview.png
"""
from __future__ import annotations

import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

from rr1 import data, run_folder, runtime, tiny, vlm
from rr1.rollout import sample_group
from rr1.runtime import opt


@dataclass
class Config:
    run: str = opt("runs/grpo", "folder of a GRPO run: its model and its metrics are shown")
    record: int = opt(156, "which damaged record of the held-out data to show")
    out: str = opt("docs/overview.png", "picture to write")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    record = [r for r in data.read(tiny.dataset("test")) if r["degradations"]][config.record]
    rows = [json.loads(line) for line in open(Path(config.run) / "metrics.jsonl", encoding="utf-8")]
    model, processor = vlm.load(f"{config.run}/model")
    prompts = data.encode(model, data.load_batch([record], processor))
    [[rollout]] = sample_group(model, prompts, 1, [0], end_id=processor.end_id, max_new_tokens=128, temperature=0,
                               banned=processor.banned_ids)

    figure = Figure(figsize=(13, 3.4), dpi=110, layout="constrained")
    clean, damaged, text, curve = figure.subplots(1, 4, width_ratios=[1, 1, 2, 1.5])
    truth = ",\n".join(f"{d.type} {d.intensity:.2f}" for d in record["degradations"])
    for axes, path, title in ((clean, record["clean_image"], "X, never shown\nto the model"), (damaged, record["image"], f"X_d: {truth}")):
        axes.imshow(matplotlib.image.imread(path))
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    chain = "\n".join(textwrap.fill(line, 62) for line in processor.decode(rollout.ids).splitlines())
    text.text(0, 1, f"{record['question']}\n\n{chain}", va="top", family="monospace", fontsize=8)
    text.set_title("the chain that the model writes", fontsize=9)
    text.axis("off")
    steps = [row["step"] for row in rows]
    for name, label in (("reward/deg", "r_deg, Eq. (6)"), ("reward/len", "r_len, Eq. (8)")):
        values = np.array([row[name] for row in rows])
        points, = curve.plot(steps, values, ".", markersize=3, alpha=0.35)
        curve.plot(steps, run_folder.smooth(values, 1 / 3), color=points.get_color(), label=label)
    curve.set(xlabel="GRPO step (dots: each with other pictures)", ylabel="mean reward of what was sampled")
    curve.spines[["top", "right"]].set_visible(False)
    curve.legend(frameon=False, fontsize=8)
    temporary = config.out + ".tmp"
    figure.savefig(temporary, format="png")
    os.replace(temporary, config.out)
    print("written:", config.out)


if __name__ == "__main__":
    main()
