"""What is asked, and the folder of one model's answers.

meta.json says how the answers were made, predictions.jsonl holds one row a job. While they are
made, each process adds whole lines to a file of its own; killed at any moment, what is there is
found again.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from degrade import degrade
from rr1 import data, fast, files, rollout, runtime, vlm
from rr1.answers import short_answer
from rr1.chain import Chain, build_prompt
from rr1.evaluation.benchmarks import FIELDS
from rr1.evaluation.tsv import draw_damage, left_out
from rr1.records import image_paths, named, open_image

SET_ASIDE = "set_aside.jsonl"
ASKED = ("form", "question", "degradations", "true_response", "true_length")
JOB = {"key": "", "damage_seed": None, "true_response": None, "true_length": None}

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


def make_jobs(
    records: Iterable[dict],
    levels: Sequence[float] | None,
    seed: int,
    by_letter: bool = True,
) -> list[dict]:
    """What will be asked: rows of predictions.jsonl that lack their response.

    A record's own picture, and of choice questions (of a clean picture: of all) its clean picture,
    undamaged and at each level. `levels` None: the records' own pictures only. A benchmark's choice
    is asked by letter, or by index, as the data teach (asked: "letter" or "index").
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
            "answer": short_answer(record),
        }
        job |= {name: record[name] for name in FIELDS if name in record}
        if "indexed" in record:
            job["asked"] = "letter" if by_letter else "index"
            job["question"] = record["question" if by_letter else "indexed"]
        image, clean = record["image"], record.get("clean_image")
        is_single = not isinstance(image, list)
        if image != clean:
            if known is not None:
                with named(record["where"]):  # by canonical names
                    known = [d._asdict() for d in Chain(known).degradations]
            as_is = {
                "shown": "as is",
                "image": image,
                "degradations": known,
                "true_response": record["response"],
                "true_length": record.get("length"),
            }
            jobs.append(job | as_is)
            if clean is None or levels is None or form != "choice" or not is_single:
                continue
        job["image"] = clean
        jobs.append(job | {"key": f"{key} clean", "shown": "clean", "degradations": []})
        if levels and is_single:
            kind, job["damage_seed"] = draw_damage(Path(clean).name, seed)
            for s in levels:
                damage = [{"type": kind, "intensity": s}]
                shown = {"key": f"{key} {s:g}", "shown": f"{s:g}", "degradations": damage}
                jobs.append(job | shown)
    return jobs


def by_mark(jobs: list[dict]) -> dict:
    """mark -> job. The mark says what is asked and shown, wherever the files lie; it is in the row.

    So a record that was mended is asked anew, and no other one. Equal jobs are told apart by count.
    """
    found, counts = {}, Counter()
    for job in jobs:
        parts = [job[name] for name in ASKED]
        for path in image_paths(job["image"]):
            size = os.path.getsize(path) if os.path.exists(path) else None
            parts += [os.path.basename(path), size, job["damage_seed"]]
        digest = hashlib.sha256(files.to_json(parts).encode()).hexdigest()[:16]
        counts[digest] += 1
        job["mark"] = f"{digest} {counts[digest]}"
        found[job["mark"]] = job
    return found


# ---------------------------------------------------------------- asking


def predict(
    folder: Path,
    meta: dict,
    jobs: list[dict],
    rt: runtime.Runtime,
    batch: int,
    workers: int,
    skip_bad: bool,
) -> None:
    """Do the jobs that the folder does not hold yet.

    `meta` is how they are done, and what meta.json must say if there are answers already: model
    (checkpoint), weights, seed, plain, temperature, max_new_tokens, min_pixels, max_pixels. The
    processes share the batches out; at the end the rows stand in predictions.jsonl in the order of
    the jobs. `skip_bad`: a picture that cannot be used leaves its jobs out.
    """
    wanted = by_mark(jobs)
    stored = read_stored(folder)
    if stored:
        advice = (
            "Give another --out, delete that folder to predict anew, or use --score-only."
        )
        files.same_settings(folder / "meta.json", meta, {"model"}, advice)
    runtime.barrier(rt)  # all have read before anything is written
    if rt.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "meta.json", meta)
        collect(folder, wanted)
    runtime.barrier(rt)
    todo = [job for mark, job in wanted.items() if mark not in stored]
    size = min(batch, math.ceil(len(todo) / rt.world_size))
    batches = in_batches(todo, size)[rt.rank :: rt.world_size]
    if batches:
        model, processor = load_model(meta, rt)
        path = folder / (
            "predictions.jsonl" if rt.is_main else f"predictions.{rt.rank}.jsonl"
        )
        progress = tqdm(
            total=sum(map(len, batches)), desc=folder.name, disable=not rt.is_main
        )
        for rows, problems in respond(model, processor, batches, meta, workers, skip_bad):
            files.append_lines(path, rows)
            progress.update(len(rows))
            for problem in problems:
                progress.write(f"left out: {problem}")
    runtime.barrier(rt)
    if rt.is_main:
        collect(folder, wanted)


