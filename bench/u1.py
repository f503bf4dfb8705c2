"""Robust-U1 in figures: the tables of docs/recover.md.

    python bench/u1.py --jobs 2                                   # both parts -> runs/u1
    python bench/u1.py --parts recover --seeds 0 --n 64 --grpo="--steps 20"   # a quick look

recover   Does Flow-GRPO help, and more than the same time of more fine-tuning? For each seed:
          Flow-GRPO by train_recover.py (grpo-SEED), and the control, stage I for as many steps as
          fit into those seconds (control-SEED; probe-SEED times a few steps first). All recover
          the same held-out damaged scenes from the same noise. A judge that is in no reward and
          never saw a damaged picture says which things it sees.
reason    Does a recovered picture help to answer, and more than words about the damage? Stage III:
          one base, one number of steps, the same quarter of the training records; what differs is
          which pictures are shown (ROWS) and whether a chain is asked for. All answer the held-out
          damaged scenes, greedy.

Differences are paired; intervals are 95 %, over pictures or records: what another seed of training
would change is not in them. What a run that was cut off has finished stays.
"""

from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rr1 import data, files, runtime, tiny
from rr1.evaluation import metrics
from rr1.evaluation.statistics import cell, interval, markdown, paired_difference
from rr1.runtime import opt
from rr1.tiny import world
from rr1.u1 import __main__ as data_set
from rr1.u1 import pairs, report, rewards
from rr1.u1.restorer import Restorer, recover, to_tensor
from runs import begin, read_rows, run_all, same_records, seconds, train

CONTROL_LR = 6e-4  # a quarter of stage I's: this is a second round, from the first one's end
LARGE_LR = 1e-3  # of the second round at the scenes' own side
MEASURES = report.TITLES | {"reward": "R", "read": "read right"}

KINDS = list(product(world.SHAPES, world.COLORS))
JUDGE = [(3, 24, 2), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)]

# name -> title, pictures shown (c damaged, r recovered, x clean), model or the run that trains it
ROWS = {
    "base": ("base", "c", tiny.BASE),
    "base-r": ("base on I_r", "r", tiny.BASE),
    "base-x": ("base on X", "x", tiny.BASE),
    "chain": ("chain (Robust-R1)", "c", tiny.SFT),
    "grpo": ("chain + GRPO", "c", tiny.GRPO),
    "twice": ("twice", "cc", "twice"),
    "recovered": ("recovered (stage 3)", "cr", "recovered"),
    "ceiling": ("ceiling", "cx", "recovered"),
}
TRAINED = {"twice": "cc", "recovered": "cr"}
PLAIN = ("base", "base-r", "base-x")
PICTURES = {"c": "I_c", "r": "I_r", "x": "X"}


@dataclass
class Config:
    parts: list[str] = opt(["recover", "reason"], "tables to make", ["recover", "reason"])
    model: str = opt(tiny.RESTORER, "recover: the restorer after stage I that all start from")
    seeds: list[int] = opt([0, 1, 2], "recover: one Flow-GRPO run and one control each")
    grpo: str = opt("", 'recover: more options for train_recover.py, as --grpo="--lr 1e-5"')
    n: int = opt(512, "recover: held-out damaged scenes")
    steps: int = opt(40, "recover: Euler steps")
    limit: int = opt(0, "reason: answer this many records only; 0: all")
    seed: int = opt(0, "reason: of the fine-tunings and of the noise that recovery starts from")
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
    # 1. train: Flow-GRPO, then the control for as long
    side = Restorer.from_pretrained(config.model).config["side"]
    pairs.load_source("", side)  # drawn once, before several runs ask for it
    grpo = ["train_recover.py", "--stage", "grpo", "--model", config.model]
    grpo += shlex.split(config.grpo)
    sft = ["train_recover.py", "--model", config.model, "--lr", CONTROL_LR]
    train(config, {f"grpo-{s}": [*grpo, "--seed", s] for s in config.seeds})
    train(config, {f"probe-{s}": [*sft, "--seed", s, "--steps", 12] for s in config.seeds})
    tasks = {}
    for s in config.seeds:
        tasks[f"control-{s}"] = [*sft, "--seed", s, "--steps", control_steps(out, s)]
    train(config, tasks)

    # 2. recover the held-out scenes, and score
    damaged, clean, truth = held_out(config.n, side)
    encoder = rewards.load_encoder(tiny.BASE)
    judge = trained_judge(side)
    models = {"stage I": config.model}
    for s in config.seeds:
        models[f"stage II, seed {s}"] = str(out / f"grpo-{s}" / "model")
        models[f"more stage I, seed {s}"] = str(out / f"control-{s}" / "model")
    shown = {"damaged": damaged, "clean": clean}
    for name, folder in models.items():
        print(f"{name}: recovers {len(damaged)} pictures", flush=True)
        model = Restorer.from_pretrained(folder).eval()
        seeds = [data.seed_for(0, i) for i in range(len(damaged))]
        shown[name] = recover(model, damaged, config.steps, seeds)
    scores = {}
    for name, pictures in shown.items():
        found = report.measure(pictures, clean, encoder)
        found["reward"] = rewards.PIX * found["ssim"] + rewards.SEM * found["r_sem"]
        found["read"] = read_right(judge, pictures, truth)
        scores[name] = found

    # 3. compare
    return recovery_table(scores)


