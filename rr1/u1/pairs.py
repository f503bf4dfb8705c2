"""Damaged and clean pictures of the drawn world's scenes: what a restorer learns from (`rr1.u1.recovery.Source`)."""
from __future__ import annotations

import os
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from degrade import degrade
from rr1.tiny import world


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """By areas where it shrinks, by cubics where it grows."""
    shrinks = width * height < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def draw(index: int, seed: int, side: int) -> np.ndarray:
    """(2, side, side, 3): scene number `index` of the world `seed`, shrunk, damaged and clean. The damage is the scene's own, done at
    this size: noise and blocks are as coarse as a picture of this size would have them."""
    cv2.setNumThreads(1)
    clean, degradations, _ = world.undamaged(index, seed)
    clean = resize(clean, side, side)
    return np.stack([degrade(clean, degradations, seed=index), clean])


class Pairs:
    """The first n scenes of the drawn world `seed` (0: training, 1: held out). They are drawn when asked for; `kept` ones, which are asked
    for again and again, all at once, into a file."""

    def __init__(self, side: int, seed: int = 0, n: int | None = None):
        self.side, self.seed, self.n, self.drawn = side, seed, world.TRAIN if n is None else n, None

    def __len__(self) -> int:
        return self.n

    def pair(self, index: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(damaged, clean). The damage belongs to the scene: `seed` plays no part."""
        damaged, clean = draw(index, self.seed, self.side) if self.drawn is None else self.drawn[index]
        return damaged, clean

    def held_out(self) -> Pairs:
        return Pairs(self.side, seed=1)

    def kept(self, folder: str | Path) -> Pairs:
        """All of them from folder/pairs-SIDE.npy, which is written if it is not there or is of another version of this world."""
        path = Path(folder) / f"pairs-{self.side}.npy"
        if path.exists():
            self.drawn = np.load(path, mmap_mode="r")
            if len(self.drawn) == self.n and all(np.array_equal(self.drawn[i], draw(i, self.seed, self.side)) for i in range(min(self.n, 16))):
                return self
        path.parent.mkdir(parents=True, exist_ok=True)
        with get_context("spawn").Pool() as pool:
            work = pool.imap(partial(draw, seed=self.seed, side=self.side), range(self.n), chunksize=64)
            pictures = np.stack(list(tqdm(work, total=self.n, desc=f"drawing {path}")))
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")              # another process may be at it too
        np.save(temporary, pictures)
        os.replace(temporary, path)
        self.drawn = pictures
        return self
