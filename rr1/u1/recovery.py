"""Robust-U1: pairs of a damaged and a clean picture to learn from, and how well the damage was undone.

    Photos          a Source of pairs; `tiny.pairs` is another
    load_source     one of them, from --data; load_pairs, held_out: batches
    measure         PSNR, SSIM, R_sem and LPIPS of each picture
    strip           damaged, recovered and clean pictures as one, to look at
"""
from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Protocol, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from degrade import SUFFIXES, degrade, sample_degradations
from rr1 import data, tiny
from rr1.u1 import image_rewards, restorer
from rr1.u1.image_rewards import Distance
from rr1.evaluation.statistics import bootstrap, paired_difference
from rr1.u1.pairs import resize
from rr1.u1.restorer import to_tensor, to_uint8
from rr1.evaluation.statistics import cell, interval, markdown

KEPT = 64                            # pairs of larger sides would make a file of more than a gigabyte: they are drawn when asked for
TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "r_sem": "R_sem", "lpips": "LPIPS (less is better)"}


class Source(Protocol):
    """Pairs number 0 .. len(source) - 1."""

    def __len__(self) -> int: ...

    def pair(self, index: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(damaged, clean), uint8 RGB (side, side, 3)."""

    def held_out(self) -> Source:
        """Pairs that no step trains on."""


class Photos:
    """Square crops of clean photos at random places and scales, shrunk to `side` and then damaged by one or two degradations."""

    def __init__(self, paths: Sequence[str | Path], side: int):
        self.paths, self.side = list(paths), side
        self.open = lru_cache(64)(lambda path: np.asarray(data.open_image(path)))

    def __len__(self) -> int:
        return len(self.paths)

    def pair(self, index: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Everything random follows from `seed`."""
        rng, photo = np.random.default_rng(seed), self.open(self.paths[index])
        h, w = photo.shape[:2]
        if min(h, w) < self.side:
            raise data.DataError(f"{self.paths[index]}: {w} x {h} pixels, smaller than --side {self.side}: leave it out, or give a smaller side")
        size = int(self.side * 2 ** rng.uniform(0, math.log2(min(h, w) / self.side)))
        top, left = (int(rng.integers(n - size + 1)) for n in (h, w))
        clean = resize(photo[top:top + size, left:left + size], self.side, self.side)
        return degrade(clean, sample_degradations(rng, low=1, high=2), seed=int(rng.integers(2**31))), clean

    def held_out(self) -> Photos:
        """The same photos: `held_out` below takes other seeds, so other crops."""
        return self


def load_source(path: str, images: str, side: int) -> Source:
    """--data: "" for the drawn world, a folder of clean photos, or a file of records with `clean_image`."""
    if not path:
        return tiny.pairs(side).kept(tiny.WORLD) if side <= KEPT else tiny.pairs(side)
    if Path(path).is_dir():
        paths = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise SystemExit(f"--data {path}: no photos in this folder; there are readers for {', '.join(sorted(SUFFIXES))}")
        return Photos(paths, side)
    records = data.read(path, images)
    lacking = [r["where"] for r in records if "clean_image" not in r]
    if lacking:
        raise SystemExit(f"{lacking[0]}: field clean_image is missing, which is what a restorer learns from ({len(lacking)} records in all)")
    return Photos(list(dict.fromkeys(r["clean_image"] for r in records)), side)


def load_pairs(source: Source, indices: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Damaged and clean pictures, (N, 3, side, side) each."""
    damaged, clean = zip(*(source.pair(i, seed) for i, seed in zip(indices, seeds)))
    return to_tensor(damaged), to_tensor(clean)


def held_out(source: Source, n: int) -> tuple[Tensor, Tensor]:
    """n pairs that no step trains on: of the drawn world its held-out scenes, of photos other crops of the first ones."""
    source = source.held_out()
    return load_pairs(source, [i % len(source) for i in range(n)], range(n))


def measure(pictures: Tensor, clean: Tensor, encoder: image_rewards.Encoder, lpips: Distance | None = None, batch: int = 64) -> dict[str, np.ndarray]:
    """PSNR in dB, SSIM, R_sem and, where given, LPIPS of each picture, (N,)."""
    functions = {"psnr": image_rewards.psnr, "ssim": image_rewards.ssim, "r_sem": lambda x, y: image_rewards.r_sem(x, y, encoder)}
    functions |= {"lpips": lpips} if lpips else {}
    pairs = list(zip(pictures.split(batch), clean.split(batch)))
    return {name: torch.cat([function(x, y) for x, y in pairs]).cpu().numpy() for name, function in functions.items()}


def strip(*rows: Tensor) -> bytes:
    """Rows of pictures (N, 3, H, W), one above the other, as a PNG; each pixel as a square where they are smaller than 64."""
    zoom = max(1, 64 // rows[0].shape[-1])
    lines = [np.concatenate(list(to_uint8(row)), 1) for row in rows]
    image = np.concatenate(lines)[..., ::-1].repeat(zoom, 0).repeat(zoom, 1)
    return cv2.imencode(".png", image)[1].tobytes()


def recover(model: restorer.Restorer, damaged: Tensor, steps: int = 40, seed: int = 0, shift: float = restorer.SHIFT) -> Tensor:
    """`restorer.restore` of pictures number 0, 1, .., each from noise of its own that depends on seed and number only."""
    return restorer.restore(model, damaged, steps, [data.seed_for(seed, i) for i in range(len(damaged))], shift=shift)


def report(scores: dict[str, dict[str, np.ndarray]], seed: int = 0) -> tuple[dict, str]:
    """{"damaged", "recovered": {measure: of each picture}} -> all estimates, and a table with 95 % intervals over pictures."""
    rows = {name: {m: bootstrap(values, seed=seed) for m, values in found.items()} for name, found in scores.items()}
    rows["recovered less damaged"] = {m: paired_difference((scores["recovered"][m], None), (scores["damaged"][m], None), seed) for m in scores["damaged"]}
    cells = lambda name, row: [interval(e._asdict()) if "less" in name else cell(e._asdict()) for e in row.values()]
    table = markdown(["", *(TITLES[m] for m in scores["damaged"])], [[name, *cells(name, row)] for name, row in rows.items()])
    thirds, parts = by_damage(scores["damaged"], scores["recovered"], {m: TITLES[m] for m in scores["damaged"]})
    n = len(scores["damaged"]["ssim"])
    return ({"n": n} | {name: {m: e._asdict() for m, e in row.items()} for name, row in rows.items()} | {"by_damage": thirds},
            f"{n} damaged pictures; **bold**: the interval is clear of 0\n\n{table}\n\nThe gain by how damaged they are:\n\n{parts}")


def by_damage(damaged: dict[str, np.ndarray], recovered: dict[str, np.ndarray], titles: dict[str, str], seed: int = 0) -> tuple[dict, str]:
    """The gain in each third of the pictures by the SSIM of the damaged one: {third: {measure: paired estimate}}, and a table that says of
    each third what it was before."""
    order, found = np.argsort(damaged["ssim"], kind="stable"), {}
    for name, chosen in zip(("most damaged third", "middle third", "least damaged third"), np.array_split(order, 3)):
        found[name] = {m: {"damaged": float(damaged[m][chosen].mean())}
                       | paired_difference((recovered[m][chosen], None), (damaged[m][chosen], None), seed)._asdict() for m in titles}
    return found, markdown(["", *(f"{title}: damaged, gain" for title in titles.values())],
                           [[name, *(f"{e['damaged']:.3f}, {interval(e)}" for e in row.values())] for name, row in found.items()])