def control_steps(out: Path, seed: int) -> int:
    """Steps of stage I that take as long as the Flow-GRPO run's steps did."""
    a_step = statistics.median(seconds(out / f"probe-{seed}")[2:])  # the first ones are slower
    return max(1, round(sum(seconds(out / f"grpo-{seed}")) / a_step))


def held_out(n: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first n held-out scenes that are damaged: damaged, clean, and the things in them."""
    source, found, scenes = pairs.Scenes(side, seed=1), [], []
    index = 0
    while len(found) < n:
        _, degradations, _ = world.undamaged(index, 1)
        if degradations:
            found.append(source.pair(index))
            scenes.append(world.sample_scene(np.random.default_rng([1, index])))
        index += 1
    damaged, clean = zip(*found)
    return to_tensor(damaged), to_tensor(clean), things(scenes)


def recovery_table(scores: dict[str, report.Scores]) -> str:
    """Each row's means, and in brackets the paired difference to the row that it starts from."""
    rows = []
    for name, found in scores.items():
        cells = [f"{found[m].mean():.3f}" for m in MEASURES]
        if name not in ("damaged", "clean"):
            before = scores["damaged" if name == "stage I" else "stage I"]
            gains = report.gain(before, found)
            cells = [f"{text} ({interval(gains[m])})" for text, m in zip(cells, MEASURES)]
        rows.append([name, *cells])
    n = len(scores["damaged"]["ssim"])
    _, thirds = report.by_damage(scores["damaged"], scores["stage I"], MEASURES)
    return (
        f"{n} held-out damaged scenes. In brackets: stage I less damaged, the others less stage I; "
        "**bold** where that is clear of 0. R = SSIM + 0.2 R_sem.\n\n"
        f"{markdown(['', *MEASURES.values()], rows)}\n\n"
        f"Stage I, by how damaged the pictures are:\n\n{thirds}"
    )


def new_judge() -> nn.Module:
    """Pictures (N, 3, side, side) -> logits (N, KINDS + 1, 2, 2) for the four quarters."""
    layers = []
    for inputs, outputs, stride in JUDGE:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Conv2d(96, len(KINDS) + 1, 1))


def things(scenes: list[world.Scene]) -> Tensor:
    """Which of KINDS is in each quarter, (N, 2, 2); len(KINDS): none."""
    found = torch.full((len(scenes), 4), len(KINDS))
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            found[i, world.PLACES.index(thing.place)] = KINDS.index((thing.shape, thing.color))
    return found.view(-1, 2, 2)


def trained_judge(
    side: int,
    steps: int = 800,
    batch: int = 32,
) -> nn.Module:
    """Taught on clean scenes that are in no data set."""
    judge = new_judge()

    def load(step: int) -> tuple[Tensor, Tensor]:
        rng, scenes, images = np.random.default_rng([7, step]), [], []
        for _ in range(batch):
            scenes.append(world.sample_scene(rng))
            images.append(pairs.resize(world.draw(scenes[-1], rng), side, side))
        return to_tensor(images), things(scenes)

    optimizer = runtime.build_optimizer(judge, 3e-3, 0.01)
    for step, (images, truth) in data.prefetch(load, range(steps)):
        nn.functional.cross_entropy(judge(images), truth).backward()
        rate = 3e-3 * runtime.cosine_with_warmup(step, steps, 20, floor=0.02)
        runtime.update(optimizer, runtime.Runtime(), rate, max_grad_norm=10.0)
    return judge.eval()


