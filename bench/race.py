"""From the same start and for the same seconds: which algorithm gains most?

    python bench/race.py --jobs 2                      # 3 seeds -> runs/race/report.md, race.png

All reinforce the fine-tuned model by the released code's rewards, for the same number of steps,
whose seconds are told apart in the table; `sft` is fine-tuned on, on its own chains, for the
seconds that `grpo` took. maxrl is made for rewards of 0 or 1, so it and the `grpo` beside it get
accuracy alone. At one update per rollout the ratio is 1 and every clip is the same algorithm: `clip
.2` and `clip .01, high 10` must agree to the last digit, and do.

Answers are greedy, sampled (the mean of 8) and the best of 8, on held-out scenes at strong damage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import held_out
import numpy as np
from paper import RELEASED

import runs
from rr1 import files, records, runtime, tiny
from rr1.evaluation.statistics import interval, markdown
from rr1.runtime import opt

ALONE = ["--rewards", "accuracy"]
VARIANTS = {
    "grpo": RELEASED,
    "dr_grpo": [*RELEASED, "--advantage", "dr_grpo", "--loss", "dr_grpo"],
    "dapo": [*RELEASED, "--loss", "dapo", "--clip-high", 0.28, "--beta", 0],
    "rloo": [*RELEASED, "--advantage", "rloo"],
    "gdpo": [*RELEASED, "--advantage", "gdpo"],
    "expert iteration": [*RELEASED, "--advantage", "best", "--beta", 0],
    "grpo, accuracy": ALONE,
    "maxrl, accuracy": [*ALONE, "--advantage", "maxrl"],
    "clip .01, high 10": [*RELEASED, "--clip", 0.01, "--clip-high", 10],
}


@dataclass
class Config:
    model: str = opt(tiny.SFT, "the fine-tuned checkpoint that all start from")
    seeds: list[int] = opt([0, 1, 2], "of training")
    steps: int = opt(40, "of each reinforcement")
    n: int = opt(400, "held-out scenes")
    jobs: int = opt(1, "processes at a time; they share the cores")
    out: str = opt("runs/race", "folder for all runs, answers and the report")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    out = runs.begin(config, free={"seeds", "jobs"})
    tiny.dataset("train")  # drawn once, before several processes want it

    # 1. train
    tasks: dict[str, list] = {}
    for s in config.seeds:
        start = ["--model", config.model, "--seed", s]
        for name, options in VARIANTS.items():
            tasks[f"{name}-{s}"] = [
                "train_grpo.py",
                *start,
                "--steps",
                config.steps,
                *options,
            ]
        tasks[f"probe-{s}"] = ["train_sft.py", *start, "--steps", 12]
    runs.train(config, tasks)
    tasks = {}
    for s in config.seeds:
        steps = runs.steps_in(sum(runs.seconds(out / f"grpo-{s}")), out / f"probe-{s}")
        start = ["--model", config.model, "--seed", s]
        tasks[f"sft-{s}"] = ["train_sft.py", *start, "--lr", 3e-4, "--steps", steps]
    runs.train(config, tasks)

    # 2. answer, 3. compare
    found = [
        r
        for r in records.read(tiny.dataset("test"))
        if r["level"] == "strong" and r["answer"]
    ]
    found = found[: config.n]
    start = answered(config.model, found, out / "start")
    table = [row_of("start", [start], None, "-")]
    points = {}
    for name in ("sft", *VARIANTS):
        each = [
            answered(out / f"{name}-{s}" / "model", found, out / f"{name}-{s}")
            for s in config.seeds
        ]
        took = np.mean([sum(runs.seconds(out / f"{name}-{s}")) for s in config.seeds])
        table.append(row_of(name, each, start, f"{took:.0f}"))
        points[name] = [
            held_out.mean(one["greedy"]) - held_out.mean(start["greedy"]) for one in each
        ]
    header = [
        "",
        "greedy",
        "less the start",
        "sampled",
        "best of 8",
        "r_deg, greedy",
        "r_len, greedy",
        "seconds",
    ]
    text = markdown(header, table)
    files.write_text(out / "report.md", text + "\n")
    files.save_figure(figure(points), out / "race.png")
    print(f"{text}\n\nwritten: {out}/report.md, race.png")


def answered(
    checkpoint: str | Path, found: list[dict], folder: Path
) -> dict[str, list[dict]]:
    """Greedy answers, one a record, and 8 sampled ones."""
    greedy = held_out.answers(str(checkpoint), found, folder / "greedy.jsonl", plain=False)
    path = folder / "sampled.jsonl"
    sampled = held_out.answers(
        str(checkpoint), found, path, plain=False, temperature=1.0, G=8
    )
    return {"greedy": greedy, "sampled": sampled}


def row_of(name: str, each: list[dict], start: dict | None, seconds: str) -> list[str]:
    greedy = [one["greedy"] for one in each]
    scores = np.array([[row["score"] for row in one["sampled"]] for one in each])
    best = scores.reshape(len(each), -1, 8).max(2).mean()
    gain = "-"
    if start:
        gain = interval(
            held_out.difference(greedy, [start["greedy"]] * len(each))._asdict()
        )
    means = [
        np.mean([held_out.mean(rows, key) for rows in greedy])
        for key in ("score", "r_deg", "r_len")
    ]
    accuracy, deg, length = (f"{value:.3f}" for value in means)
    return [
        name,
        accuracy,
        gain,
        f"{scores.mean():.3f}",
        f"{best:.3f}",
        deg,
        length,
        seconds,
    ]


def figure(points: dict[str, list[float]]):
    """The gain of each variant, one dot a seed."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 3.2), layout="constrained")
    axis = drawn.subplots()
    for place, values in enumerate(points.values()):
        axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
    axis.axvline(0, color="0.5")
    axis.set(
        xlabel="gain in greedy accuracy at strong damage",
        yticks=range(len(points)),
        yticklabels=points,
    )
    return drawn


if __name__ == "__main__":
    main()
