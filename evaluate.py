"""How good is a model, and how sure is that? Tables 1 and 2 and Figure 6 of the paper, on the drawn world or on your own file.

    1. predict    each model writes runs/eval/NAME/predictions.jsonl, batch by batch; run it again and it goes on where it stopped
    2. score      everything that is reported comes from those files alone (--score-only needs no model)
    3. report     report.txt (also printed), report.json, table_1.png .. figure_6b.png in --out

    python evaluate.py                                                        # tiny base, SFT and GRPO models
    python evaluate.py --models sft=runs/sft/model mine=runs/brevity/model --out runs/eval-mine
    torchrun --nproc-per-node 8 evaluate.py --models sft=Jiaqi-hkust/Robust-R1-SFT rl=Jiaqi-hkust/Robust-R1-RL \\
        --data test.jsonl --images test_images --max-new-tokens 2048 --batch 16 --out runs/eval-3b
    python evaluate.py --benchmark MMStar.tsv --models base=Qwen/Qwen2.5-VL-3B-Instruct rl=Jiaqi-hkust/Robust-R1-RL --max-new-tokens 2048
    python evaluate.py --image photo.jpg --question "what color is the star?" --choices red blue
    python evaluate.py --restorer runs/recover/model                          # Robust-U1: PSNR, SSIM, R_sem of what it recovers

What is shown to a model: every record's own picture (Table 1, Figure 6) and, for choice questions with a known clean picture,
that picture clean and damaged by one type, drawn for each picture, at each of --levels (Table 2; not of records with several pictures).
Benchmarks: rr1/evaluation/benchmarks.py.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from degrade import degrade
from rr1 import data, files, rollout, runtime, tiny, vlm
from rr1.evaluation import benchmarks, figures, metrics, votes
from rr1.u1 import image_rewards, recovery, restorer
from rr1.chain import Chain, build_prompt, build_question, is_well_formed, parse
from rr1.evaluation.predictions import check_meta, collect, fingerprint, read_predictions
from rr1.answers import choice_index
from rr1.runtime import opt

GRPO = "runs/grpo/model"             # what train_grpo.py writes by default


@dataclass
class Config:
    models: list[str] = opt([f"base={tiny.BASE}", f"sft={tiny.SFT}", f"grpo={GRPO}"], "NAME=checkpoint folder or hub id")
    plain: list[str] = opt(["base"], "models that are asked the question alone, and whose whole response is the answer")
    model: str = opt("", "a single checkpoint, in place of --models; the one to ask about --image")
    data: str = opt("", "file of JSON lines; empty: the drawn world's test.jsonl, written on first use")
    benchmark: str = opt("", "a benchmark's file in place of --data: R-Bench's csv, a VLMEvalKit tsv, A-OKVQA's json")
    images: str = opt("", "folder that image paths are relative to; empty: the data file's own")
    out: str = opt("", "folder for predictions and report; empty: runs/eval, of a benchmark runs/eval-ITS-NAME")
    limit: int = opt(0, "ask about this many records only; 0: all")
    table_2: bool = opt(True, "ask the choice questions again on clean pictures and at each level")
    levels: list[float] = opt([0.25, 0.5, 1.0], "intensities of Table 2 (0.23 0.45 0.9 in the published script)")
    batch: int = opt(64, "prompts at a time, in each process")
    workers: int = opt(0, "processes that read pictures ahead, in each process; 0: a thread does it")
    temperature: float = opt(0.0, "0: the likeliest token always; 1: sample")
    max_new_tokens: int = opt(128, "longest response")
    capture: bool = opt(False, "on a GPU: decoding steps are replayed as a CUDA graph; fewer launches, the same tokens up to rounding")
    seed: int = opt(0, "fixes the damage of Table 2, what is sampled and the bootstrap")
    judge: str = opt("", "address of an OpenAI-compatible endpoint whose votes score R-Bench; its key: OPENAI_API_KEY")
    judge_model: str = opt("gpt-3.5-turbo", "what to ask for there")
    score_only: bool = opt(False, "report on the predictions that are there; no model is loaded")
    min_pixels: int = opt(0, "smaller pictures are enlarged to this many pixels; 0: the checkpoint's own")
    max_pixels: int = opt(0, "larger pictures are made smaller, to this many pixels at most; 0: the checkpoint's own")
    image: str = opt("", "ask about this one picture and print the chain")
    question: str = opt("", "what to ask about --image")
    choices: list[str] = opt([], "possible answers to --question")
    restorer: str = opt("", "a restorer's folder: how near its recoveries come, of held-out scenes or of crops of a folder of photos (--data); --limit 0: 256")
    euler_steps: int = opt(40, "of each recovery")
    encoder: str = opt(tiny.BASE, "whose features R_sem compares: a Qwen2.5-VL's vision tower or a CLIP, folder or hub id")
    lpips: bool = opt(False, "LPIPS of recoveries too (pip install lpips)")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    rt = runtime.setup(config.seed)
    runtime.needs_gpu(rt, capture=config.capture)
    if config.image:
        return show_one(config, rt)
    if config.restorer:
        return recover(config, rt) if rt.is_main else None
    config.out = config.out or (f"runs/eval-{Path(config.benchmark).stem}" if config.benchmark else "runs/eval")
    out, models = Path(config.out), choose_models(config, rt)
    if not config.score_only:
        with runtime.main_first(rt):                                                # who comes first writes what the others find
            path = config.benchmark or config.data or tiny.dataset("test")
            read = benchmarks.read(path, config.images, out / "images") if config.benchmark else data.read(path, config.images)
        records = read[:config.limit or None]
        jobs = make_jobs(records, config.levels if config.table_2 else None, config.seed)
        for name, checkpoint in models.items():
            meta = {"model": checkpoint, "weights": fingerprint(checkpoint), "data": fingerprint(path), "seed": config.seed,
                    "plain": name in config.plain, "temperature": config.temperature, "max_new_tokens": config.max_new_tokens,
                    "min_pixels": config.min_pixels or None, "max_pixels": config.max_pixels or None, "capture": config.capture or None}
            predict(config, rt, out / name, meta, jobs)
    if rt.is_main:
        rows = {name: read_predictions(out / name) for name in models}
        for name in models if config.judge else ():
            votes.vote(rows[name], config.judge, config.judge_model, out / name / "votes.jsonl")
        write_report(out, rows, config.seed)
    runtime.teardown(rt)


def choose_models(config: Config, rt: runtime.Runtime) -> dict[str, str]:
    """{name: checkpoint}, less those of the default list that are not there yet."""
    given = [f"model={config.model}"] if config.model else config.models
    models = {name: checkpoint for name, _, checkpoint in (text.partition("=") for text in given)}
    if len(models) < len(given) or any("" in pair or Path(pair[0]).name != pair[0] for pair in models.items()):
        raise SystemExit(f"--models {' '.join(given)}: expected NAME=CHECKPOINT, each NAME once and fit for a folder")
    if unknown := set(config.plain) - set(models) - {"base"}:
        raise SystemExit(f"--plain {' '.join(sorted(unknown))}: no such model; there are {', '.join(models)}")
    for text in set(given) & set(Config().models):
        name = text.partition("=")[0]
        needed = Path(config.out, name) if config.score_only else Path(models[name])
        if not needed.is_dir():
            del models[name]
            if rt.is_main:
                print(f"{name} is left out: there is no {needed} yet", flush=True)
    if not models:
        raise SystemExit("there is no model to evaluate: give --models NAME=CHECKPOINT")
    return models


# ---------------------------------------------------------------- 1. predict

def make_jobs(records: Sequence[dict], levels: list[float] | None, seed: int) -> list[dict]:
    """What will be asked: rows of predictions.jsonl that lack their response. `levels` None: the records' own pictures only."""
    jobs = []
    for record in records:
        key, known = str(record["number"]), record["degradations"]
        form = record.get("form") or ("choice" if record["choices"] else "open")
        job = {"key": key, "id": record["id"], "form": form, "question": record["question"], "choices": record["choices"],
               "answer": data.short_answer(record), "true_response": None, "damage_seed": None}
        job |= {name: record[name] for name in benchmarks.FIELDS if name in record}
        truth = None if known is None else [d._asdict() for d in Chain(known).degradations]     # by their canonical names
        clean = record.get("clean_image")
        if clean != record["image"]:
            jobs.append(job | {"shown": "as is", "image": record["image"], "degradations": truth, "true_response": record["response"]})
        if clean is None or clean != record["image"] and (levels is None or form != "choice" or isinstance(record["image"], list)):
            continue
        kind, damage_seed = benchmarks.draw_damage(Path(clean).name, seed)
        jobs.append(job | {"key": f"{key} clean", "shown": "clean", "image": clean, "degradations": []})
        jobs += [job | {"key": f"{key} {s:g}", "shown": f"{s:g}", "image": clean, "damage_seed": damage_seed,
                        "degradations": [{"type": kind, "intensity": s}]} for s in levels or ()]
    return jobs


