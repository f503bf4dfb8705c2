"""One question's way: its photo is damaged, its chain written, and a line of train.jsonl made."""

import zlib
from pathlib import Path
from typing import Any, Sequence
from urllib.parse import quote

import cv2
import numpy as np

from degrade import Degradation, degrade, sample_degradations
from rr1 import files
from rr1.annotate import build_chain, target_words
from rr1.annotate.questions import Source
from rr1.annotate.teachers import Rejected
from rr1.chain import IMAGE, build_question, render
from rr1.records import DataError, open_image

# the image processor refuses a picture so many times as long as it is wide
LONGEST_SIDES = 200


def seed_of(source: Source, seed: int) -> int:
    """A question's own seed, from its id alone, so that others may come and go."""
    return int(
        np.random.SeedSequence([seed, zlib.crc32(source.id.encode())]).generate_state(1)[0]
    )


def damage(source: Source, config) -> tuple[np.ndarray, np.ndarray, list[Degradation]]:
    """Step 1, Eq. (13): X, X_d and D_d of a question. Pictures are RGB uint8 (H, W, 3)."""
    try:
        X = np.asarray(open_image(source.photo))
    except DataError as error:
        raise Rejected("damage", str(error)) from None
    height, width = X.shape[:2]
    if max(height, width) > LONGEST_SIDES * min(height, width):
        problem = (
            f"{width} x {height} pixels: one side is over {LONGEST_SIDES} times the other"
        )
        raise Rejected("damage", f"{source.photo}: {problem}")
    seed = seed_of(source, config.seed)
    D_d = sample_degradations(np.random.default_rng(seed), config.low, config.high)
    return X, degrade(X, D_d, seed), D_d


def make_row(source: Source, config, teacher, attempts: dict[str, int]) -> dict:
    """One question's line of train.jsonl, its pictures written.

    `attempts`: which attempt to make at each step (0 where absent).
    """

    def G(step: str, images: Sequence[np.ndarray], **fields: Any) -> str:
        return teacher(step, images, attempts.get(step, 0), **fields)

    truth = source.truth
    X, X_d, D_d = damage(source, config)
    turns = [
        {"from": "human", "value": IMAGE + build_question(truth.question, truth.choices)}
    ]
    if config.no_chains:
        length = target_words(sum(s for _, s in D_d), config.tokens)  # tokens, here
        made = {"length": length}
    else:
        chain = build_chain(G, X, X_d, D_d, truth, config.words)
        turns.append({"from": "gpt", "value": render(chain)})
        made = {"teacher": config.teacher}
    name = file_name(source.id)
    image, clean = f"images/{name}.png", f"clean/{name}{source.photo.suffix.lower()}"
    png = cv2.imencode(".png", X_d[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 3])[1]
    files.write_bytes(Path(config.out, image), png)
    files.write_bytes(Path(config.out, clean), source.photo.read_bytes())
    return {
        "id": source.id,
        "image": image,
        "conversations": turns,
        "degradations": [d._asdict() for d in D_d],
        "seed": seed_of(source, config.seed),
        "clean_image": clean,
        "choices": truth.choices,
        "answer": truth.answer,
        **made,
        "fingerprint": source.fingerprint(),
    }


def file_name(id: str) -> str:
    """An id as the name of a file; cut where it is too long for one."""
    name = quote(id, safe="")
    return name if len(name) <= 100 else f"{name[:80]}-{zlib.crc32(id.encode()):08x}"
