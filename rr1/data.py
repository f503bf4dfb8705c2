"""Records -> the 25 / 75 split -> pictures -> batches. How a record is read: `rr1.records`."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from rr1 import runtime
from rr1.answers import short_answer
from rr1.chain import build_prompt
from rr1.files import write_json
from rr1.records import DataError, Records, image_paths, named, open_image
from rr1.vlm import Processor, Prompt, encode_images, make_prompt

# section 5: 25 % of the data for supervised fine-tuning, 75 % for reinforcement learning
SFT_SHARE = 0.25

# ---------------------------------------------------------------- which records, in which order


def split(records: Records, part: str) -> Records:
    """The records for `sft` (25 %) or `rl` (75 %), or `all`."""
    if part == "all":
        return records
    return records.only([i for i, id in enumerate(records.ids) if part_of(id) == part])


def part_of(id: str) -> str:
    """`sft` or `rl`, by a hash: a record never changes sides when others come or go."""
    digest = hashlib.sha256(f"0:{id}".encode()).hexdigest()
    share = int(digest[:16], 16) / 2**64  # uniform in [0, 1)
    return "sft" if share < SFT_SHARE else "rl"


def batch_indices(n: int, size: int, step: int, seed: int) -> list[int]:
    """Which of n records the step `step` uses: `size` places in an endless row of permutations.

    It depends on nothing but its arguments, so a resumed run goes on where it stopped.
    """
    if n < 1:
        raise DataError(
            "no records to train on: give data with more in this share, or --part all"
        )
    places = range(step * size, (step + 1) * size)
    epochs = {place // n for place in places}
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs
    }
    return [int(orders[place // n][place % n]) for place in places]


def seed_for(*numbers: int) -> int:
    """One seed from several numbers >= 0, such as (run's seed, step, group)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------- which records can be used


def open_pictures(
    record: dict, processor: Processor, max_image_tokens: int
) -> list[Image.Image]:
    """A record's pictures; DataError with the record's line where they cannot be used.

    `max_image_tokens` bounds the tokens of all of them together; 0: any number.
    """
    paths = image_paths(record["image"])
    with named(record["where"]):
        images = [open_image(path) for path in paths]
        tokens = sum(processor.image_tokens(*image.size) for image in images)
        if max_image_tokens and tokens > max_image_tokens:
            sizes = [f"{path} ({i.width} x {i.height})" for path, i in zip(paths, images)]
            takes = "takes" if len(paths) == 1 else "together take"
            pixels = max(1, max_image_tokens // len(paths)) * processor.pixels_per_token
            raise ValueError(
                f"{' and '.join(sizes)} {takes} {tokens} tokens, more than --max-image-tokens "
                f"{max_image_tokens}: make pictures smaller, on disk or by --max-pixels {pixels}, "
                "or leave the record out with --skip-bad"
            )
    return images


def usable(
    records: Records,
    check: Callable[[dict], Any],
    rt: runtime.Runtime,
    out: Path | None = None,
) -> Records:
    """The records that `check` accepts, each tried once; it raises DataError for a bad one.

    Without `out` the first bad one is an error. With it (--skip-bad) they are left out: these, and
    lines that `read` could not use, are printed and written to out/skipped.json, and a resumed run
    goes by that file.
    """

    def problem(i: int) -> str | None:
        try:
            check(records[i])
        except DataError as error:
            if out is None:
                raise
            return str(error)

    def problems() -> dict[int, str]:
        with ThreadPool() as pool:
            tried = pool.imap(problem, range(len(records)), chunksize=64)
            quiet = None if rt.is_main else True
            bar = tqdm(tried, "trying records", len(records), delay=2, disable=quiet)
            return {i: why for i, why in enumerate(bar) if why}

    if out is None:
        problems()
        return records
    path = out / "skipped.json"
    with runtime.main_first(rt):
        if rt.is_main and not path.exists():
            write_json(path, {"lines": records.bad, "records": problems()}, indent=1)
    skipped = json.loads(path.read_text(encoding="utf-8"))
    reasons = [*skipped["lines"], *skipped["records"].values()]
    if rt.is_main and reasons:
        print(
            f"{len(reasons)} bad records are left out ({path}):", *reasons[:10], sep="\n  "
        )
    return records.only(
        [i for i in range(len(records)) if str(i) not in skipped["records"]]
    )


def response_ids(record: dict, processor: Processor, plain: bool = False) -> list[int]:
    """Token ids of the true chain, or with `plain` of the answer alone, and the end of turn.

    DataError where there is none.
    """
    text = short_answer(record) if plain else record["response"]
    if not text:
        missing = (
            'answer ("answer", or an ANSWER section)' if plain else "chain (a gpt turn)"
        )
        raise DataError(f"{record['where']}: there is no {missing} to train on")
    with named(record["where"]):  # it may spell <|image_pad|>
        return processor.response_ids(text)


def true_length(record: dict, processor: Processor) -> int | None:
    """The tokens that r_len aims for: the record's "length", or those of its chain, Eq. 7 and 8."""
    if record["response"] is None or "length" in record:
        return record.get("length")
    return len(response_ids(record, processor)) - 1  # without the end of turn


# ---------------------------------------------------------------- batches


@dataclass
class Batch:
    """B prompts on their way into the model."""

    ids: list[list[int]]  # token ids
    images: list[int]  # how many images each has
    pixel_values: torch.Tensor  # (patches of all images, patch size)
    grid_thw: torch.Tensor  # (images, 3): time, height, width in patches

    def __getitem__(self, part: Sequence[int]) -> Batch:
        """Some of the prompts, by their places, with their own patches."""
        grids = self.grid_thw.split(self.images)  # of each prompt (its images, 3)
        patches = self.pixel_values.split([int(grid.prod(-1).sum()) for grid in grids])
        return Batch(
            ids=[self.ids[i] for i in part],
            images=[self.images[i] for i in part],
            pixel_values=torch.cat([patches[i] for i in part]),
            grid_thw=torch.cat([grids[i] for i in part]),
        )


def collate(texts: Sequence[str], images: Sequence, processor: Processor) -> Batch:
    """One text, and one picture or a list of them, a prompt -> a Batch.

    Each image is preprocessed once, whatever will be sampled from it.
    """
    images = [[own] if isinstance(own, Image.Image) else own for own in images]
    counts = [len(own) for own in images]
    pixel_values, grid_thw = processor.pixels(sum(images, []))
    ids = []
    for text, grids in zip(texts, grid_thw.split(counts), strict=True):
        ids.append(processor.prompt_ids(text, processor.visual_tokens(grids)))
    return Batch(ids, counts, pixel_values, grid_thw)


def load_batch(
    records: Sequence[dict],
    processor: Processor,
    max_image_tokens: int = 0,
    plain: bool = False,
) -> Batch:
    """The prompts of Eq. (1): pictures, question, and, unless `plain`, a request for the chain."""
    images = [open_pictures(r, processor, max_image_tokens) for r in records]
    texts = [r["question"] if plain else build_prompt(r["question"]) for r in records]
    return collate(texts, images, processor)


def check_room(
    model, records: Sequence[dict], batch: Batch, lengths: Iterable[int]
) -> None:
    """DataError where a prompt and a response of so many tokens exceed the model's positions."""
    positions = model.config.text_config.max_position_embeddings
    for record, ids, length in zip(records, batch.ids, lengths, strict=True):
        if len(ids) + length > positions:
            tokens = f"{len(ids)} tokens of prompt and {length} of response"
            raise DataError(
                f"{record['where']}: {tokens}, more than the model's {positions}"
            )


def encode(model, batch: Batch) -> list[Prompt]:
    """One pass of the vision tower -> prompts that sampling, reference and policy share."""
    features = iter(encode_images(model, batch.pixel_values, batch.grid_thw))
    prompts = []
    for ids, grids in zip(batch.ids, batch.grid_thw.split(batch.images)):
        prompts.append(make_prompt(model, ids, grids, [next(features) for _ in grids]))
    return prompts


# ---------------------------------------------------------------- ahead of the step


def prefetch(
    make: Callable[[int], Any], steps: Iterable[int], workers: int = 0
) -> Iterator[tuple[int, Any]]:
    """(step, make(step)) in order, made by threads while earlier ones are used: by one, or several
    `workers` for pictures that take longer to read than a step takes to compute."""
    ahead: deque[tuple[int, Future]] = deque()
    workers = max(1, workers)
    # A thread computes alone: helpers of its own would go on spinning for a while after each of
    # its operations, on the cores that the training needs.
    alone = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(workers, **alone) as pool:
        for step in steps:
            ahead.append((step, pool.submit(make, step)))
            if len(ahead) > workers:
                first, made = ahead.popleft()
                yield first, made.result()
        for first, made in ahead:
            yield first, made.result()
