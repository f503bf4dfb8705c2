"""What of the paper's claim can be seen in the drawn world? All the evidence, by one command.

    python bench/paper.py --jobs 2               # 3 seeds -> runs/paper/report.md, accuracy.png
    python bench/paper.py --jobs 2 --worlds 0 5  # then: the same models, more held-out scenes
    python bench/paper.py --worlds 5 --out runs/try             # to try settings, without world 0

For each seed, from the same base:

    plain       train_sft.py --plain: answers without chains, the paper's "w/o reasoning"
    sft         train_sft.py: the chains
    answer      sft, then train_grpo.py: the answer's reward among those of Eq. (9)

and for the first --controls of the seeds:

    paper       sft, then train_grpo.py --rewards deg len, Eq. (9)
    released    sft, then train_grpo.py --rewards accuracy format deg_released len
    w/o r_len, w/o r_deg    sft, then one of the paper's two rewards alone, Table 3
    own best    sft fine-tuned on its own best responses by the rewards of `answer`, as many steps
    longer      sft, then 160 steps of train_grpo.py, the answer's weight 3
    more sft, much more sft     sft trained on, on the same chains, for the seconds that `answer`
                and `longer` took

All answer the held-out records, greedy. Those with strong damage are answered by sft and answer
also with the picture blanked, and with TYPE written for them: the true damage, or another
picture's.
Differences are paired by record, the mean over seeds, with 95 % bootstrap intervals over records.
Run it again after an interruption: what is finished stays, what was begun goes on.
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
ANSWER = ["--rewards", "accuracy", "format", "deg", "len", "--reward-weights", 2, 1, 1, 1]
CONTROLS = {
    "paper": ["--rewards", "deg", "len"],
    "released": RELEASED,
    "w/o r_len": ["--rewards", "deg"],
    "w/o r_deg": ["--rewards", "len"],
    "own best": [*ANSWER, "--advantage", "best", "--beta", 0],
    "longer": [*ANSWER, "--reward-weights", 3, 1, 1, 1, "--steps", 160],
}
# fine-tuning for the seconds of an arm
MORE = {"more sft": "answer", "much more sft": "longer"}
PLAIN = ("base", "plain")
FORCED = ("sft", "answer")
ARMS = (*PLAIN, *FORCED, *CONTROLS, *MORE)
FORCINGS = (held_out.TRUE, held_out.OTHER, held_out.BLANK)
# what is compared at strong damage: after, before
PAIRS = [
    ("plain", "base"),
    ("sft", "plain"),
    ("answer", "plain"),
    ("answer", "sft"),
    ("paper", "sft"),
    ("released", "sft"),
    ("w/o r_len", "sft"),
    ("w/o r_deg", "sft"),
    ("own best", "sft"),
    ("more sft", "sft"),
    ("longer", "sft"),
    ("longer", "plain"),
    ("much more sft", "sft"),
    ("longer", "much more sft"),
    ("answer", "more sft"),
    ("answer", "own best"),
    ("paper", "w/o r_deg"),
    ("paper", "w/o r_len"),
]


@dataclass
class Config:
    model: str = opt(tiny.BASE, "the base that all start from")
    seeds: list[int] = opt([0, 1, 2], "of training")
    controls: int = opt(3, "how many of them, from the first, get the controls too", low=0)
    worlds: list[int] = opt(
        [0], "whose held-out scenes are asked about; 0 is never tuned on"
    )
    sft: str = opt("", 'more options for train_sft.py, as --sft="--steps 300"')
    grpo: str = opt("", "more options for train_grpo.py")
    jobs: int = opt(1, "processes at a time; they share the cores")
    out: str = opt("runs/paper", "folder for all runs, answers and the report")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    out = runs.begin(config, free={"seeds", "controls", "worlds", "jobs"})
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
        tasks[f"probe-{s}"] = ["train_sft.py", *start[s], *sft, "--steps", 12]
        tasks[f"answer-{s}"] = ["train_grpo.py", *start[s], *grpo, *ANSWER]
    controlled = config.seeds[: config.controls]
    for s in controlled:
        for arm, options in CONTROLS.items():
            tasks[folder(arm, s)] = ["train_grpo.py", *start[s], *grpo, *options]
    runs.train(config, tasks)
    tasks = {}
    for s in controlled:
        for arm, other in MORE.items():
            took = sum(runs.seconds(out / folder(other, s)))
            steps = runs.steps_in(took, out / f"probe-{s}")
            more = ["--lr", 3e-4, "--steps", steps]
            tasks[folder(arm, s)] = ["train_sft.py", *start[s], *sft, *more]
    runs.train(config, tasks)

    # 2. answer
    found = [record for w in config.worlds for record in records.read(scenes_of(config, w))]
    strong = [record for record in found if record["level"] == "strong"]
    calls = {}
    for arm in ARMS:
        seeds = controlled if arm in (*CONTROLS, *MORE) else config.seeds
        for s in seeds if arm != "base" else [0]:
            name = folder(arm, s)
            model = config.model if arm == "base" else str(out / name / "model")
            for condition in (held_out.OWN, *(FORCINGS if arm in FORCED else ())):
                asked = found if condition == held_out.OWN else strong
                path = out / name / f"answers {condition}, worlds {config.worlds}.jsonl"
                calls[arm, condition, s] = model, asked, path, arm in PLAIN, condition
    answered = runs.in_processes(config, held_out.answers, calls)
    rows = {}  # (arm, condition) -> seed -> answers
    for (arm, condition, s), made in answered.items():
        rows.setdefault((arm, condition), {})[s] = made

    # 3. compare
    text = report(rows)
    files.write_text(out / "report.md", text + "\n")
    files.save_figure(figure(rows), out / "accuracy.png")
    print(f"{text}\n\nwritten: {out}/report.md, accuracy.png")


def folder(arm: str, seed: int) -> str:
    return arm.replace("w/o ", "without-").replace(" ", "-") + f"-{seed}"


def scenes_of(config: Config, seed: int) -> str:
    """The held-out file of a world."""
    if seed == 0:
        return tiny.dataset("test")
    return str(world.write(f"{config.out}/world-{seed}", 8, seed=seed) / "test.jsonl")


def report(rows: dict[tuple[str, str], dict[int, list[dict]]]) -> str:
    """The tables, as Markdown. rows: (arm, condition) -> seed -> answers."""
    names = ("r_deg", "type_f1", "r_len", "length")
    header = ["accuracy", *world.LEVELS, "captions, strong", *names, "with total", "seeds"]
    arms = [arm for arm in ARMS if (arm, held_out.OWN) in rows]
    table = [summary(arm, rows[arm, held_out.OWN], names) for arm in arms]
    blocks = [markdown(header, table)]

    strong = {
        key: {s: held_out.questions_at(a, "strong") for s, a in answered.items()}
        for key, answered in rows.items()
    }
    table = []
    for after, before in PAIRS:
        if not {after, before} <= set(arms):
            continue
        two = strong[after, held_out.OWN], strong[before, held_out.OWN]
        table.append(compared(f"{after} minus {before}", *two))
    for arm in FORCED:
        own, true, other, blank = (strong[arm, c] for c in (held_out.OWN, *FORCINGS))
        table.append(compared(f"{arm}: true minus another's damage", true, other))
        table.append(compared(f"{arm}: own minus blank picture", own, blank))
    blocks.append(
        markdown(["accuracy at strong damage", "difference", "seeds above 0"], table)
    )

    table = []
    for name in names[:3]:
        for arm in arms[arms.index("answer") :]:
            two = rows[arm, held_out.OWN], rows["sft", held_out.OWN]
            table.append(compared(f"{name}: {arm} minus sft", *two, name))
    blocks.append(markdown(["all levels", "difference", "seeds above 0"], table))
    return "\n\n".join(blocks)


def summary(arm: str, answered: dict[int, list[dict]], names: tuple[str, ...]) -> list[str]:
    """One arm's row of the first table: the mean over its seeds."""
    everything = [row for rows in answered.values() for row in rows]
    hurt = [row for row in everything if row["level"] == "strong"]
    captions = [row for row in hurt if row["form"] == "caption"]
    parts = [held_out.questions_at(everything, level) for level in world.LEVELS]
    cells = [f"{held_out.mean(part):.3f}" for part in (*parts, captions)]
    if arm in PLAIN:
        return [arm, *cells, *["-"] * (len(names) + 1), str(len(answered))]
    cells += [f"{held_out.mean(everything, name):.3f}" for name in names]
    lengths, totals = ([row[name] for row in everything] for name in ("length", "total"))
    return [arm, *cells, f"{np.corrcoef(lengths, totals)[0, 1]:.2f}", str(len(answered))]


def compared(title: str, after: dict, before: dict, name: str = "score") -> list[str]:
    """The difference, over the seeds that both have; the base is the same for all seeds."""
    if title.endswith("minus base"):
        before = dict.fromkeys(after, before[0])
    seeds = [s for s in after if s in before]
    whole, *each = [
        held_out.difference([after[s] for s in some], [before[s] for s in some], name)
        for some in (seeds, *([s] for s in seeds))
    ]
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
        "answer": "tab:red",
        "longer": "tab:purple",
    }
    levels = list(world.LEVELS)
    for arm in [arm for arm in colors if (arm, held_out.OWN) in rows]:
        color, points = colors[arm], []
        for answered in rows[arm, held_out.OWN].values():
            at = [held_out.questions_at(answered, level) for level in levels]
            points.append([held_out.mean(part) for part in at])
        axis.plot(levels, np.mean(points, 0), "o-", color=color, label=arm)
        axis.fill_between(
            levels, np.min(points, 0), np.max(points, 0), color=color, alpha=0.2
        )
    axis.set(xlabel="damage, by total intensity", ylabel="share of right answers, greedy")
    axis.grid(alpha=0.3)
    axis.legend()
    return drawn


if __name__ == "__main__":
    main()
