"""Records -> the 25 / 75 split -> pictures -> batches. What a record is, and how one is read: `rr1.records`."""
from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rr1 import runtime
from rr1.chain import build_prompt
from rr1.records import DataError, Records, image_paths, open_image, read  # noqa: F401
from rr1.files import to_json, write_text
from rr1.vlm import Processor, Prompt, encode_images, make_prompt

SFT_SHARE = 0.25                     # section 5: 25 % of the data for supervised fine-tuning, 75 % for reinforcement learning


def split(records: Sequence[dict], part: str, seed: int = 0) -> Sequence[dict]:
    """The records for `sft` (25 %) or `rl` (75 %), or `all`: by a hash of seed and id, so that a record never changes sides
    when others come or go, and no record is in both."""
    def share(id: object) -> float:
        digest = hashlib.sha256(f"{seed}:{id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
    known = isinstance(records, Records)                # then ids are there without parsing
    ids = records.ids if known else [r["id"] for r in records]
    chosen = [i for i, id in enumerate(ids) if part == "all" or (share(id) < SFT_SHARE) == (part == "sft")]
    return records.only(chosen) if known else [records[i] for i in chosen]


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


def open_pictures(record: dict, processor: Processor, max_image_tokens: int = 0) -> list[Image.Image]:
    """A record's pictures; an error names the record's file and line too. `max_image_tokens`, of all of them together; 0: any number."""
    paths = image_paths(record["image"])
    try:
        images = [open_image(path) for path in paths]
        tokens = sum(processor.image_tokens(image.width, image.height) for image in images)
    except ValueError as error:
        raise DataError(f"{record['where']}: {error}") from error
    if max_image_tokens and tokens > max_image_tokens:
        named = " and ".join(f"{path} ({image.width} x {image.height})" for path, image in zip(paths, images))
        raise DataError(f"{record['where']}: {named} {'takes' if len(paths) == 1 else 'together take'} {tokens} tokens, more than "
                        f"--max-image-tokens {max_image_tokens}: make pictures smaller, on disk or by --max-pixels "
                        f"{max(1, max_image_tokens // len(paths)) * processor.pixels_per_token}, or leave the record out with --skip-bad")
    return images


def leave_out_bad(records: Records, processor: Processor, max_image_tokens: int, out: Path, rt: runtime.Runtime,
                  plain: bool = False) -> Records:
    """--skip-bad: the records whose pictures can be used, every one of them tried once; with `plain`, those that have an answer. What is
    left out, lines that `read` could not use included, is printed and written to out/skipped.json; a resumed run goes by that file."""
    path = out / "skipped.json"

    def problem(i: int) -> str | None:
        try:
            open_pictures(record := records[i], processor, max_image_tokens)
            if plain:
                plain_answer(record)
        except DataError as error:
            return str(error)

    with runtime.main_first(rt):
        if rt.is_main and not path.exists():
            found: dict[int, str] = {}
            with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(records), desc="trying records", delay=2, disable=None) as bar:
                for start in range(0, len(records), 1000):              # not all at once: each waiting call takes memory
                    part = range(len(records))[start:start + 1000]
                    found |= {i: why for i, why in zip(part, pool.map(problem, part)) if why}
                    bar.update(len(part))
            write_text(path, to_json({"lines": records.bad, "records": found}, indent=1))
    skipped = json.loads(path.read_text(encoding="utf-8"))
    reasons = [*skipped["lines"], *skipped["records"].values()]
    if rt.is_main and reasons:
        more = [f".. and {len(reasons) - 10} more in {path}"] if len(reasons) > 10 else []
        print("\n  ".join([f"{len(reasons)} bad records are left out ({path}):", *reasons[:10], *more]), flush=True)
    return records.only([i for i in range(len(records)) if str(i) not in skipped["records"]])


