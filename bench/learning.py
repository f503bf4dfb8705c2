"""Does reinforcement learning help, and more than the same time spent on more fine-tuning? The README's table.

    python bench/learning.py                                   # 3 seeds -> runs/learning/report.md
    python bench/learning.py --jobs 2 --seeds 0 1 --steps 50   # two processes at a time, each with half of the cores
    python bench/learning.py --grpo="--rewards deg --lr 1e-5"  # another setting of train_grpo.py, beside the same control

For each seed: GRPO as train_grpo.py does it by default (grpo-SEED), and the control: the same fine-tuned model trained on by
train_sft.py, on the same data, for as many steps as fit into the seconds that GRPO's steps took (control-SEED; a few steps are
timed first, with as many processes side by side: probe-SEED). Then all models answer the held-out records, sampled at T = 1 with
the same random numbers for each, and greedy; damaged pictures count. Differences are paired by record, with 95 % bootstrap
intervals. Run it again after an interruption: what is finished stays, what was begun goes on.
"""
from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

from runs import MODES, number, read_rows, run_all, same_records, seconds, train
from rr1 import files, runtime, tiny
from rr1.evaluation import metrics
from rr1.runtime import opt
from rr1.evaluation.statistics import interval, markdown

CONTROL_LR = 3e-4                    # 0.3 of the default run's: this is a second round from a model that has converged once
PROBE_STEPS, WARM = 12, 2            # of the timing; the first steps are slower
MEASURES = {"r_deg": "r_deg", "r_len": "r_len", "intensity_error": "intensity error", "type_f1": "type F1",
            "choice_accuracy": "choice accuracy", "well_formed": "well-formed"}
LOWER_IS_BETTER = ("intensity_error",)
# What is asked of GRPO: the measure, and what must hold of its value and of its difference to SFT.
CHECKS = {"r_deg up, interval above 0": ("r_deg", lambda now, gain: gain["low"] > 0),
          "r_len up, interval above 0": ("r_len", lambda now, gain: gain["low"] > 0),
          "intensity error down": ("intensity_error", lambda now, gain: gain["value"] < 0),
          "type F1 not down": ("type_f1", lambda now, gain: gain["value"] >= 0),
          "choice accuracy not down by more than a point": ("choice_accuracy", lambda now, gain: gain["value"] >= -0.01),
          "well-formed in 98 % or more": ("well_formed", lambda now, gain: now["value"] >= 0.98)}


@dataclass
class Config:
    model: str = opt(tiny.SFT, "the fine-tuned checkpoint that both start from")
    seeds: list[int] = opt([0, 1, 2], "one GRPO run and one control each")
    steps: int | None = opt(None, "of GRPO; default: train_grpo.py's own number")
    grpo: str = opt("", 'more options for train_grpo.py, as --grpo="--lr 1e-5"')
    jobs: int = opt(1, "processes at a time; they share the cores")
    out: str = opt("runs/learning", "folder for all runs, predictions and the report")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tiny.dataset("train")                                       # drawn once, before several processes want it
    seeds = config.seeds

    # 1. train: GRPO, then the control for as long
    steps = [] if config.steps is None else ["--steps", config.steps]
    grpo = ["train_grpo.py", "--model", config.model, *steps, *shlex.split(config.grpo)]
    sft = ["train_sft.py", "--model", config.model, "--part", "rl", "--lr", CONTROL_LR]
    train(config, {f"grpo-{s}": [*grpo, "--seed", s] for s in seeds}, config.steps)
    train(config, {f"probe-{s}": [*sft, "--seed", s, "--steps", PROBE_STEPS] for s in seeds})
    train(config, {f"control-{s}": [*sft, "--seed", s, "--steps", control_steps(out, s)] for s in seeds})

    # 2. answer the held-out records
    trained = [f"{kind}-{s}" for kind in ("grpo", "control") for s in seeds]
    models = [f"sft={config.model}", *(f"{name}={out / name / 'model'}" for name in trained)]
    run_all(config, {mode: ["evaluate.py", "--models", *models, "--no-table-2", "--temperature", temperature, "--out", out / mode]
                     for mode, temperature in MODES.items()})

    # 3. compare
    rows = {mode: {name: read_rows(out / mode / name / "predictions.jsonl") for name in ["sft", *trained]} for mode in MODES}
    result = compare(rows, seeds)
    result["training_seconds"] = {name: sum(seconds(out / name)) for name in trained}
    text = report(result, seeds)
    files.write_text(out / "report.json", files.to_json(result, indent=1) + "\n")
    files.write_text(out / "report.md", text + "\n")
    print(f"\n{text}\n\nwritten: {out}/report.md, report.json")


