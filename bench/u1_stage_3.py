"""Robust-U1's question: does a recovered picture help to answer, and more than words about the damage? Stage III, docs/recover.md.

    python bench/u1_stage_3.py --jobs 2                # the drawn world, two processes at a time -> runs/stage_3/report.md

The shipped restorer works on 32 x 32, the scenes are 112 x 112: first its weights are taught on at that side (stage I), so that I_r is as fine
as I_c. Then one base, one number of steps, one seed, the same quarter of the training records; what differs is what is shown and asked for:

    base                 I_c             the question alone (no chain)
    base on I_r          I_r             the same, the recovered picture in place of the damaged one
    base on X            X               the same, the true clean picture
    chain (Robust-R1)    I_c             fine-tuned on chains: the shipped weights of train_sft.py
    chain + GRPO         I_c             and then reinforced: the shipped weights of train_grpo.py
    twice                I_c, I_c        chains, with the damaged picture shown twice: what a second picture alone brings
    recovered (stage 3)  I_c, I_r        chains, with the picture that the restorer recovers
    ceiling              I_c, X          the model of the row above, shown the true clean picture in place of I_r

All answer the held-out damaged scenes, greedy. Differences to `chain` are paired by record; intervals are 95 %, over records: what another
seed of training would change is not in them. Run it again after an interruption: what is finished stays, what was begun goes on.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from runs import begin, read_rows, run_all, same_records, train
from rr1 import files, runtime, tiny
from rr1.evaluation import metrics
from rr1.u1 import restorer
from rr1.evaluation.statistics import paired_difference
from rr1.runtime import opt
from rr1.tiny import world
from rr1.evaluation.statistics import cell, interval, markdown

RESTORER_LR = 1e-3                   # less than half of a new restorer's: this is a second round

# name -> title, what is shown (c damaged, r recovered, x clean), the model: a folder, or the run that trains it
ROWS = {"base": ("base", "c", tiny.BASE), "base-r": ("base on I_r", "r", tiny.BASE), "base-x": ("base on X", "x", tiny.BASE),
        "chain": ("chain (Robust-R1)", "c", tiny.SFT), "grpo": ("chain + GRPO", "c", tiny.GRPO),
        "twice": ("twice", "cc", "twice"), "recovered": ("recovered (stage 3)", "cr", "recovered"), "ceiling": ("ceiling", "cx", "recovered")}
TRAINED = {"twice": "cc", "recovered": "cr"}
PLAIN = ("base", "base-r", "base-x")
MEASURES = {f"choice {grade}": f"choice, {grade}" for grade in metrics.LEVELS} | {
    "choice": "choice, all", "open": "open, all", "caption": "caption, all"}


@dataclass
class Config:
    restorer: str = opt("", "the restorer that recovers the pictures; empty: the shipped one, taught on at the scenes' own side")
    restorer_steps: int = opt(1000, "of that")
    euler_steps: int = opt(10, "of each recovery")
    steps: int = opt(425, "of each fine-tuning; train_sft.py's own number")
    limit: int = opt(0, "answer this many records only; 0: all")
    seed: int = opt(0, "of the fine-tunings and of the noise that recovery starts from")
    jobs: int = opt(1, "runs at a time; they share the cores")
    out: str = opt("runs/stage_3", "folder for the records, all runs, predictions and the report")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    out = begin(config, free={"out", "jobs"})

    # 1. recover the pictures, and write the records that show them
    tiny.dataset("train")
    if not config.restorer:
        train(replace(config, jobs=1), {"restorer": ["train_recover.py", "--model", tiny.RESTORER, "--side", world.SIDE, "--lr", RESTORER_LR,
                                                     "--steps", config.restorer_steps, "--seed", config.seed]})
    recover = ["--model", config.restorer or str(out / "restorer" / "model"), "--steps", str(config.euler_steps), "--seed", str(config.seed)]
    for part, split in (("sft", "train"), ("all", "test")):
        restorer.main([*recover, "--data", tiny.dataset(split), "--part", part, "--out", str(out / "pairs" / split)])
    shown = {kind: write_shown(out, "test", kind) for kind in {kind for _, kind, _ in ROWS.values()}}

    # 2. train
    train(config, {name: ["train_sft.py", "--data", write_shown(out, "train", kind), "--part", "all", "--steps", config.steps,
                          "--seed", config.seed] for name, kind in TRAINED.items()})

    # 3. answer the held-out records
    run_all(config, {f"eval-{name}": ["evaluate.py", "--data", shown[kind], "--no-table-2", "--limit", config.limit, "--out", out / "eval" / name,
                                      "--models", f"{name}={out / model / 'model' if model in TRAINED else model}",
                                      *(("--plain", name) if name in PLAIN else ())] for name, (_, kind, model) in ROWS.items()})

    # 4. compare
    result = compare({name: read_rows(out / "eval" / name / name / "predictions.jsonl") for name in ROWS})
    text = report(result)
    files.write_text(out / "report.json", files.to_json(result, indent=1) + "\n")
    files.write_text(out / "report.md", text + "\n")
    print(f"\n{text}\n\nwritten: {out}/report.md, report.json")


def write_shown(out: Path, split: str, kind: str) -> Path:
    """The records of out/pairs/SPLIT with other pictures: one letter each, c damaged, r recovered, x clean."""
    path, lines = out / "pairs" / split / f"{kind}.jsonl", []
    for line in (out / "pairs" / split / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        damaged, recovered = record["image"]
        pictures = [{"c": damaged, "r": recovered, "x": record.get("clean_image")}[letter] for letter in kind]
        human, response = record["conversations"]
        human["value"] = "<image>" * len(pictures) + human["value"].replace("<image>", "")
        record["shown_clean"] = record.pop("clean_image", None)             # no longer `clean_image`: each record is asked about once
        lines.append(json.dumps(record | {"image": pictures, "conversations": [human, response]}, ensure_ascii=False) + "\n")
    files.write_text(path, "".join(lines))
    return path


def compare(rows: dict[str, list[dict]]) -> dict:
    """{name: judged rows on damaged pictures} -> {"n", "now": name -> measure -> estimate, "less_chain": the same less `chain`}."""
    same_records("greedy", rows, "chain")
    asked = {name: {m: rows_of(found, m) for m in MEASURES} for name, found in rows.items()}
    scores = lambda rows: ([r["score"] for r in rows], None)
    now = {name: {m: metrics.share(found[m]) for m in MEASURES} for name, found in asked.items()}
    less = {name: {m: paired_difference(scores(found[m]), scores(asked["chain"][m]))._asdict() for m in MEASURES}
            for name, found in asked.items() if name != "chain"}
    return {"n": len(rows["chain"]), "now": now, "less_chain": less}


def rows_of(rows: list[dict], measure: str) -> list[dict]:
    """The answers to one form of question, "choice", or to one form at one strength, "choice high"."""
    form, _, grade = measure.partition(" ")
    return [r for r in rows if r["form"] == form and grade in ("", metrics.strength(r))]


def report(result: dict) -> str:
    titles = {name: f"{title}: {', '.join({'c': 'I_c', 'r': 'I_r', 'x': 'X'}[letter] for letter in kind)}" for name, (title, kind, _) in ROWS.items()}
    return "\n\n".join([
        f"{result['n']} held-out damaged scenes, greedy. Share right (captions: F1 of phrases) [95 % interval] n; low, mid, high: total intensity below 0.5,\n"
        "below 1, above.",
        markdown(["", *MEASURES.values()], [[titles[name], *(cell(found[m]) for m in MEASURES)] for name, found in result["now"].items()]),
        "Each less `chain`, paired by record; **bold** where the interval is clear of 0.",
        markdown(["", *MEASURES.values()], [[titles[name], *(interval(found[m]) for m in MEASURES)] for name, found in result["less_chain"].items()])])


if __name__ == "__main__":
    main()
