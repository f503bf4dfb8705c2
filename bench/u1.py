"""Robust-U1 in figures: the tables of docs/dev/recover.md.

    python bench/u1.py --jobs 2                                   # both parts -> runs/u1
    python bench/u1.py --seeds 0 --n 64 --limit 64 --more="--steps 20"        # do both run?

recover   What brings the clean picture back? Stage I as it is by default; and for each seed
          Flow-GRPO, the same with shuffled advantages, and stage I for as many more steps as
          fit into those seconds (probe-SEED times a few first). All recover the same held-out
          damaged scenes from the same noise, with the steps that were chosen for them on
          training scenes, and with 40. A judge that is in no reward says what it sees.
reason    Does a recovered picture help to answer, and more than words about the damage? Stage III:
          one base, one number of steps, the same quarter of the training records; what differs is
          which pictures are shown (ROWS) and whether a chain is asked for. All answer the held-out
          damaged scenes, greedy. Where only a question is asked, the base also chooses by the
          logits over both pictures, added.

Differences are paired; intervals are 95 %, over pictures or records: what another seed of training
would change is not in them. What a run that was cut off has finished stays.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from judge import read_right, things, trained_judge
from rr1 import data, files, records, runtime, tiny, vlm
from rr1.evaluation import metrics
from rr1.evaluation.statistics import cell, interval, markdown, paired_difference
from rr1.runtime import opt
from rr1.tiny import scenes, world
from rr1.u1 import __main__ as data_set
from rr1.u1 import pairs, report, rewards
from rr1.u1.restorer import Restorer, recover, to_tensor
from runs import begin, run_all, seconds, steps_in, train

# a quarter of stage I's: this is a second round, from the first one's end
CONTROL_LR = 6e-4
LEVELS = [name for name in metrics.LEVELS if name != "none"]
LARGE_LR = 1e-3  # of the second round at the scenes' own side
MEASURES = report.TITLES | {"reward": "R", "read": "read right"}

# name -> title, pictures shown (c damaged, r recovered, x clean), what trains its model ("": base)
ROWS = {
    "base": ("the question: I_c", "c", ""),
    "base-r": ("the question: I_r", "r", ""),
    "base-x": ("the question: X", "x", ""),
    "both": ("the question: I_c, I_r", "cr", "both"),
    "chain": ("a chain: I_c", "c", "chain"),
    "chain-twice": ("a chain: I_c, I_c", "cc", "chain-twice"),
    "chain-both": ("a chain: I_c, I_r", "cr", "chain-both"),
    "chain-x": ("a chain: I_c, X", "cx", "chain-both"),
}
SUM = "the question: logits of I_c and I_r added"
TRAINED = {"both": "cr", "chain": "c", "chain-twice": "cc", "chain-both": "cr"}


@dataclass
class Config:
    parts: list[str] = opt(["recover", "reason"], "tables to make", ["recover", "reason"])
    model: str = opt(
        tiny.RESTORER, "recover: the restorer after stage I that all start from"
    )
    seeds: list[int] = opt([0, 1, 2], "of Flow-GRPO and its controls; of the fine-tunings")
    more: str = opt("", 'options for train_recover.py, as --more="--steps 20"')
    n: int = opt(512, "recover: held-out damaged scenes", low=1)
    limit: int = opt(0, "reason: answer this many records only; 0: all")
    jobs: int = opt(1, "processes at a time; they share the cores")
    out: str = opt("runs/u1", "folder for all runs, scores and the report")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    out = begin(config, free={"out", "jobs", "parts"})
    runtime.seed_everything(0)
    for part in config.parts:
        compare = compare_recoveries if part == "recover" else compare_answers
        text = compare(config, out)
        files.write_text(out / f"{part}.md", text + "\n")
        print(f"\n{text}\n\nwritten: {out}/{part}.md")


# ---------------------------------------------------------------- recover


def compare_recoveries(config: Config, out: Path) -> str:
    side = Restorer.from_pretrained(config.model).config["side"]
    pairs.load_source("", side)  # drawn once, before several runs ask for it

    # 1. train: Flow-GRPO, and its controls
    sft = ["train_recover.py", *shlex.split(config.more)]
    more = [*sft, "--model", config.model, "--lr", CONTROL_LR]
    grpo = [*sft, "--stage", "grpo", "--model", config.model]
    tasks = {}
    for s in config.seeds:
        tasks[f"stage-2-{s}"] = [*grpo, "--seed", s]
        tasks[f"shuffled-{s}"] = [*grpo, "--seed", s, "--shuffle"]
        tasks[f"probe-{s}"] = [*more, "--seed", s, "--steps", 12]
    train(config, tasks)
    controls = {}
    for s in config.seeds:  # as long as the Flow-GRPO run's steps took
        steps = steps_in(sum(seconds(out / f"stage-2-{s}")), out / f"probe-{s}")
        controls[f"more-{s}"] = [*more, "--seed", s, "--steps", steps]
    train(config, controls)

    # 2. recover the held-out scenes
    damaged, clean, truth = held_out(config.n, side)
    seeds = [data.seed_for(0, i) for i in range(len(damaged))]
    stage_1 = Restorer.from_pretrained(config.model)
    shown = {
        "damaged": damaged,
        "clean": clean,
        "stage I": recover(stage_1, damaged, seeds),
        "one recovery": recover(stage_1, damaged, seeds, recoveries=1),
        "no gate": recover(stage_1, damaged, seeds, gate=0.0),
        "40 steps": recover(stage_1, damaged, seeds, steps=40),
    }
    for name in [*tasks, *controls]:
        if not name.startswith("probe"):
            model = Restorer.from_pretrained(out / name / "model")
            title = f"{name} ({model.config['steps']} steps)"
            shown[title] = recover(model, damaged, seeds)
            shown[f"{name}, 40 steps"] = recover(model, damaged, seeds, steps=40)

    # 3. score
    encoder = rewards.load_encoder(tiny.BASE)
    judge = trained_judge(side)
    scores = {}
    for name, pictures in shown.items():
        found = report.measure(pictures, clean, encoder)
        found["reward"] = report.earned(found)
        found["read"] = read_right(judge, pictures, truth)
        scores[name] = found
    return report.table(scores, "stage I", MEASURES)


def held_out(n: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first n held-out scenes that are damaged: damaged, clean, and the things in them."""
    source, found, drawn = pairs.Scenes(side, seed=1), [], []
    index = 0
    while len(found) < n:
        _, degradations, _ = world.undamaged(index, 1)
        if degradations:
            found.append(source.pair(index))
            drawn.append(world.sample_scene(np.random.default_rng([1, index])))
        index += 1
    damaged, clean = zip(*found)
    return to_tensor(damaged), to_tensor(clean), things(drawn)


