"""What of the paper's claim can be seen in the drawn world? All the evidence, by one command.

    python bench/paper.py --jobs 2               # 3 seeds -> runs/paper/report.md, accuracy.png
    python bench/paper.py --seeds 0 --world 5    # another world's held-out scenes: to try settings

For each seed, from the same base:

    plain       train_sft.py --plain: answers without chains, the paper's "w/o reasoning"
    sft         train_sft.py: the few chains
    paper       sft, then train_grpo.py --rewards deg len, Eq. (9)
    released    sft, then train_grpo.py --rewards accuracy format deg_released len
    w/o r_len, w/o r_deg    sft, then one of the paper's two rewards alone, Table 3
    more sft    sft trained on, on the same chains, for the seconds that `released` took
    own best    sft fine-tuned on its own best responses by the released rewards, as many steps

All answer the held-out records, greedy; sft, paper and released also with the picture blanked, and
with TYPE written for them: the true damage, or another picture's. Differences are paired by record,
the mean over seeds, with 95 % bootstrap intervals over records. Run it again after an interruption:
what is finished stays, what was begun goes on.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import held_out
import numpy as np

import runs
from rr1 import files, records, runtime, tiny
from rr1.evaluation.statistics import interval, markdown
from rr1.runtime import opt
from rr1.tiny import world

RELEASED = ["--rewards", "accuracy", "format", "deg_released", "len"]
REWARDS = {
    "paper": ["--rewards", "deg", "len"],
    "released": RELEASED,
    "w/o r_len": ["--rewards", "deg"],
    "w/o r_deg": ["--rewards", "len"],
    "own best": [*RELEASED, "--advantage", "best", "--beta", 0],
}
ARMS = ("base", "plain", "sft", *REWARDS, "more sft")
PLAIN = ("base", "plain")
FORCED = ("sft", "paper", "released")
# what is compared at strong damage: after, before
PAIRS = [
    ("plain", "base"),
    ("sft", "plain"),
    *((arm, "sft") for arm in (*REWARDS, "more sft")),
]
PAIRS += [
    ("released", "more sft"),
    ("released", "own best"),
    ("paper", "w/o r_deg"),
    ("paper", "w/o r_len"),
]


@dataclass
class Config:
    model: str = opt(tiny.BASE, "the base that all start from")
    seeds: list[int] = opt([0, 1, 2], "of training")
    world: int = opt(
        0, "whose held-out scenes are asked about; 0 is the one that is never tuned on"
    )
    sft: str = opt("", 'more options for train_sft.py, as --sft="--steps 300"')
    grpo: str = opt("", "more options for train_grpo.py")
    jobs: int = opt(1, "processes at a time; they share the cores")
    out: str = opt("runs/paper", "folder for all runs, answers and the report")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    out = runs.begin(config, free={"seeds", "jobs"})
    tiny.dataset("train")  # drawn once, before several processes want it

    # 1. train
    sft, grpo = shlex.split(config.sft), shlex.split(config.grpo)
    start = {s: ["--seed", s, "--model", out / f"sft-{s}" / "model"] for s in config.seeds}
    tasks: dict[str, list] = {}
    for s in config.seeds:
        command = ["train_sft.py", "--model", config.model, "--seed", s, *sft]
        tasks |= {f"plain-{s}": [*command, "--plain"], f"sft-{s}": command}
    runs.train(config, tasks)
    tasks = {}
    for s in config.seeds:
        for arm, options in REWARDS.items():
            tasks[folder(arm, s)] = ["train_grpo.py", *start[s], *options, *grpo]
        tasks[f"probe-{s}"] = ["train_sft.py", *start[s], "--steps", 12]
    runs.train(config, tasks)
    tasks = {}
    for s in config.seeds:
        steps = runs.steps_in(sum(runs.seconds(out / f"released-{s}")), out / f"probe-{s}")
        tasks[folder("more sft", s)] = [
            "train_sft.py",
            *start[s],
            *sft,
            "--lr",
            3e-4,
            "--steps",
            steps,
        ]
    runs.train(config, tasks)

    # 2. answer
    found = records.read(scenes_of(config))
    rows: dict[tuple[str, str], list[list[dict]]] = {}
    for arm in ARMS:
        conditions = [held_out.OWN]
        if arm in FORCED:
            conditions += [held_out.TRUE, held_out.OTHER, held_out.BLANK]
        for condition in conditions:
            rows[arm, condition] = []
            for s in config.seeds if arm != "base" else [0]:
                name = folder(arm, s)
                checkpoint = config.model if arm == "base" else out / name / "model"
                path = out / name / f"answers {condition}.jsonl"
                made = held_out.answers(
                    str(checkpoint), found, path, arm in PLAIN, condition
                )
                rows[arm, condition].append(made)

    # 3. compare
    text = report(rows)
    files.write_text(out / "report.md", text + "\n")
    files.save_figure(figure(rows), out / "accuracy.png")
    print(f"{text}\n\nwritten: {out}/report.md, accuracy.png")


def folder(arm: str, seed: int) -> str:
    plain = arm.replace("w/o ", "without-").replace(" ", "-")
    return plain if arm == "base" else f"{plain}-{seed}"


def scenes_of(config: Config) -> str:
    """The held-out file of a world."""
    if config.world == 0:
        return tiny.dataset("test")
    return str(
        world.write(f"{config.out}/world", train=8, seed=config.world) / "test.jsonl"
    )


def report(rows: dict[tuple[str, str], list[list[dict]]]) -> str:
    """The tables, as Markdown. rows: (arm, condition) -> a list of answers for each seed."""
    levels = [*world.LEVELS]
    table = []
    for arm in ARMS:
        everything = [row for answered in rows[arm, held_out.OWN] for row in answered]
        cells = [
            f"{held_out.mean(held_out.questions_at(everything, level)):.3f}"
            for level in levels
        ]
        captions = [
            row
            for row in everything
            if row["form"] == "caption" and row["level"] == "strong"
        ]
        cells.append(f"{held_out.mean(captions):.3f}")
        if arm in PLAIN:
            cells += ["-"] * 5
        else:
            cells += [
                f"{held_out.mean(everything, name):.3f}"
                for name in ("r_deg", "type_f1", "r_len", "length")
            ]
            lengths, totals = (
                [row[name] for row in everything] for name in ("length", "total")
            )
            cells.append(f"{np.corrcoef(lengths, totals)[0, 1]:.2f}")
        table.append([arm, *cells])
    header = [
        "accuracy",
        *levels,
        "captions, strong",
        "r_deg",
        "type F1",
        "r_len",
        "length",
        "with total",
    ]
    blocks = [markdown(header, table)]

    strong = {
        key: [held_out.questions_at(a, "strong") for a in answered]
        for key, answered in rows.items()
    }
    table = [
        compared(f"{a} less {b}", strong[a, held_out.OWN], strong[b, held_out.OWN])
        for a, b in PAIRS
    ]
    for arm in FORCED:
        forced = strong[arm, held_out.TRUE]
        table.append(
            compared(
                f"{arm}: true less another's damage", forced, strong[arm, held_out.OTHER]
            )
        )
        own = strong[arm, held_out.OWN]
        table.append(
            compared(f"{arm}: own less blank picture", own, strong[arm, held_out.BLANK])
        )
    blocks.append(
        markdown(["accuracy at strong damage", "difference", "seeds above 0"], table)
    )

    table = []
    for name in ("r_deg", "type_f1", "r_len"):
        for arm, before in (
            *((arm, "sft") for arm in (*REWARDS, "more sft")),
            ("released", "more sft"),
        ):
            after = rows[arm, held_out.OWN]
            table.append(
                compared(
                    f"{name}: {arm} less {before}", after, rows[before, held_out.OWN], name
                )
            )
    blocks.append(markdown(["all levels", "difference", "seeds above 0"], table))
    return "\n\n".join(blocks)


def compared(title: str, after: list, before: list, name: str = "score") -> list[str]:
    before = before * (len(after) if len(before) == 1 else 1)  # one base for all seeds
    whole = held_out.difference(after, before, name)._asdict()
    each = [held_out.difference([a], [b], name) for a, b in zip(after, before, strict=True)]
    return [title, interval(whole), f"{sum(e.low > 0 for e in each)} of {len(each)}"]


def figure(rows: dict):
    """Accuracy over the level of damage, with the seeds' range."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.4, 3.6), layout="constrained")
    axis = drawn.subplots()
    colors = {
        "base": "0.5",
        "plain": "tab:orange",
        "sft": "tab:blue",
        "released": "tab:red",
    }
    for arm, color in colors.items():
        answered = rows[arm, held_out.OWN]
        points = [
            [held_out.mean(held_out.questions_at(a, level)) for level in world.LEVELS]
            for a in answered
        ]
        axis.plot([*world.LEVELS], np.mean(points, 0), "o-", color=color, label=arm)
        axis.fill_between(
            [*world.LEVELS], np.min(points, 0), np.max(points, 0), color=color, alpha=0.2
        )
    axis.set(xlabel="damage, by total intensity", ylabel="share of right answers, greedy")
    axis.grid(alpha=0.3)
    axis.legend()
    return drawn


if __name__ == "__main__":
    main()
