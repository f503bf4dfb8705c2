"""The drawn world: pictures, damage, questions and chains for a laptop with nothing downloaded.

Everything follows from a seed and an index. Scenes come in four levels of total intensity: none,
light (up to .75), medium (up to 1.5) and strong (1.5 to 3); half of them are strong. Where the
damage makes a colour look like another, eight of ten questions are about such a colour.

The quarter of the training records that fine-tuning uses holds chains, by a teacher of mixed
quality: in a half it says the less the stronger the damage, and three of ten are careless. The
other three quarters hold labels alone: the damage, the answer, and the length to aim for.

    python -m rr1.tiny.world --out runs/tiny-world      # train.jsonl, test.jsonl, the images
"""

from __future__ import annotations

import argparse
import json
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from degrade import STAGES, Degradation, degrade
from rr1.chain import build_question, render
from rr1.data import part_of
from rr1.files import write_text
from rr1.tiny.questions import (
    LEAST,
    MOST,
    ask,
    caption,
    choices,
    influence,
    looks,
    questions,
    right_length,
    true_chain,
)
from rr1.tiny.scenes import draw, sample_scene

TRAIN, TEST = 24576, 1632  # records in the written data set
LEVELS = {"none": (0, 0), "light": (0, 0.75), "medium": (0.75, 1.5), "strong": (1.5, 3)}
ORDER = ("none", "light", "medium", "medium", "strong", "strong", "strong", "strong")
TYPES = [kind for kinds in STAGES.values() for kind in kinds]
CARELESS = 0.3  # the share of the training chains whose teacher is careless
# times as frequent
DECIDING = {"darkness": 6, "saturation": 6, "graffiti": 2, "shifting": 2}


class Sample(NamedTuple):
    clean: np.ndarray  # X,   uint8 RGB (112, 112, 3)
    image: np.ndarray  # X_d, the same shape
    record: dict  # one line of the data set


def sample_damage(rng: np.random.Generator, level: str) -> list[Degradation]:
    """One to three types whose total intensity lies in the level, in the order in which they are
    applied."""
    low, high = LEVELS[level]
    if high == 0:
        return []
    least = 2 if level == "strong" else 1
    weights = np.array([DECIDING.get(kind, 1) for kind in TYPES], float)
    while True:
        n = rng.integers(least, 2 * least if level == "light" else least + 2)
        kinds = rng.choice(len(TYPES), size=n, replace=False, p=weights / weights.sum())
        intensities = np.round(rng.uniform(0.1, 1, n), 2)
        if low < intensities.sum() <= high:
            return [
                Degradation(TYPES[k], float(s)) for k, s in zip(sorted(kinds), intensities)
            ]


def undamaged(index: int, seed: int) -> tuple[np.ndarray, list[Degradation], dict]:
    """Sample number `index` of the world `seed` before it is damaged: the clean picture, the
    damage, the record. Four tenths are choice questions, half are open ones, one tenth
    captions. Worlds of even seeds are for training, and of each only a quarter holds chains;
    every record of the others, which are held out, holds a good one."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    clean = draw(scene, rng)
    level = ORDER[index % len(ORDER)]
    degradations = sample_damage(rng, level)
    form = str(rng.choice(["choice", "open", "caption"], p=[0.4, 0.5, 0.1]))
    changed = looks(influence(degradations)) if rng.random() < 0.8 else {}
    question = questions(scene)[-1] if form == "caption" else ask(scene, rng, about=changed)
    options = choices(question, rng) if form == "choice" else None
    answer = None if form == "caption" else question.answer  # choices are answered by text
    record_id = f"{seed}-{index:06d}"
    turns = [{"from": "human", "value": "<image>" + build_question(question.text, options)}]
    chain = None
    if seed % 2:
        chain = true_chain(scene, question, degradations, answer)
    elif part_of(record_id) == "sft":
        length = right_length(degradations)
        if rng.random() < 0.5:
            length = LEAST + MOST - length
        careless = rng.random() < CARELESS
        chain = true_chain(scene, question, degradations, answer, length, careless)
    if chain:
        turns.append({"from": "gpt", "value": render(chain)})
    record = {
        "id": record_id,
        "image": f"images/{record_id}.png",
        "form": form,
        "kind": question.kind,
        "n_steps": question.n_steps,
        "level": level,
        "conversations": turns,
        "degradations": [d._asdict() for d in degradations],
        "length": right_length(degradations),
        "seed": index,
        "choices": options,
        "answer": answer,
        "caption": caption(scene),
        "source_id": f"scene {seed}-{index}",
    }
    return clean, degradations, record


def sample(index: int, seed: int) -> Sample:
    """Sample number `index` of the world `seed`: clean picture, damaged picture, record."""
    clean, degradations, record = undamaged(index, seed)
    return Sample(clean, degrade(clean, degradations, seed=index), record)


def _write_one(job: tuple[int, int, Path, bool]) -> str:
    index, seed, folder, keep_clean = job
    cv2.setNumThreads(1)
    clean, image, record = sample(index, seed)
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    cv2.imwrite(str(folder / record["image"]), image[..., ::-1], fast)
    if keep_clean:
        record["clean_image"] = f"clean/{record['id']}.png"
        cv2.imwrite(str(folder / record["clean_image"]), clean[..., ::-1], fast)
    return json.dumps(record)


def write(folder: str | Path, train: int = TRAIN, test: int = TEST, seed: int = 0) -> Path:
    """Write the data set: `train.jsonl`, `test.jsonl` (held out; with the clean pictures too),
    `images/`, `clean/`.

    A file of lines appears only when all its images are there, so a run that was cut off is simply
    run again.
    """
    folder = Path(folder)
    for name in ("images", "clean"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool() as pool:
        for split, world, n in (("train", 2 * seed, train), ("test", 2 * seed + 1, test)):
            path = folder / f"{split}.jsonl"
            if path.exists():
                found = path.read_text().splitlines()
                if len(found) != n or json.loads(found[0])["id"] != f"{world}-000000":
                    raise SystemExit(
                        f"{path} holds another world ({len(found)} records): "
                        f"give another --out, or delete {folder}"
                    )
                continue
            jobs = [(index, world, folder, split == "test") for index in range(n)]
            lines = pool.imap(_write_one, jobs, chunksize=32)
            lines = list(tqdm(lines, total=n, desc=f"drawing {path}"))
            write_text(path, "\n".join(lines) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the drawn world to disk as an ordinary data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="runs/tiny-world", help="folder to write")
    parser.add_argument("--train", type=int, default=TRAIN, help="training records")
    parser.add_argument("--test", type=int, default=TEST, help="held-out records")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another world")
    a = parser.parse_args()
    print("written:", write(a.out, a.train, a.test, a.seed))


if __name__ == "__main__":
    main()
