"""What is asked, and the folder of one model's answers.

meta.json says how the answers were made, predictions.jsonl holds one row a job. While they are
made, each process adds whole lines to a file of its own; killed at any moment, what is there is
found again.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from degrade import degrade
from rr1 import data, fast, files, rollout, runtime, vlm
from rr1.chain import Chain, build_prompt
from rr1.evaluation.benchmarks import FIELDS
from rr1.evaluation.tsv import draw_damage
from rr1.records import DataError, image_paths, open_image

# what every job has: a picture as it came, and no true response
JOB = {"key": "", "damage_seed": None, "true_response": None}

# ---------------------------------------------------------------- what is asked


class Shown(NamedTuple):
    """A picture as a model sees it: a file, and the one damage done to it here, if any."""

    path: str
    damage: tuple[str, float] | None = None
    seed: int | None = None

    def open(self) -> Image.Image:
        image = open_image(self.path)
        if self.damage is None:
            return image
        return Image.fromarray(degrade(np.asarray(image), [self.damage], self.seed))


def pictures_of(job: dict) -> list[Shown]:
    """The pictures that a job, or a row of predictions.jsonl, shows."""
    damage = None
    if job["damage_seed"] is not None:
        [drawn] = job["degradations"]
        damage = drawn["type"], drawn["intensity"]
    return [Shown(path, damage, job["damage_seed"]) for path in image_paths(job["image"])]


def make_jobs(records: Sequence[dict], levels: Sequence[float] | None, seed: int) -> list[dict]:
    """What will be asked: rows of predictions.jsonl that lack their response.

    A record's own picture, and of choice questions (of a clean picture: of all) its clean picture,
    undamaged and at each level. `levels` None: the records' own pictures only.
    """
    jobs = []
    for record in records:
        key, known = str(record["number"]), record["degradations"]
        form = record.get("form") or ("choice" if record["choices"] else "open")
        job = JOB | {
            "key": key,
            "id": record["id"],
            "where": record["where"],
            "form": form,
            "question": record["question"],
            "choices": record["choices"],
            "answer": data.short_answer(record),
        }
        job |= {name: record[name] for name in FIELDS if name in record}
        image, clean = record["image"], record.get("clean_image")
        if image != clean:
            as_is = {"shown": "as is", "image": image, "true_response": record["response"]}
            if known is not None:
                known = [d._asdict() for d in Chain(known).degradations]  # by canonical names
            jobs.append(job | as_is | {"degradations": known})
            again = levels is not None and form == "choice" and not isinstance(image, list)
            if clean is None or not again:
                continue
        job["image"] = clean
        jobs.append(job | {"key": f"{key} clean", "shown": "clean", "degradations": []})
        kind, job["damage_seed"] = draw_damage(Path(clean).name, seed)
        for s in levels or ():
            damage = [{"type": kind, "intensity": s}]
            jobs.append(job | {"key": f"{key} {s:g}", "shown": f"{s:g}", "degradations": damage})
    return jobs


# ---------------------------------------------------------------- asking


def predict(
    folder: Path,
    meta: dict,
    jobs: list[dict],
    rt: runtime.Runtime,
    batch: int = 64,
    workers: int = 0,
) -> None:
    """Do the jobs that the folder's predictions.jsonl does not hold yet.

    `meta` is how they are done, and what meta.json must say if there are answers already: model
    (checkpoint), weights, seed, plain, temperature, max_new_tokens, min_pixels, max_pixels. The
    processes share the batches out; at the end all rows stand in predictions.jsonl in the order of
    the jobs.
    """
    done = {row["key"] for row in read_predictions(folder)}
    if done:
        advice = "Give another --out, delete that folder to predict anew, or use --score-only."
        files.same_settings(folder / "meta.json", meta, {"model"}, advice)
    runtime.barrier(rt)  # all have read before anything is written
    if rt.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "meta.json", meta)
    runtime.barrier(rt)
    todo = [job for job in jobs if job["key"] not in done]
    size = min(batch, math.ceil(len(todo) / rt.world_size))
    batches = in_batches(todo, size)[rt.rank :: rt.world_size]
    if batches:
        model, processor = load_model(meta, rt)
        path = folder / ("predictions.jsonl" if rt.is_main else f"predictions.{rt.rank}.jsonl")
        progress = tqdm(total=sum(map(len, batches)), desc=folder.name, disable=not rt.is_main)
        for rows in respond(model, processor, batches, meta, workers):
            files.append_lines(path, rows)
            progress.update(len(rows))
    runtime.barrier(rt)
    if rt.is_main:
        collect(folder, jobs)


def load_model(meta: dict, rt: runtime.Runtime) -> tuple:
    """(model, processor) of meta["model"]; min_pixels and max_pixels 0: the checkpoint's own."""
    pixels = {"min_pixels": meta["min_pixels"], "max_pixels": meta["max_pixels"]}
    model, processor = vlm.load(meta["model"], rt.dtype, rt.device, **pixels)
    fast.enable(model)
    return model.eval().requires_grad_(False), processor