def control_steps(out: Path, seed: int) -> int:
    """Steps of fine-tuning that take as long as the GRPO run's steps did."""
    return max(1, round(sum(seconds(out / f"grpo-{seed}")) / statistics.median(seconds(out / f"probe-{seed}")[WARM:])))


# ---------------------------------------------------------------- comparing

def compare(rows: dict[str, dict[str, list[dict]]], seeds: list[int]) -> dict:
    """{mode: {model: judged rows}} -> {"n", mode: {"now": model -> measure -> estimate, "gain": the same less SFT,
    "rl_less_control": seed -> measure -> estimate}}. All models must have answered the same records in the same order."""
    result: dict = {}
    for mode, models in rows.items():
        same_records(mode, models, "sft")
        sums = {name: metrics.measures(answered) for name, answered in models.items()}
        less = lambda a, b: {m: metrics.paired_difference(sums[a][m], sums[b][m])._asdict() for m in MEASURES}
        result["n"] = len(models["sft"])
        now = {name: {m: e._asdict() for m, e in metrics.summary(answered).items()} for name, answered in models.items()}
        result[mode] = {"now": now,
                        "gain": {name: less(name, "sft") for name in models if name != "sft"},
                        "rl_less_control": {str(s): less(f"grpo-{s}", f"control-{s}") for s in seeds}}
    return result


def report(result: dict, seeds: list[int]) -> str:
    """The tables and what follows from them, as Markdown."""
    took = result["training_seconds"]
    blocks = [f"{result['n']} held-out damaged pictures. In brackets: the difference to SFT with its 95 % interval, paired by record;\n"
              "**bold** where that is clear of 0. More SFT: the control, as many seconds of fine-tuning as GRPO took."]
    for mode in MODES:
        now, gain, duel = (result[mode][key] for key in ("now", "gain", "rl_less_control"))
        lines = [["SFT, before", *(number(now["sft"][m]["value"]) for m in MEASURES), ""]]
        for kind, title in (("grpo", "GRPO"), ("control", "more SFT")):
            lines += [[f"{title}, seed {s}", *(f"{number(now[name][m]['value'])} ({interval(gain[name][m])})".replace("- (-)", "-") for m in MEASURES),
                       f"{took[name]:.0f}"] for s in seeds for name in [f"{kind}-{s}"]]
        lines += [[f"GRPO less more SFT, seed {s}", *(interval(duel[str(s)][m]) for m in MEASURES), ""] for s in seeds]
        blocks.append(markdown([mode, *MEASURES.values(), "seconds"], lines))
    duels = [[title, *(str(won) for mode in MODES for won in wins(result[mode]["rl_less_control"], m))]
             for m, title in MEASURES.items()]
    blocks += [f"GRPO against more SFT: in how many of the {len(seeds)} seeds one is better, with an interval clear of 0.",
               markdown(["", *(f"{mode}: {side}" for mode in MODES for side in ("GRPO", "more SFT"))], duels)]
    kept = [[text, *(f"{sum(holds(result[mode], m, rule, s) for s in seeds)} of {len(seeds)}" for mode in MODES)]
            for text, (m, rule) in CHECKS.items()]
    blocks += ["GRPO against SFT, what is asked of it: seeds in which it holds.", markdown(["", *MODES], kept)]
    return "\n\n".join(blocks)


def wins(differences: dict[str, dict], measure: str) -> tuple[int, int]:
    """Of differences of GRPO to the control, by seed: how often GRPO is better, how often the control is."""
    found = [e[measure] for e in differences.values() if e[measure]["n"]]
    up, down = sum(e["low"] > 0 for e in found), sum(e["high"] < 0 for e in found)
    return (down, up) if measure in LOWER_IS_BETTER else (up, down)


def holds(result: dict, measure: str, rule, seed: int) -> bool:
    now, gain = (result[part][f"grpo-{seed}"][measure] for part in ("now", "gain"))
    return bool(now["n"] and gain["n"] and rule(now, gain))


if __name__ == "__main__":
    main()