def picture(job: dict) -> tuple:
    """What tells one picture from another: the file, and what is done to it here."""
    return job["image"], *((*job["degradations"][0].values(), job["damage_seed"]) if job["damage_seed"] is not None else ())


def pictures(job: dict) -> list[tuple]:
    """The same of each picture that the job shows."""
    return [picture(job | {"image": path}) for path in data.image_paths(job["image"])]


def open_picture(key: tuple) -> Image.Image:
    path, *damage = key
    image = data.open_image(path)
    return Image.fromarray(degrade(np.asarray(image), [damage[:2]], damage[2])) if damage else image


def predict(config: Config, rt: runtime.Runtime, folder: Path, meta: dict, jobs: list[dict]) -> None:
    """Do the jobs that predictions.jsonl does not hold yet. The processes share them out, each writes a file of its own, and
    at the end all is in predictions.jsonl in the order of the jobs."""
    check_meta(folder, meta)
    runtime.barrier(rt)                                                             # all have looked before anything is written
    order = {job["key"]: i for i, job in enumerate(jobs)}
    if rt.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "meta.json", files.to_json(meta, indent=2) + "\n")
        collect(folder, order)
    runtime.barrier(rt)
    done = {row["key"] for row in read_predictions(folder)}
    runtime.barrier(rt)                                                             # all have read before anything is added
    first: dict[tuple, int] = {}
    for i, job in enumerate(jobs):
        first.setdefault(pictures(job)[0], i)                                       # jobs on one picture follow each other
    todo = sorted((job for job in jobs if job["key"] not in done), key=lambda job: first[pictures(job)[0]])
    if todo:
        todo = todo[len(todo) * rt.rank // rt.world_size:len(todo) * (rt.rank + 1) // rt.world_size]
        model, processor = vlm.load(meta["model"], rt.dtype, rt.device, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        model.eval().requires_grad_(False)
        name = "predictions.jsonl" if rt.is_main else f"predictions.{rt.rank}.jsonl"
        bar = tqdm(total=len(todo), desc=folder.name, unit=" answers", disable=not rt.is_main)
        with bar, open(folder / name, "ab") as file:
            for rows in respond(config, model, processor, todo, meta["plain"]):
                file.write("".join(files.to_json(row) + "\n" for row in rows).encode())
                file.flush()
                bar.update(len(rows))
    runtime.barrier(rt)
    if rt.is_main:
        collect(folder, order)


def respond(config: Config, model, processor: vlm.Processor, jobs: list[dict], plain: bool) -> Iterator[list[dict]]:
    """The jobs' rows, complete, batch by batch. A picture is read and encoded once for all the jobs on it."""
    batches = [jobs[i:i + config.batch] for i in range(0, len(jobs), config.batch)]

    def opened(key: tuple, job: dict) -> Image.Image:
        try:
            return open_picture(key)
        except data.DataError as error:
            place = f"{config.benchmark or config.data or 'test.jsonl'}:{job['key'].split()[0]}"
            raise data.DataError(f"{place}: {error}") from error

    def load(k: int) -> tuple[list[tuple], tuple]:
        before = {key for job in batches[k - 1] for key in pictures(job)} if k else set()
        new = {key: job for job in batches[k] for key in pictures(job) if key not in before}
        return list(new), processor.pixels([opened(*item) for item in new.items()]) if new else ()

    seen: dict[tuple, tuple] = {}                                                   # picture -> (3,) grid, features
    for k, (new, pixels) in data.prefetch(load, range(len(batches)), config.workers):
        if new:
            seen |= zip(new, zip(pixels[1], vlm.encode_images(model, *pixels)))
        seen = {key: seen[key] for job in batches[k] for key in pictures(job)}
        prompts = []
        for job in batches[k]:
            grids, features = zip(*(seen[key] for key in pictures(job)))
            grid = torch.stack(grids)
            text = job["question"] if plain else build_prompt(job["question"])      # the question holds its choices already
            prompts.append(vlm.make_prompt(model, processor.prompt_ids(text, processor.visual_tokens(grid)), grid, features))
        seeds = [crc32(f"{config.seed} {job['key']}".encode()) for job in batches[k]]    # the same for every model and batch size
        rollouts = rollout.sample_group(model, prompts, 1, seeds, end_id=processor.end_id, max_new_tokens=config.max_new_tokens,
                                        temperature=config.temperature, banned=processor.banned_ids, capture=config.capture)
        yield [job | {"plain": plain, "response": processor.decode(r.ids), "length": len(r.ids) - (not r.truncated),
                      "truth_length": job["true_response"] and len(processor.response_ids(job["true_response"])) - 1,
                      "truncated": r.truncated} for job, [r] in zip(batches[k], rollouts)]


# ---------------------------------------------------------------- 2. score, 3. report

def write_report(out: Path, rows: dict[str, list[dict]], seed: int) -> None:
    """Score the predictions; print and write report.txt, and write report.json and the plots. The first model is what the others
    are compared with, question by question."""
    if empty := [name for name, found in rows.items() if not found]:
        raise SystemExit(f"{out} holds no predictions of {', '.join(empty)}: run again without --score-only")
    reports = {name: metrics.report(found, seed) for name, found in rows.items()}
    first, *others = rows
    for name in others:
        reports[name]["versus"] = metrics.versus(rows[name], rows[first], seed)
    text = metrics.report_text(reports)
    print(text)
    files.write_text(out / "report.txt", text + "\n")
    files.write_text(out / "report.json", files.to_json(reports, indent=1) + "\n")
    print("\nwritten:", ", ".join(str(out / name) for name in ["report.txt", "report.json", *figures.draw_all(reports, out)]))


# ---------------------------------------------------------------- one picture

def show_one(config: Config, rt: runtime.Runtime) -> None:
    """Ask one model about one picture and print the chain, each part with what it is."""
    if not config.question:
        raise SystemExit("--image needs --question: what is to be asked about the picture?")
    checkpoint = config.model or (GRPO if Path(GRPO).is_dir() else tiny.SFT)
    model, processor = vlm.load(checkpoint, rt.dtype, rt.device, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    model.eval().requires_grad_(False)
    image = data.open_image(config.image)
    batch = data.collate([build_prompt(config.question, config.choices)], [image], processor)
    [[r]] = rollout.sample_group(model, data.encode(model, batch), 1, [config.seed], end_id=processor.end_id,
                                 max_new_tokens=config.max_new_tokens, temperature=config.temperature, banned=processor.banned_ids,
                                 capture=config.capture)
    text = processor.decode(r.ids)
    chain = parse(text)
    picked = choice_index(chain.answer or "", config.choices)
    damage = ", ".join(f"{kind} {s:.2f}" for kind, s in chain.degradations)
    parts = {"D_d": ("damage: type and intensity, from 0 to 1", damage or "none"),
             "Delta_d": ("influence: what that does to what can be seen", chain.influence),
             "T_X": ("pristine reasoning: what the clean picture would show", chain.reasoning),
             "Y_d": ("conclusion: what follows for the question", chain.conclusion),
             "answer": ("what is scored", chain.answer if picked is None else f"{chain.answer} = {config.choices[picked]}")}
    print(f"{config.image} ({image.width} x {image.height}), {checkpoint}\n{build_question(config.question, config.choices)}\n")
    for symbol, (meaning, content) in parts.items():
        print(f"{symbol:8s}{meaning}\n            {content if content is not None else '(missing)'}")
    form = "well formed" if is_well_formed(text) else f"not well formed; as written:\n{text}"
    print(f"\n{len(r.ids) - (not r.truncated)} tokens{', cut off' if r.truncated else ''}, {form}")


# ---------------------------------------------------------------- Robust-U1

def recover(config: Config, rt: runtime.Runtime) -> None:
    """PSNR, SSIM, R_sem and LPIPS of damaged pictures that no step trained on, and of what a restorer makes of them. Of --limit pictures
    (or 256) those that are undamaged are left out: they would count 100 dB each."""
    model = restorer.Restorer.from_pretrained(config.restorer).to(rt.device).eval()
    side, out = model.config["side"], Path(config.out or "runs/eval-recovery")
    source = recovery.load_source(config.data, config.images, side) if config.data else tiny.pairs(side)
    damaged, clean = recovery.held_out(source, config.limit or 256)
    chosen = (damaged != clean).flatten(1).any(1)
    damaged, clean = damaged[chosen], clean[chosen]
    encoder = image_rewards.load_encoder(config.encoder, rt.device)
    lpips = image_rewards.load_lpips(device=rt.device) if config.lpips else None
    recovered = recovery.recover(model, damaged, config.euler_steps, config.seed).cpu()
    result, text = recovery.report({"damaged": recovery.measure(damaged, clean, encoder, lpips),
                                    "recovered": recovery.measure(recovered, clean, encoder, lpips)}, config.seed)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "report.txt", text + "\n")
    files.write_text(out / "report.json", files.to_json(result, indent=1) + "\n")
    files.write_bytes(out / "strip.png", recovery.strip(*(pictures[:10] for pictures in (damaged, recovered, clean))))
    print(f"{text}\n\nwritten: {out}/report.txt, report.json, strip.png (damaged, recovered, clean)")


if __name__ == "__main__":
    main()