def in_batches(jobs: list[dict], size: int) -> list[list[dict]]:
    """At most `size` jobs in each; those on one picture stand together as far as they fit."""
    by_picture: dict[Shown, list[dict]] = {}
    for job in jobs:
        by_picture.setdefault(pictures_of(job)[0], []).append(job)
    batches: list[list[dict]] = []
    for group in by_picture.values():
        for start in range(0, len(group), size):
            piece = group[start : start + size]
            if not batches or len(batches[-1]) + len(piece) > size:
                batches.append([])
            batches[-1] += piece
    return batches


def respond(
    model, processor: vlm.Processor, batches: list[list[dict]], meta: dict, workers: int = 0
) -> Iterator[list[dict]]:
    """The rows of the jobs, batch by batch; a picture is read and encoded once in each."""

    def load(k: int) -> tuple[list[Shown], torch.Tensor, torch.Tensor]:
        images: dict[Shown, Image.Image] = {}
        for job in batches[k]:
            for shown in pictures_of(job):
                if shown not in images:
                    images[shown] = open_for(job, shown)
        return list(images), *processor.pixels(list(images.values()))

    for k, (shown, pixel_values, grids) in data.prefetch(load, range(len(batches)), workers):
        jobs = batches[k]
        features = vlm.encode_images(model, pixel_values, grids)  # (visual tokens, H) each
        encoded = dict(zip(shown, zip(grids, features)))
        prompts = [make_prompt(model, processor, job, meta["plain"], encoded) for job in jobs]
        # the seed of an answer is the same for every model and batch size
        seeds = [crc32(f"{meta['seed']} {job['key']}".encode()) for job in jobs]
        sampled = rollout.sample_group(
            model,
            prompts,
            1,
            seeds,
            end_id=processor.end_id,
            max_new_tokens=meta["max_new_tokens"],
            temperature=meta["temperature"],
            banned=processor.banned_ids,
        )
        yield [made(job, answer, meta["plain"], processor) for job, [answer] in zip(jobs, sampled)]


def open_for(job: dict, shown: Shown) -> Image.Image:
    """The picture; an error names the record's file and line too."""
    try:
        return shown.open()
    except DataError as error:
        raise DataError(f"{job['where']}: {error}") from error


def make_prompt(model, processor, job: dict, plain: bool, encoded: dict) -> vlm.Prompt:
    """A job's prompt. `encoded`: Shown -> its (3,) grid and its (visual tokens, H) features."""
    grids, features = zip(*(encoded[shown] for shown in pictures_of(job)))
    grid = torch.stack(grids)  # (pictures, 3)
    text = job["question"] if plain else build_prompt(job["question"])  # choices are in it already
    ids = processor.prompt_ids(text, processor.visual_tokens(grid))
    return vlm.make_prompt(model, ids, grid, features)


def made(job: dict, answer: rollout.Rollout, plain: bool, processor: vlm.Processor) -> dict:
    """The row of a job that is done."""
    truth_length = None
    if job["true_response"]:
        truth_length = len(processor.response_ids(job["true_response"])) - 1  # without end of turn
    return job | {
        "plain": plain,
        "response": processor.decode(answer.ids),
        "length": answer.length,
        "truth_length": truth_length,
        "truncated": answer.truncated,
    }


# ---------------------------------------------------------------- the folder


def fingerprint(name: str | Path) -> str:
    """A hash of a file, or of a checkpoint folder's safetensors files; of a hub id, the id."""
    paths = sorted(Path(name).glob("*.safetensors")) or [Path(name)]
    if not paths[0].is_file():
        return str(name)
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
    return digest.hexdigest()


def read_predictions(folder: Path) -> list[dict]:
    """The rows on disk, from the files of all processes, each once."""
    rows = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        for row in files.read_lines(path):
            rows[row["key"]] = row
    return list(rows.values())


def collect(folder: Path, jobs: list[dict]) -> None:
    """Bring all rows into predictions.jsonl, in the order of the jobs."""
    order = {job["key"]: i for i, job in enumerate(jobs)}
    rows = sorted(read_predictions(folder), key=lambda row: order.get(row["key"], len(order)))
    files.write_text(folder / "predictions.jsonl", files.lines_of(rows))
    for path in folder.glob("predictions.*.jsonl"):
        path.unlink()
