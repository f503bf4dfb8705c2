"""The drawn world on disk: a data set for a laptop with nothing downloaded.

Everything follows from a seed and an index. Scenes and pictures: scenes.py; questions and true
chains: questions.py.

    python -m rr1.tiny.world --out runs/tiny-world   # writes train.jsonl, test.jsonl and the images
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

from degrade import Degradation, degrade, sample_degradations
from rr1.chain import build_question, render
from rr1.files import lines_of, write_text
from rr1.tiny.questions import caption, choices, questions, true_chain
from rr1.tiny.scenes import draw, sample_scene

TRAIN, TEST = 24576, 1024  # records in the written data set


class Sample(NamedTuple):
    clean: np.ndarray  # X,   uint8 RGB (112, 112, 3)
    image: np.ndarray  # X_d, the same shape
    record: dict  # one line of the data set


def undamaged(index: int, seed: int) -> tuple[np.ndarray, list[Degradation], dict]:
    """Sample number `index` of the world `seed` before it is damaged: the clean picture, the
    damage, the record.

    Half are choice questions, three tenths open ones, two tenths captions. One picture in eight
    stays clean, the others carry one or two degradations.
    """
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    clean = draw(scene, rng)
    degradations = [] if rng.random() < 1 / 8 else sample_degradations(rng, low=1, high=2)
    form = str(rng.choice(["choice", "open", "caption"], p=[0.5, 0.3, 0.2]))
    *asked, describe = questions(scene)
    question = describe if form == "caption" else asked[rng.integers(len(asked))]
    options = choices(question, rng) if form == "choice" else None
    answer = None if form == "caption" else question.answer  # choices are answered by text
    chain = true_chain(scene, question, degradations, answer)
    record_id = f"{seed}-{index:06d}"
    record = {
        "id": record_id,
        "image": f"images/{record_id}.png",
        "form": form,
        "conversations": [
            {"from": "human", "value": "<image>" + build_question(question.text, options)},
            {"from": "gpt", "value": render(chain)},
        ],
        "degradations": [d._asdict() for d in degradations],
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


def _write_one(job: tuple[int, int, Path, bool]) -> dict:
    index, seed, folder, keep_clean = job
    cv2.setNumThreads(1)
    clean, image, record = sample(index, seed)
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    cv2.imwrite(str(folder / record["image"]), image[..., ::-1], fast)
    if keep_clean:
        record["clean_image"] = f"clean/{record['id']}.png"
        cv2.imwrite(str(folder / record["clean_image"]), clean[..., ::-1], fast)
    return record


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
                        f"{path} holds another world ({len(found)} records): give another --out, "
                        f"or delete {folder}"
                    )
                continue
            jobs = [(index, world, folder, split == "test") for index in range(n)]
            made = pool.imap(_write_one, jobs, chunksize=32)
            write_text(path, lines_of(tqdm(made, total=n, desc=f"drawing {path}")))
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
