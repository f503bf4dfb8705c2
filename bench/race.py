"""From the same start and for the same seconds: which algorithm gains most?

    python bench/race.py --jobs 2                      # 3 seeds -> runs/race/report.md, race.png

All reinforce the fine-tuned model by the released code's rewards, for the same number of steps,
whose seconds are told apart in the table; `sft` is fine-tuned on, on its own chains, for the
seconds that `grpo` took. maxrl is made for rewards of 0 or 1, so it and the `grpo` beside it get
accuracy alone. At one update per rollout the ratio is 1 and every clip is the same algorithm:
`grpo` (clip .2) and `clip .01, high 10` must agree to the last digit, and do.

Answers are greedy, sampled (the mean of 8) and the best of 8, on held-out scenes at strong damage.
"""

from __future__ import annotations

from dataclasses import dataclass

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
# how, temperature, responses
SAMPLINGS = (("greedy", 0.0, 1), ("sampled", 1.0, 8))


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
        # beside the run whose seconds it is to tell in steps of its own
        tasks[f"probe-{s}"] = ["train_sft.py", *start, "--steps", 12]
        for name, options in VARIANTS.items():
            command = ["train_grpo.py", *start, "--steps", config.steps]
            tasks[f"{name}-{s}"] = [*command, *options]
    runs.train(config, tasks)
    tasks = {}
    for s in config.seeds:
        steps = runs.steps_in(sum(runs.seconds(out / f"grpo-{s}")), out / f"probe-{s}")
        start = ["--model", config.model, "--seed", s]
        tasks[f"sft-{s}"] = ["train_sft.py", *start, "--lr", 3e-4, "--steps", steps]
    runs.train(config, tasks)

    # 2. answer, 3. compare
    found = records.read(tiny.dataset("test"))
    strong = [r for r in found if r["level"] == "strong" and r["answer"]][: config.n]
    arms = {name: [f"{name}-{s}" for s in config.seeds] for name in ("sft", *VARIANTS)}
    models = {"start": config.model}
    models |= {run: str(out / run / "model") for of in arms.values() for run in of}
    calls = {}
    for run, model in models.items():
        for how, *sampling in SAMPLINGS:
            path = out / run / f"{how}.jsonl"
            calls[run, how] = model, strong, path, False, held_out.OWN, *sampling
    rows = runs.in_processes(config, held_out.answers, calls)
    start = held_out.mean(rows["start", "greedy"])
    table, points = [row_of("start", ["start"], rows, "-")], {}
    for name, of in arms.items():
        took = np.mean([sum(runs.seconds(out / run)) for run in of])
        table.append(row_of(name, of, rows, f"{took:.0f}"))
        points[name] = [held_out.mean(rows[run, "greedy"]) - start for run in of]
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


def row_of(name: str, of: list[str], rows: dict, seconds: str) -> list[str]:
    """A line of the table: the mean over the runs `of` this name."""
    greedy = [rows[run, "greedy"] for run in of]
    scores = np.array([[row["score"] for row in rows[run, "sampled"]] for run in of])
    best = scores.reshape(len(of), -1, 8).max(2).mean()
    gain = held_out.difference(greedy, [rows["start", "greedy"]] * len(of))
    right, r_deg, r_len = (
        held_out.over_seeds(greedy, key).mean() for key in ("score", "r_deg", "r_len")
    )
    values = (right, scores.mean(), best, r_deg, r_len)
    accuracy, *others = (f"{value:.3f}" for value in values)
    less = "-" if name == "start" else interval(gain)
    return [name, accuracy, less, *others, seconds]


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