def load_model(meta: dict, rt: runtime.Runtime) -> tuple:
    """(model, processor) of meta["model"]; min_pixels and max_pixels 0: the checkpoint's own."""
    model, processor = vlm.load(
        meta["model"],
        rt.dtype,
        rt.device,
        min_pixels=meta["min_pixels"],
        max_pixels=meta["max_pixels"],
    )
    fast.enable(model)
    return model.eval().requires_grad_(False), processor


def in_batches(jobs: list[dict], size: int) -> list:
    """At most `size` jobs in each; those on one picture stand together as far as they fit."""
    by_picture = {}
    for job in jobs:
        by_picture.setdefault(pictures_of(job)[0], []).append(job)
    batches = []
    for group in by_picture.values():
        for start in range(0, len(group), size):
            piece = group[start : start + size]
            if not batches or len(batches[-1]) + len(piece) > size:
                batches.append([])
            batches[-1] += piece
    return batches


def respond(
    model,
    processor: vlm.Processor,
    batches: list,
    meta: dict,
    workers: int = 0,
    skip_bad: bool = False,
) -> Iterator[tuple[list[dict], list[str]]]:
    """(rows, why others are left out), batch by batch; a picture is encoded once in each."""

    def load(k: int) -> tuple:
        jobs, images, problems = open_pictures(batches[k], processor, skip_bad)
        pixels = processor.pixels(list(images.values())) if jobs else None
        return jobs, list(images), pixels, problems

    for _, (jobs, shown, pixels, problems) in data.prefetch(
        load, range(len(batches)), workers
    ):
        if not jobs:
            yield [], problems
            continue
        features = vlm.encode_images(model, *pixels)  # (visual tokens, H) each
        encoded = dict(zip(shown, zip(pixels[1], features)))  # with their (3,) grids
        prompts = [
            make_prompt(model, processor, job, meta["plain"], encoded) for job in jobs
        ]
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
        rows = [
            made(job, answer, meta["plain"], processor)
            for job, [answer] in zip(jobs, sampled)
        ]
        yield rows, problems


def open_pictures(jobs: list[dict], processor: vlm.Processor, skip_bad: bool) -> tuple:
    """(jobs that can be done, their pictures, why others cannot): DataError, or left out."""
    images = {}
    usable, problems = [], []
    for job in jobs:
        with left_out(problems if skip_bad else None, job["where"]):
            for shown in pictures_of(job):
                if shown not in images:
                    image = shown.open()
                    processor.image_tokens(*image.size)  # an error if it cannot be shown
                    images[shown] = image
            usable.append(job)
    return usable, images, problems


def make_prompt(model, processor, job: dict, plain: bool, encoded: dict) -> vlm.Prompt:
    """A job's prompt. `encoded`: Shown -> its (3,) grid and its (visual tokens, H) features."""
    grids, features = zip(*(encoded[shown] for shown in pictures_of(job)))
    grid = torch.stack(grids)  # (pictures, 3)
    # choices are in it already
    text = job["question"] if plain else build_prompt(job["question"])
    ids = processor.prompt_ids(text, processor.visual_tokens(grid))
    return vlm.make_prompt(model, ids, grid, features)


def made(job: dict, answer: rollout.Rollout, plain: bool, processor: vlm.Processor) -> dict:
    """The row of a job that is done."""
    truth_length = job["true_length"]
    if job["true_response"] and truth_length is None:
        # without end of turn
        truth_length = len(processor.response_ids(job["true_response"])) - 1
    return job | {
        "plain": plain,
        "response": processor.decode(answer.ids),
        "length": answer.length,
        "truth_length": truth_length,
        "truncated": answer.truncated,
    }


# ---------------------------------------------------------------- the folder


def fingerprint(checkpoint: str) -> str:
    """Hashes of a checkpoint folder's weights; of a hub id, the id."""
    digests = []
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests) or checkpoint


def read_predictions(folder: Path) -> list[dict]:
    """The rows to report on, from the files of all processes."""
    paths = sorted(folder.glob("predictions*.jsonl"))
    return [row for path in paths for row in files.read_lines(path)]


def read_stored(folder: Path) -> dict:
    """mark -> row: of all that was ever asked."""
    rows = files.read_lines(folder / SET_ASIDE) + read_predictions(folder)
    return {row.get("mark", row["key"]): row for row in rows}


def collect(folder: Path, wanted: dict) -> None:
    """Bring the rows of these jobs into predictions.jsonl, with the answers that are true now.

    All others go to set_aside.jsonl, for the day on which they are asked about again.
    """
    stored = read_stored(folder)
    rows = [stored.pop(mark) | job for mark, job in wanted.items() if mark in stored]
    if stored:
        files.write_text(folder / SET_ASIDE, files.lines_of(stored.values()))
    files.write_text(folder / "predictions.jsonl", files.lines_of(rows))
    for path in folder.glob("predictions.*.jsonl"):
        path.unlink()