# ---------------------------------------------------------------- reason


def compare_answers(config: Config, out: Path) -> str:
    # 1. recover the pictures, and write the records that show them
    tiny.dataset("train")
    large = ["train_recover.py", "--model", tiny.RESTORER, "--side", scenes.SIDE]
    large += ["--lr", LARGE_LR, "--steps", 1000, *shlex.split(config.more)]
    train(config, {"restorer": large})
    for part, split in (("sft", "train"), ("all", "test")):
        ask = f"--model {out}/restorer/model --part {part} --data {tiny.dataset(split)}"
        data_set.main(f"{ask} --out {out}/pairs/{split}".split())

    # 2. train: what is shown differs, and whether a chain is asked for
    tasks = {}
    for seed in config.seeds:
        for name, kind in TRAINED.items():
            shown = write_shown(out, "train", kind)
            ask = ["train_sft.py", "--data", shown, "--part", "all", "--seed", seed]
            tasks[f"{name}-{seed}"] = ask if name.startswith("chain") else [*ask, "--plain"]
    train(config, tasks)

    # 3. answer the held-out records, and compare
    tables = []
    for seed in config.seeds:
        folders = {
            name: out / f"{model}-{seed}" / "model" for name, (_, _, model) in ROWS.items()
        }
        rows = answers(config, out / f"eval-{seed}", folders)
        tables.append(f"Seed {seed}:\n\n{answer_tables(rows)}")
    return "\n\n".join(tables)