@dataclass
class Batch:
    """B prompts on their way into the model: token ids, how many images each has, patches of all images, their (images, 3) grid."""
    ids: list[list[int]]
    images: list[int]
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor

    def __getitem__(self, part: Iterable[int]) -> "Batch":
        """Some of the prompts, by their places, with their own patches."""
        part, grids = list(part), self.grid_thw.split(self.images)
        patches = self.pixel_values.split([int(grid.prod(-1).sum()) for grid in grids])
        return Batch(*([own[i] for i in part] for own in (self.ids, self.images)), *(torch.cat([own[i] for i in part]) for own in (patches, grids)))


def collate(texts: Sequence[str], images: Sequence[Image.Image | Sequence[Image.Image]], processor: Processor) -> Batch:
    """One text and one picture (or several, in a list) a prompt -> a Batch. Each image is preprocessed once, whatever will be sampled
    from it."""
    images = [[own] if isinstance(own, Image.Image) else own for own in images]
    counts = [len(own) for own in images]
    pixel_values, grid = processor.pixels([image for own in images for image in own])
    ids = [processor.prompt_ids(text, processor.visual_tokens(own)) for text, own in zip(texts, grid.split(counts), strict=True)]
    return Batch(ids, counts, pixel_values, grid)


def load_batch(records: Sequence[dict], processor: Processor, max_image_tokens: int = 0, plain: bool = False) -> Batch:
    """The prompts of Eq. (1) for these records: picture or pictures, the question, and, unless `plain`, a request for the chain."""
    images = [open_pictures(r, processor, max_image_tokens) for r in records]
    return collate([r["question"] if plain else build_prompt(r["question"]) for r in records], images, processor)


def encode(model, batch: Batch) -> list[Prompt]:
    """One pass of the vision tower over the batch's images -> prompts that sampling, reference and policy share."""
    features = iter(encode_images(model, batch.pixel_values, batch.grid_thw))
    return [make_prompt(model, ids, grid, [next(features) for _ in grid]) for ids, grid in zip(batch.ids, batch.grid_thw.split(batch.images))]


def short_answer(record: dict) -> str | None:
    """What is right where no chain is asked for: the answer, of a caption the caption. None where the data do not say."""
    if record.get("form") == "caption" and "benchmark" not in record:
        return record.get("caption") or record["chain"].conclusion
    return None if record["answer"] is None else str(record["answer"])


def plain_answer(record: dict) -> str:
    """The response to train on without a chain; DataError where there is none."""
    answer = short_answer(record)
    if answer is None:
        raise DataError(f"{record['where']}: there is no answer to train on without its chain: expected an ANSWER section, or \"answer\"")
    return answer


def prefetch(make: Callable[[int], Any], steps: Iterable[int], workers: int = 0) -> Iterator[tuple[int, Any]]:
    """(step, make(step)) in order, made while earlier ones are used: the next one by a thread, or by `workers` processes two each.

    The thread computes alone: helpers of its own would go on spinning for a while after each of its operations, on the cores that the
    training needs. Processes (of a DataLoader, forked) are for pictures that take longer to read than a step takes to compute.
    """
    if workers:
        cv2.setNumThreads(1)                                # a worker that sets it would wait for threads that were not forked
        made = DataLoader(_Steps(make), sampler=list(steps), batch_size=None, num_workers=workers, collate_fn=lambda item: item,
                          multiprocessing_context="fork")
        for step, result, error in made:
            if error:
                raise error
            yield step, result
        return
    with ThreadPoolExecutor(max_workers=1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = None
        for step in steps:
            following = (step, pool.submit(make, step))
            if ahead:
                yield ahead[0], ahead[1].result()
            ahead = following
        if ahead:
            yield ahead[0], ahead[1].result()


class _Steps(Dataset):
    """What a worker process makes of a step; an error goes back as it is, for the message to stay whole."""

    def __init__(self, make: Callable[[int], Any]):
        self.make = make

    def __getitem__(self, step: int) -> tuple[int, Any, Exception | None]:
        try:
            return step, self.make(step), None
        except Exception as error:
            return step, None, error
