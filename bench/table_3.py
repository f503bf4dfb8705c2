"""The ablations of the paper's Table 3 (section 5.3): what do the chain, r_deg and r_len each bring?

    python bench/table_3.py --jobs 2                # the drawn world, two processes at a time -> runs/table_3/report.md
    python bench/table_3.py --processes 8 --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl --images train_images \\
        --sft="--lr 1e-5 --steps 117 --batch 64 --micro-batch 1 --gradient-checkpointing --shard" \\
        --grpo="--lr 1e-6 --steps 469 --max-new-tokens 2048 --micro-batch 1 --gradient-checkpointing --shard" \\
        --evaluate="--benchmark Ref_Release.csv --images R-Bench --max-new-tokens 2048 --batch 16" --out runs/table_3-3b

    base            the model as it is, asked the question alone
    w/o reasoning   fine-tuned on the same records without their chains (train_sft.py --plain), asked the question alone
    SFT alone       fine-tuned on the chains: of the default model the shipped weights, which are train_sft.py's with its defaults
    w/o r_deg       SFT, then train_grpo.py --rewards len
    w/o r_len       SFT, then train_grpo.py --rewards deg
    full            SFT, then train_grpo.py --rewards deg len

All trainings have the same seed, the three of GRPO the same number of steps too. Then all six answer the held-out records, greedy
and sampled at T = 1 with the same random numbers for each; damaged pictures count. Differences to `full` are paired by record.
Intervals are 95 %, over records: what another seed of training would change is not in them. Run it again after an interruption:
what is finished stays, what was begun goes on.
"""
from __future__ import annotations

import shlex
from dataclasses import dataclass

import numpy as np

from runs import MODES, begin, number, read_rows, run_all, same_records, seconds, train
from rr1 import files, runtime, tiny
from rr1.evaluation import metrics
from rr1.evaluation.statistics import bootstrap_cells, paired_difference
from rr1.runtime import opt
from rr1.evaluation.statistics import cell, interval, markdown

TITLES = {"base": "base", "no-reasoning": "w/o reasoning", "sft": "SFT alone", "no-r_deg": "w/o r_deg", "no-r_len": "w/o r_len", "full": "full"}
REWARDS = {"no-r_deg": ["len"], "no-r_len": ["deg"], "full": ["deg", "len"]}
CELLS = [f"{form} {grade}" for form in metrics.FORMS for grade in metrics.LEVELS]
CHAIN = {"r_deg": "r_deg", "r_len": "r_len", "type_f1": "type F1", "length": "length"}      # `length`: of a plain answer too


@dataclass
class Config:
    model: str = opt(tiny.BASE, "the base that all start from")
    tuned: str = opt("", "a checkpoint fine-tuned on chains; empty: of the default base the shipped one, of another it is trained here")
    data: str = opt("", "training records; empty: the drawn world. Name the held-out ones too, in --evaluate")
    images: str = opt("", "folder that their image paths are relative to; empty: the data file's own")
    steps: int | None = opt(None, "of every training; default: each script's own number")
    seed: int = opt(0, "of every training and of what is sampled")
    sft: str = opt("", 'more options for train_sft.py, as --sft="--lr 1e-5"')
    grpo: str = opt("", "more options for train_grpo.py")
    evaluate: str = opt("", 'more options for evaluate.py, as --evaluate="--data test.jsonl --batch 16"')
    jobs: int = opt(1, "runs at a time; they share the cores")
    processes: int = opt(1, "processes of each run, started by torchrun: the number of GPUs")
    out: str = opt("runs/table_3", "folder for all runs, predictions and the report")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    asked = shlex.split(config.evaluate)
    if config.data and not {"--data", "--benchmark"} & {word.partition("=")[0] for word in asked}:
        raise SystemExit('--data: what is to be answered? Give held-out records, as --evaluate="--data test.jsonl" or "--benchmark FILE"')
    out = begin(config, free={"out", "jobs", "processes", "evaluate"})                      # evaluate.py watches over its own
    if not config.data:
        tiny.dataset("train")                                       # drawn once, before several processes want it

    # 1. train
    common = [*(["--data", config.data] if config.data else []), *(["--images", config.images] if config.images else []),
              *([] if config.steps is None else ["--steps", config.steps]), "--seed", config.seed]
    sft = ["train_sft.py", "--model", config.model, *common, *shlex.split(config.sft)]
    tuned = config.tuned or (tiny.SFT if config.model == tiny.BASE else "")
    if not tuned:
        train(config, {"sft": sft})
    models = {"base": config.model, "no-reasoning": out / "no-reasoning" / "model", "sft": tuned or out / "sft" / "model",
              **{name: out / name / "model" for name in REWARDS}}
    grpo = ["train_grpo.py", "--model", models["sft"], *common, *shlex.split(config.grpo)]
    train(config, {**{name: [*grpo, "--rewards", *rewards] for name, rewards in REWARDS.items()}, "no-reasoning": [*sft, "--plain"]})

    # 2. answer the held-out records
    evaluate = ["evaluate.py", "--models", *(f"{name}={path}" for name, path in models.items()), "--plain", "base", "no-reasoning",
                "--no-table-2", "--seed", config.seed, *asked]
    run_all(config, {mode: [*evaluate, "--temperature", temperature, "--out", out / mode] for mode, temperature in MODES.items()})

    # 3. compare
    result = compare({mode: {name: read_rows(out / mode / name / "predictions.jsonl") for name in models} for mode in MODES})
    result["training_seconds"] = {name: sum(seconds(out / name)) for name in models if (out / name / "metrics.jsonl").exists()}
    text = report(result)
    files.write_text(out / "report.json", files.to_json(result, indent=1) + "\n")
    files.write_text(out / "report.md", text + "\n")
    print(f"\n{text}\n\nwritten: {out}/report.md, report.json")