@torch.no_grad()
def read_right(
    judge: nn.Module,
    pictures: Tensor,
    truth: Tensor,
) -> np.ndarray:
    """The share of each picture's things whose shape and colour are read right, (N,)."""
    read = judge(pictures.clamp(0, 1)).argmax(1)  # (N, 2, 2)
    there = truth < len(KINDS)
    right = (read == truth) & there
    return (right.sum((1, 2)) / there.sum((1, 2))).numpy()


# ---------------------------------------------------------------- reason


def compare_answers(config: Config, out: Path) -> str:
    # 1. recover the pictures, and write the records that show them
    tiny.dataset("train")
    large = ["train_recover.py", "--model", tiny.RESTORER, "--side", world.SIDE]
    large += ["--lr", LARGE_LR, "--steps", 1000, "--seed", config.seed]
    train(config, {"restorer": large})
    model = out / "restorer" / "model"
    for part, split in (("sft", "train"), ("all", "test")):
        ask = f"--model {model} --steps 10 --seed {config.seed} --part {part}"
        ask += f" --data {tiny.dataset(split)} --out {out / 'pairs' / split}"
        data_set.main(ask.split())

    # 2. train
    tasks = {}
    for name, kind in TRAINED.items():
        records = write_shown(out, "train", kind)
        tasks[name] = ["train_sft.py", "--data", records, "--part", "all", "--seed", config.seed]
    train(config, tasks)

    # 3. answer the held-out records
    tasks = {}
    for name, (_, kind, model) in ROWS.items():
        folder = out / model / "model" if model in TRAINED else model
        ask = ["evaluate.py", "--data", write_shown(out, "test", kind), "--no-table-2"]
        ask += ["--models", f"{name}={folder}", "--out", out / "eval" / name]
        ask += ["--limit", config.limit]
        tasks[f"eval-{name}"] = [*ask, "--plain", name] if name in PLAIN else ask
    run_all(config, tasks)

    # 4. compare
    paths = {name: out / "eval" / name / name / "predictions.jsonl" for name in ROWS}
    return answer_tables({name: read_rows(path) for name, path in paths.items()})


def write_shown(
    out: Path,
    split: str,
    kind: str,
) -> Path:
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
    """{name: judged rows on damaged pictures} -> what is right, and the same less `chain`."""
    same_records("greedy", rows, "chain")
    asked = [("choice", level) for level in metrics.LEVELS]
    asked += [("choice", None), ("open", None), ("caption", None)]
    titles = [f"{form}, {level or 'all'}" for form, level in asked]
    chain = [rows_of(rows["chain"], *question) for question in asked]
    now, less = [], []
    for name, (title, kind, _) in ROWS.items():
        title = f"{title}: {', '.join(PICTURES[letter] for letter in kind)}"
        mine = [rows_of(rows[name], *question) for question in asked]
        now.append([title, *(cell(metrics.share(found)) for found in mine)])
        less.append([title, *map(paired, mine, chain)])
    return (
        f"{len(rows['chain'])} held-out damaged scenes, greedy. Share right (captions: F1 of "
        "phrases) [95 % interval] n; low, mid, high: total intensity below 0.5, below 1, above.\n\n"
        f"{markdown(['', *titles], now)}\n\n"
        "Each less `chain`, paired by record; **bold** where the interval is clear of 0.\n\n"
        f"{markdown(['', *titles], less)}"
    )


def rows_of(
    rows: list[dict],
    form: str,
    level: str | None,
) -> list[dict]:
    """The answers to one form of question, at one level of damage or at all."""
    found = [row for row in rows if row["form"] == form]
    return [row for row in found if level in (None, metrics.strength(row))]


def paired(rows: list[dict], chain: list[dict]) -> str:
    scores = [([row["score"] for row in found], None) for found in (rows, chain)]
    return interval(paired_difference(*scores)._asdict())


if __name__ == "__main__":
    main()
