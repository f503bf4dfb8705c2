"""Damaged and clean pictures of the drawn world's scenes: what a restorer learns from (`rr1.recovery.Source`)."""
from __future__ import annotations

import numpy as np

from rr1.restorer import resize
from rr1.tiny import world


class Pairs:
    """The first n scenes of the drawn world `seed` (0: training, 1: held out), damaged at 112 x 112 as there, then shrunk."""

    def __init__(self, side: int, seed: int = 0, n: int = world.TRAIN):
        self.side, self.seed, self.n = side, seed, n

    def __len__(self) -> int:
        return self.n

    def pair(self, index: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The damage belongs to the scene: `seed` plays no part."""
        sample = world.sample(index, self.seed)
        return resize(sample.image, self.side, self.side), resize(sample.clean, self.side, self.side)

    def held_out(self) -> Pairs:
        return Pairs(self.side, seed=1)
