"""How good is a model, and how sure is that? Tables 1 and 2 and Figure 6 of the paper.

    1. predict    each model writes OUT/NAME/predictions.jsonl, batch by batch, and goes on
    2. score      what is reported comes from those files alone (--score-only needs no model)
    3. report     report.txt (also printed), report.json, table_1.png .. figure_6b_length.png in OUT

    python evaluate.py                                          # tiny base and SFT, runs/grpo/model
    python evaluate.py --models sft=runs/sft/model mine=runs/brevity/model --out runs/eval-mine
    torchrun --nproc-per-node 8 evaluate.py --data test.jsonl --images test_images --batch 16 \\
        --models sft=Jiaqi-hkust/Robust-R1-SFT rl=Jiaqi-hkust/Robust-R1-RL --max-new-tokens 2048
    python evaluate.py --benchmark MMStar.tsv --models base=Qwen/Qwen2.5-VL-3B-Instruct
    python evaluate.py --image photo.jpg --question "what color is the star?" --choices red blue

A model is shown every record's own picture (Table 1, Figure 6) and, for choice questions with a
known clean picture, that picture clean and damaged by one type, drawn for each picture, at each of
--levels (Table 2; not records with several pictures). Benchmarks: rr1/evaluation/benchmarks.py.
"""

import os

# before torch is imported: threads that wait must not spin, or other work stalls them
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dataclasses import dataclass
from pathlib import Path

from rr1 import files, runtime, tiny
from rr1.answers import choice_index
from rr1.chain import build_question, is_well_formed, parse
from rr1.evaluation import benchmarks, figures, metrics, predictions, report, votes
from rr1.records import one_line_errors, open_image, read
from rr1.runtime import opt

GRPO = "runs/grpo/model"  # what train_grpo.py writes by default
DEFAULT = [f"base={tiny.BASE}", f"sft={tiny.SFT}", f"grpo={GRPO}"]


@dataclass
class Config:
    # models
    models: list[str] = opt(DEFAULT, "NAME=checkpoint folder or hub id")
    plain: list[str] = opt(
        ["base"], "models asked the question alone; all they say is the answer"
    )
    letters: list[str] = opt(
        ["base"], "models asked a benchmark's choices by letter; else by index"
    )
    model: str = opt(
        "", "a single checkpoint, in place of --models; the one asked about --image"
    )
    # data
    data: str = opt("", "file of JSON lines; empty: the drawn world's test.jsonl")
    benchmark: str = opt(
        "", "in place of --data: R-Bench's csv, a VLMEvalKit tsv, A-OKVQA's json"
    )
    images: str = opt(
        "", "folder that image paths are relative to; empty: the data file's own"
    )
    skip_bad: bool = opt(False, "leave out, and name, records that cannot be used")
    limit: int = opt(0, "ask about this many records only; 0: all")
    table_2: bool = opt(
        True, "ask choice questions again on clean pictures and at each level"
    )
    levels: list[float] = opt(
        [0.25, 0.5, 1.0], "of Table 2 (published script: 0.23 0.45 0.9)", high=1
    )
    # answers
    max_new_tokens: int = opt(128, "longest response", low=1)
    temperature: float = opt(0.0, "0: the likeliest token always; 1: sample")
    seed: int = opt(0, "fixes the damage of Table 2 and what is sampled")
    min_pixels: int = opt(
        0, "enlarge smaller pictures to so many pixels; 0: the checkpoint's own"
    )
    max_pixels: int = opt(
        0, "shrink larger pictures to so many pixels; 0: the checkpoint's own"
    )
    # scores
    judge: str = opt(
        "", "OpenAI-compatible endpoint whose votes score R-Bench; OPENAI_API_KEY"
    )
    judge_model: str = opt("gpt-3.5-turbo", "what to ask for there")
    score_only: bool = opt(
        False, "report on the predictions that are there; no model is loaded"
    )
    # one picture
    image: str = opt("", "ask about this one picture and print the chain")
    question: str = opt("", "what to ask about --image")
    choices: list[str] = opt([], "possible answers to --question")
    # machine
    out: str = opt("", "empty: runs/eval, of a benchmark runs/eval-ITS-NAME")
    batch: int = opt(64, "prompts at a time, in each process", low=1)
    workers: int = opt(0, "threads that read pictures ahead, in each process; 0: one")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    rt = runtime.setup(config.seed)
    if config.image:
        return show_one(config, rt)
    if not config.out:
        config.out = (
            f"runs/eval-{Path(config.benchmark).stem}" if config.benchmark else "runs/eval"
        )
    out, models = Path(config.out), choose_models(config, rt)
    if not config.score_only:
        with runtime.main_first(rt):  # who comes first writes what the others find
            records, notes = read_records(config)
        if rt.is_main and notes:
            print("\n".join(notes), flush=True)
        levels = config.levels if config.table_2 else None
        machine = (rt, config.batch, config.workers, config.skip_bad)
        for name, checkpoint in models.items():
            by_letter = name in config.letters
            jobs = predictions.make_jobs(records, levels, config.seed, by_letter)
            predictions.predict(
                out / name, how_asked(config, name, checkpoint), jobs, *machine
            )
    if rt.is_main:
        rows = {name: predictions.read_predictions(out / name) for name in models}
        if config.judge:
            for name, found in rows.items():
                votes.vote(
                    found, config.judge, config.judge_model, out / name / "votes.jsonl"
                )
        write_report(out, rows)
    runtime.teardown(rt)


