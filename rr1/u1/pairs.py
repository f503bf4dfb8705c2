"""Pairs of a damaged and a clean picture: what a restorer learns from, and what it is measured on.

A source has a length, `pair(index, seed)`, which gives (damaged, clean) as uint8 RGB pictures
(side, side, 3), and `held_out()`, a source of pairs that no step trains on.
"""

from __future__ import annotations

import hashlib
import math
import os
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Sequence

import cv2
import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from degrade import SUFFIXES, degrade, sample_degradations
from rr1 import tiny
from rr1.records import DataError, open_image
from rr1.tiny import world
from rr1.u1.restorer import Restorer, recover, to_tensor, to_uint8

SCENES = 24_576  # of the drawn world, to train on
KEPT = 64  # larger pairs would make a file of more than a gigabyte: they are drawn when asked for


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """By areas where it shrinks, by cubics where it grows."""
    shrinks = width * height < image.shape[0] * image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=interpolation)


def recover_images(
    model: Restorer,
    images: Sequence[np.ndarray],
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
) -> list[np.ndarray]:
    """Pictures of any size (H, W, 3), recovered at the restorer's side, at their own size again."""
    side = model.config["side"]
    damaged = to_tensor([resize(image, side, side) for image in images])
    pictures = to_uint8(recover(model, damaged, seeds, steps))
    found = []
    for image, picture in zip(images, pictures):
        height, width = image.shape[:2]
        found.append(resize(picture, width, height))
    return found


def draw(index: int, seed: int, side: int) -> np.ndarray:
    """(2, side, side, 3): scene number `index` of the world `seed`, shrunk, damaged and clean.

    The damage is the scene's own, done at this size: noise and blocks are as coarse as a picture of
    this size would have them.
    """
    cv2.setNumThreads(1)
    clean, degradations, _ = world.undamaged(index, seed)
    clean = resize(clean, side, side)
    return np.stack([degrade(clean, degradations, seed=index), clean])


class Scenes:
    """The first n scenes of the drawn world `seed` (0: training, 1: held out).

    They are drawn when asked for; `kept` draws all at once, into a file.
    """

    def __init__(self, side: int, seed: int = 0, n: int | None = None):
        self.side = side
        self.seed = seed
        self.n = SCENES if n is None else n
        self.drawn = None

    def __len__(self) -> int:
        return self.n

    def pair(self, index: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(damaged, clean). The damage belongs to the scene: `seed` plays no part."""
        if self.drawn is not None:
            return tuple(self.drawn[index])
        return tuple(draw(index, self.seed, self.side))

    def held_out(self) -> Scenes:
        return Scenes(self.side, seed=1)

    def kept(self, folder: str | Path) -> Scenes:
        """All of them from a file in `folder`, which is written where it is not there.

        Its name tells versions of the world apart, by a hash of the first pairs.
        """
        one = partial(draw, seed=self.seed, side=self.side)
        first = b"".join(one(i).tobytes() for i in range(min(self.n, 16)))
        version = hashlib.sha256(first).hexdigest()[:8]
        path = Path(folder) / f"pairs-{self.side}-{self.n}-{version}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with get_context("spawn").Pool() as pool:
                work = pool.imap(one, range(self.n), chunksize=64)
                drawn = np.stack(list(tqdm(work, total=self.n, desc=f"drawing {path}")))
            # others may be at it too
            temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
            np.save(temporary, drawn)
            os.replace(temporary, path)
        self.drawn = np.load(path, mmap_mode="r")  # (n, 2, side, side, 3)
        return self


class Photos:
    """Square crops of clean photos at random places and scales, shrunk to `side`, then damaged."""

    def __init__(self, paths: Sequence[str | Path], side: int):
        self.paths = list(paths)
        self.side = side
        self.open = lru_cache(64)(lambda path: np.asarray(open_image(path)))

    def __len__(self) -> int:
        return len(self.paths)

    def pair(self, index: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(damaged, clean), by one or two degradations; everything random follows from `seed`."""
        side = self.side
        rng = np.random.default_rng(seed)
        photo = self.open(self.paths[index])
        height, width = photo.shape[:2]
        octaves = math.log2(min(height, width) / side)
        size = int(side * 2 ** rng.uniform(0, octaves))
        top = int(rng.integers(height - size + 1))
        left = int(rng.integers(width - size + 1))
        clean = resize(photo[top : top + size, left : left + size], side, side)
        degradations = sample_degradations(rng, low=1, high=2)
        return degrade(clean, degradations, seed=int(rng.integers(2**31))), clean

    def held_out(self) -> Photos:
        """The same photos: `held_out` below takes other seeds, so other crops."""
        return self


def load_source(photos: str, side: int) -> Scenes | Photos:
    """--data: a folder of clean photos, or "" for the drawn world."""
    if not photos:
        return Scenes(side).kept(tiny.WORLD) if side <= KEPT else Scenes(side)
    paths = sorted(p for p in Path(photos).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        raise SystemExit(
            f"--data {photos}: no photos in this folder; there are readers for {kinds}"
        )
    for path in paths:
        check_size(path, side)
    return Photos(paths, side)


def check_size(path: Path, side: int) -> None:
    """DataError for a photo that is smaller than `side`; only its head is read."""
    try:
        with Image.open(path) as photo:
            width, height = photo.size
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
    if min(width, height) < side:
        raise DataError(
            f"{path}: {width} x {height} pixels, smaller than --side {side}: "
            "leave it out, or give a smaller side"
        )


def load_pairs(
    source: Scenes | Photos, indices: Sequence[int], seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Damaged and clean pictures, (N, 3, side, side) each."""
    pairs = [source.pair(index, seed) for index, seed in zip(indices, seeds)]
    damaged, clean = zip(*pairs)
    return to_tensor(damaged), to_tensor(clean)


def held_out(source: Scenes | Photos, n: int) -> tuple[Tensor, Tensor]:
    """n pairs that no step trains on: held-out scenes, or other crops of the first photos."""
    source = source.held_out()
    return load_pairs(source, [i % len(source) for i in range(n)], range(n))