def answers(config: Config, out: Path, folders: dict[str, Path]) -> dict[str, list[dict]]:
    """Each row's judged answers to the held-out records."""
    tasks = {}
    for name, (_, kind, model) in ROWS.items():
        shown = write_shown(Path(config.out), "test", kind)
        ask = ["evaluate.py", "--data", shown, "--limit", config.limit, "--out", out / name]
        model = folders[name] if model else tiny.BASE
        ask += ["--no-table-2", "--models", f"{name}={model}"]
        plain = [] if name.startswith("chain") else ["--plain", name]
        tasks[f"{out.name}-{name}"] = [*ask, *plain]
    run_all(config, tasks)
    rows = {}
    for name in ROWS:
        answered = files.read_lines(out / name / name / "predictions.jsonl")
        rows[name] = metrics.damaged(list(map(metrics.judge, answered)))
    rows["sum"] = added_logits(rows["base"], Path(config.out))
    return rows


@torch.no_grad()
def added_logits(rows: list[dict], out: Path) -> list[dict]:
    """The base's choices again: the option that is likeliest over I_c and I_r together."""
    model, processor = vlm.load(tiny.BASE)
    shown = [records.read(write_shown(out, "test", kind)) for kind in "cr"]
    chosen = []
    for row in rows:
        if row["form"] == "choice":
            options = [processor.response_ids(option) for option in row["choices"]]
            total = torch.zeros(len(options))
            for found in shown:
                record = found[int(row["key"]) - 1]  # the line's number, from 1
                batch = data.load_batch([record], processor, plain=True)
                logps, mask, _ = vlm.group_logps(
                    model, data.encode(model, batch), [options]
                )
                total += (logps * mask).sum(1)
            row = metrics.judge(row | {"response": row["choices"][int(total.argmax())]})
        chosen.append(row)
    return chosen


def write_shown(out: Path, split: str, kind: str) -> Path:
    """The records of out/pairs/SPLIT with other pictures: one letter each, as in ROWS."""
    rows = []
    for record in files.read_lines(out / "pairs" / split / f"{split}.jsonl"):
        damaged, recovered = record["image"]
        # no longer `clean_image`: each record is asked about once
        pictures = {"c": damaged, "r": recovered, "x": record.pop("clean_image", None)}
        record["shown_clean"] = pictures["x"]
        record["image"] = [pictures[letter] for letter in kind]
        human = record["conversations"][0]
        human["value"] = "<image>" * len(kind) + human["value"].replace("<image>", "")
        rows.append(record)
    path = out / "pairs" / split / f"{kind}.jsonl"
    files.write_text(path, files.lines_of(rows))
    return path


def answer_tables(rows: dict[str, list[dict]]) -> str:
    """{name: judged rows on damaged pictures} -> what is right, and the same less the base's I_c
    for a question alone, less the chain's for a chain."""
    keys = {tuple(row["key"] for row in found) for found in rows.values()}
    if len(keys) > 1:
        raise SystemExit("not all answered the same records; delete eval-* and run again")
    asked = [("choice", level) for level in LEVELS]
    asked += [("choice", None), ("open", None), ("caption", None)]
    titles = [f"{form}, {level or 'all'}" for form, level in asked]
    now, less = [], []
    for name, found in rows.items():
        title = ROWS[name][0] if name in ROWS else SUM
        first = "chain" if name.startswith("chain") else "base"
        mine = [rows_of(found, *question) for question in asked]
        before = [rows_of(rows[first], *question) for question in asked]
        now.append([title, *(cell(metrics.share(part)) for part in mine)])
        less.append([title, *map(paired, mine, before)])
    return (
        f"{len(rows['base'])} held-out damaged scenes, greedy. Share right (captions: F1 of "
        f"phrases) [95 % interval] n.\n\n{markdown(['', *titles], now)}\n\n"
        "Each less the same with I_c alone, paired by record; **bold** where the interval is clear "
        f"of 0.\n\n{markdown(['', *titles], less)}"
    )


def rows_of(rows: list[dict], form: str, level: str | None) -> list[dict]:
    """The answers to one form of question, at one level of damage or at all."""
    found = [row for row in rows if row["form"] == form]
    return [row for row in found if level in (None, metrics.strength(row))]


def paired(rows: list[dict], chain: list[dict]) -> str:
    return interval(paired_difference(metrics.scores_of(rows), metrics.scores_of(chain)))


if __name__ == "__main__":
    main()