def choose_models(config: Config, rt: runtime.Runtime) -> dict:
    """{name: checkpoint}, less those of the default list that are not there yet."""
    given = [f"model={config.model}"] if config.model else config.models
    models = {}
    for text in given:
        name, _, checkpoint = text.partition("=")
        if not name or not checkpoint or name in models or Path(name).name != name:
            raise SystemExit(
                f"--models {text}: expected NAME=CHECKPOINT, each NAME once, no path"
            )
        models[name] = checkpoint
    for flag, names in (("--plain", config.plain), ("--letters", config.letters)):
        unknown = set(names) - set(models) - {"base"}
        if unknown:
            there = ", ".join(models)
            raise SystemExit(
                f"{flag} {' '.join(unknown)}: no such model; there are {there}"
            )
    for name, checkpoint in list(models.items()):
        needed = Path(config.out, name) if config.score_only else Path(checkpoint)
        if f"{name}={checkpoint}" in DEFAULT and not needed.is_dir():
            del models[name]
            if rt.is_main:
                print(f"{name} is left out: there is no {needed} yet", flush=True)
    if not models:
        raise SystemExit("there is no model to evaluate: give --models NAME=CHECKPOINT")
    return models


def read_records(config: Config) -> tuple:
    """The records to ask about, and what is to be said about the file."""
    if config.benchmark:
        cache = Path(config.out) / "images"
        found, notes = benchmarks.read(
            config.benchmark, config.images, cache, config.skip_bad
        )
    else:
        found = read(config.data or tiny.dataset("test"), config.images, config.skip_bad)
        notes = [f"left out: {why}" for why in found.bad]
    return found[: config.limit or None], notes


def how_asked(config: Config, name: str, checkpoint: str) -> dict:
    """What the answers of a model depend on, for its meta.json."""
    return {
        "model": checkpoint,
        "weights": predictions.fingerprint(checkpoint),
        "seed": config.seed,
        "plain": name in config.plain,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "min_pixels": config.min_pixels or None,
        "max_pixels": config.max_pixels or None,
    }


def write_report(out: Path, rows: dict) -> None:
    """Score the predictions; print and write report.txt, write report.json and the plots.

    The first model is what the others are compared with, question by question.
    """
    for name, found in rows.items():
        if not found:
            raise SystemExit(
                f"{out} holds no predictions of {name}: run without --score-only"
            )
    reports = {name: report.of_model(found) for name, found in rows.items()}
    first, *others = rows
    for name in others:
        reports[name]["versus"] = metrics.versus(rows[name], rows[first])
    text = report.as_text(reports)
    print(text)
    files.write_text(out / "report.txt", text + "\n")
    files.write_json(out / "report.json", reports, indent=1)
    written = ["report.txt", "report.json", *figures.draw_all(reports, out)]
    print("\nwritten:", ", ".join(str(out / name) for name in written))


# ---------------------------------------------------------------- one picture


def show_one(config: Config, rt: runtime.Runtime) -> None:
    """Ask one model about one picture and print the chain, each part with what it is."""
    if not config.question:
        raise SystemExit("--image needs --question: what is to be asked about the picture?")
    checkpoint = config.model or (GRPO if Path(GRPO).is_dir() else tiny.SFT)
    how = how_asked(config, "", checkpoint)
    size = "{} x {}".format(*open_image(config.image).size)
    model, processor = predictions.load_model(how, rt)
    question = build_question(config.question, config.choices)
    job = predictions.JOB | {
        "image": config.image,
        "where": "--image",
        "question": question,
    }
    [([row], _)] = predictions.respond(model, processor, [[job]], how)
    text = row["response"]
    chain = parse(text)
    damage = ", ".join(f"{kind} {s:.2f}" for kind, s in chain.degradations) or "none"
    picked = choice_index(chain.answer or "", config.choices)
    scored = chain.answer
    if picked is not None:
        scored = f"{chain.answer} = {config.choices[picked]}"
    print(f"{config.image} ({size}), {checkpoint}\n{question}\n")
    for symbol, meaning, content in (
        ("D_d", "damage: type and intensity, from 0 to 1", damage),
        ("Delta_d", "influence: what that does to what can be seen", chain.influence),
        ("T_X", "pristine reasoning: what the clean picture would show", chain.reasoning),
        ("Y_d", "conclusion: what follows for the question", chain.conclusion),
        ("answer", "what is scored", scored),
    ):
        print(
            f"{symbol:8s}{meaning}\n            {'(missing)' if content is None else content}"
        )
    form = (
        "well formed" if is_well_formed(text) else f"not well formed; as written:\n{text}"
    )
    print(f"\n{row['length']} tokens{', cut off' if row['truncated'] else ''}, {form}")


if __name__ == "__main__":
    with one_line_errors():
        main()
