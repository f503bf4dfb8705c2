"""Records on disk -> examples -> batches.

A data set is a file of JSON lines in the released form of Robust-R1, with our own keys beside it where they are known:

    {"id": "7", "image": "images/7.png", "conversations": [{"from": "human", "value": "<image>what is it?\n0. cat 1. dog"},
                                                           {"from": "gpt", "value": "<TYPE>noise(0.20)<TYPE_END>.."}],
     "choices": ["cat", "dog"], "answer": "0", "degradations": [{"type": "noise", "intensity": 0.2}], "seed": 7, ..}
"""
from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from degrade import Degradation
from rr1.chain import build_prompt, parse
from rr1.vlm import Processor, Prompt, encode_images, make_prompt

SFT_SHARE = 0.25                     # section 5: 25 % of the data for supervised fine-tuning, 75 % for reinforcement learning


class DataError(ValueError):
    """A record that cannot be used; the message names the file, the line and the field."""


def read(path: str | Path, image_folder: str | Path | None = None) -> list[dict]:
    """Every record of a JSON-lines file. `image` paths are relative to `image_folder` (default: the file's own folder).

    Each comes back with: `id`, `image` (full path), `question` (text, choices included), `response` (the true chain as written),
    `chain` (parsed), `answer`, `choices` (or None), `degradations`, `where` (file:line), and whatever else the line held.
    """
    path = Path(path)
    folder = Path(image_folder) if image_folder else path.parent
    if not path.is_file():
        raise SystemExit(f"--data {path}: no such file. Give a file of JSON lines, or leave --data out for the drawn world.")
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                records.append(_record(line, f"{path}:{number}", folder))
    if not records:
        raise DataError(f"{path}: holds no records")
    return records


def _record(line: str, where: str, folder: Path) -> dict:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}): repair or remove the line") from error
    try:
        image, turns = raw["image"], {turn["from"]: str(turn["value"]) for turn in raw["conversations"]}
        question, response = turns["human"].replace("<image>", "").strip(), turns["gpt"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: field {error} is missing; a record needs image and conversations with a human and a gpt turn") from error
    image = image[0] if isinstance(image, list) and len(image) == 1 else image
    if not all(isinstance(path, str) for path in (image, raw.get("clean_image", ""))):
        raise DataError(f"{where}: image is {image!r}, clean_image {raw.get('clean_image')!r}; expected one path each, relative to the image folder")
    chain = parse(response)
    try:
        known = [Degradation(d["type"], float(d["intensity"])) for d in raw["degradations"]] if "degradations" in raw else chain.degradations
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f'{where}: degradations are {raw["degradations"]!r}; expected a list of {{"type": .., "intensity": ..}}') from error
    record = {"id": where.rpartition("/")[-1], "choices": None, "answer": chain.answer, **raw, "where": where, "image": str(folder / image),
              "question": question, "response": response, "chain": chain, "degradations": known}
    if "clean_image" in raw:
        record["clean_image"] = str(folder / raw["clean_image"])
    return record


def split(records: Sequence[dict], part: str, seed: int = 0) -> list[dict]:
    """The records for `sft` (25 %) or `rl` (75 %), or `all`: by a hash of seed and id, so that a record never changes sides
    when others come or go, and no record is in both."""
    def share(record: dict) -> float:
        digest = hashlib.sha256(f"{seed}:{record['id']}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
    return [r for r in records if part == "all" or (share(r) < SFT_SHARE) == (part == "sft")]


def batch_indices(n: int, size: int, step: int, seed: int) -> list[int]:
    """Which of n records the optimizer step `step` uses: `size` places in an endless row of seeded permutations.

    It depends on nothing but its arguments, so a resumed run goes on where it stopped.
    """
    if n < 1:
        raise DataError("no records to train on: the data has none in this share; give more of it, or --part all")
    places = range(step * size, (step + 1) * size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in {p // n for p in places}}
    return [int(orders[p // n][p % n]) for p in places]


def seed_for(*numbers: int) -> int:
    """One seed from several numbers >= 0, such as (run's seed, step, group)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def open_image(path: str | Path) -> Image.Image:
    """An RGB picture, whole; an error names the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error


@dataclass
class Batch:
    """B prompts on their way into the model: token ids, patches of all images, their (B, 3) grid."""
    ids: list[list[int]]
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor

    def __getitem__(self, part: slice) -> "Batch":
        """Some of the prompts, with their own patches."""
        patches = self.pixel_values.split(self.grid_thw.prod(-1).tolist())
        return Batch(self.ids[part], torch.cat(patches[part]), self.grid_thw[part])


def collate(texts: Sequence[str], images: Sequence[Image.Image], processor: Processor) -> Batch:
    """One picture and one text a prompt -> a Batch. Each image is preprocessed once, whatever will be sampled from it."""
    pixel_values, grid = processor.pixels(images)
    return Batch([processor.prompt_ids(text, [n]) for text, n in zip(texts, processor.visual_tokens(grid))], pixel_values, grid)


def load_batch(records: Sequence[dict], processor: Processor) -> Batch:
    """The prompts of Eq. (1) for these records: picture and question, and a request for the chain."""
    return collate([build_prompt(r["question"]) for r in records], [open_image(r["image"]) for r in records], processor)


def encode(model, batch: Batch) -> list[Prompt]:
    """One pass of the vision tower over the batch's images -> prompts that sampling, reference and policy share."""
    features = encode_images(model, batch.pixel_values, batch.grid_thw)
    return [make_prompt(model, ids, grid[None], [f]) for ids, grid, f in zip(batch.ids, batch.grid_thw, features)]


def prefetch(make: Callable[[int], Any], steps: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """(step, make(step)) in order; the next one is made in a thread while the last one is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = None
        for step in steps:
            following = (step, pool.submit(make, step))
            if ahead:
                yield ahead[0], ahead[1].result()
            ahead = following
        if ahead:
            yield ahead[0], ahead[1].result()