def compare(rows: dict[str, dict[str, list[dict]]]) -> dict:
    """{mode: {model: judged rows}} -> {"n", mode: {"now": model -> column -> estimate, "less_full": the same less `full`}}. Columns:
    those of Table 1, and CHAIN where there is a chain. All models must have answered the same records in the same order."""
    result: dict = {}
    for mode, models in rows.items():
        same_records(mode, models, "full")
        if not models["full"]:
            raise SystemExit(f"{mode}: no damaged picture among the records that were answered")
        result["n"] = len(models["full"])
        sums = {name: metrics.measures(answered) for name, answered in models.items()}
        now = {name: metrics.table_1(answered) | {m: e._asdict() for m, e in metrics.summary(answered).items() if m in CHAIN}
               for name, answered in models.items()}
        less = {name: scores_less(answered, models["full"]) | {m: paired_difference(sums[name][m], sums["full"][m])._asdict()
                                                               for m in CHAIN if m in sums[name]}
                for name, answered in models.items() if name != "full"}
        result[mode] = {"now": now, "less_full": less}
    return result


def scores_less(rows: list[dict], full: list[dict]) -> dict[str, dict]:
    """By how much the scores of one model are above those of another on the same records, for each column of Table 1."""
    gaps = [(f"{a['form']} {metrics.strength(a)}", a["score"] - b["score"]) for a, b in zip(rows, full) if a["score"] is not None]
    cells = {name: [gap for cell, gap in gaps if cell == name] for name in CELLS}
    paired = lambda gaps: paired_difference((gaps, None), (np.zeros(len(gaps)), None))._asdict()
    return {name: paired(gaps) for name, gaps in cells.items()} | {
        "overall": bootstrap_cells(list(cells.values()))._asdict(), "per question": paired([gap for _, gap in gaps])}


def report(result: dict) -> str:
    """The tables as Markdown: for each mode the paper's layout, then every cell with its interval, then the differences."""
    columns = {name: name for name in (*CELLS, "overall", "per question")} | CHAIN
    took = ", ".join(f"{TITLES[name]} {t:.0f} s" for name, t in result["training_seconds"].items())
    blocks = [f"{result['n']} held-out damaged pictures, strength by total intensity (low < 0.5, mid < 1, high) or as a benchmark has it. Choice\n"
              "and open: share right; captions: F1 of phrases; overall: the plain mean of the cells. r_deg, r_len and type F1 are of chains, so\n"
              f"models asked without one have none. Steps of training took: {took}."]
    for mode in reversed(MODES):
        now, less = result[mode]["now"], result[mode]["less_full"]
        blocks += [f"{mode.capitalize()}, in the layout of Table 3.", markdown(
            ["", *columns.values()], [[title, *(number(now[name].get(c, {}).get("value")) for c in columns)] for name, title in TITLES.items()])]
        blocks += [f"{mode.capitalize()}: value [95 % interval] n.", markdown(
            ["", *TITLES.values()], [[title, *(cell(now[name].get(c)) for name in TITLES)] for c, title in columns.items()])]
        blocks += [f"{mode.capitalize()}: each less `full`, paired by record; **bold** where the interval is clear of 0.", markdown(
            ["", *(TITLES[name] for name in less)],
            [[title, *(interval(less[name].get(c, {"value": None})) for name in less)] for c, title in columns.items()])]
    return "\n\n".join(blocks)


if __name__ == "__main__":
    main()
