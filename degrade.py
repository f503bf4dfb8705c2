"""Eq. 13: the sixteen degradations of Robust-R1, in one file on numpy and OpenCV alone; copy it anywhere.

    X_d = D(X; {(tau_i, s_i)}),   s_i ~ U[0, 1]          tau: type, s: intensity

In Python:

    from degrade import degrade
    damaged = degrade(photo, [("lens blur", 0.4), ("noise", 0.2)], seed=7)

From the shell:

    python degrade.py photo.jpg --type "lens blur" 0.4 --type noise 0.2 --out damaged.png
    python degrade.py photos/ --out damaged/                  # folders 25, 50, 100 and labels.jsonl; run again to go on
    python degrade.py --gallery photo.jpg                     # all sixteen at five levels on one sheet
    python degrade.py --list

An image is an RGB uint8 array (H, W, 3), in and out. For every op: s = 0 returns the image bit for bit; the mean
difference from the clean image grows with s; lengths are shares of the short side, so that a photo looks equally
damaged at any size (noise and compression live at the pixel and are the exceptions); one seed fixes everything and no
global random state is read or written. Random quantities (places, angles, fields) do not depend on s: raising s at the
same seed deepens the same damage. Where the length or amount grows as a power of s, it is so that s = 0.1 can be seen.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np

BORDER = cv2.BORDER_REFLECT  # unlike REFLECT_101 it is defined for a side of one pixel


class Degradation(NamedTuple):
    """One damage: the paper's type tau and intensity s in [0, 1]."""

    type: str
    intensity: float


# ---------------------------------------------------------------- helpers


def _checked(op: Callable) -> Callable:
    """Check the arguments of an op and make s = 0 the exact identity."""

    @functools.wraps(op)
    def apply(image: np.ndarray, s: float, rng: np.random.Generator) -> np.ndarray:
        _check_image(image)
        _check_intensity(op.__name__, s)
        return image.copy() if s == 0 else op(np.ascontiguousarray(image), float(s), rng)

    return apply


def _check_image(image) -> None:
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image is a {type(image).__name__}; expected a uint8 RGB array of shape (H, W, 3)")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image has dtype {image.dtype} and shape {image.shape}; expected uint8 RGB, (H, W, 3)")


def _check_intensity(name: str, s) -> None:
    try:
        inside = 0 <= s <= 1  # NaN is not
    except (TypeError, ValueError):
        inside = False
    if not inside:
        raise ValueError(f"intensity of {name!r} is {s!r}; expected a number in [0, 1]")


def _small(image: np.ndarray, side: float) -> tuple[int, int]:
    """(width, height) of the image shrunk to a short side of `side` pixels; never enlarged."""
    h, w = image.shape[:2]
    scale = min(1.0, side / min(h, w))
    return max(1, round(w * scale)), max(1, round(h * scale))


def _smooth_field(shape: tuple[int, ...], cells: int, rng: np.random.Generator, channels: int) -> np.ndarray:
    """Smooth noise of unit variance at its knots, `cells` knots along the short side; (H, W, channels) float32."""
    h, w = shape[:2]
    knots = math.ceil(cells * max(h, w) / min(h, w)) + 1
    field = rng.standard_normal((knots, cells + 1, channels), dtype=np.float32)  # long side first: more only appends
    field = field if h > w else field.transpose(1, 0, 2)
    return cv2.resize(np.ascontiguousarray(field), (w, h), interpolation=cv2.INTER_CUBIC).reshape(h, w, channels)


def _gaussian_noise(shape: tuple[int, ...], rng: np.random.Generator, sigma: float, dtype: type) -> np.ndarray:
    """Gaussian noise from random bytes and the 256 quantiles of the normal law: several times numpy's speed."""
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)]) * sigma
    quantiles = np.rint(quantiles) if dtype is np.int16 else quantiles
    return cv2.LUT(np.frombuffer(rng.bytes(math.prod(shape)), np.uint8).reshape(shape), quantiles.astype(dtype))


# ---------------------------------------------------------------- acquisition


@_checked
def lens_blur(image, s, rng):
    """Defocus: every point becomes a disk. s: its radius, 3 % of the short side at 1, as s^0.7."""
    h, w = image.shape[:2]
    radius = 0.03 * s**0.7 * min(h, w)
    shrink = max(1.0, radius / 4)  # a wide disk is applied to a smaller picture: same result, far fewer products
    small = cv2.resize(image, _small(image, min(h, w) / shrink), interpolation=cv2.INTER_AREA)
    y, x = np.mgrid[-5:6, -5:6]
    disk = np.clip(radius / shrink + 1 - np.hypot(x, y), 0, 1)  # one pixel of soft edge: radius 0 is the identity
    small = cv2.filter2D(small, -1, disk / disk.sum(), borderType=BORDER)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_LINEAR)


@_checked
def lens_flare(image, s, rng):
    """A light shining into the lens: glow and veil round it, rays, and coloured ghosts mirrored through the centre,
    all added as light (screen blend). s: the strength of that light."""
    h, w = image.shape[:2]
    cols, rows = _small(image, 100)
    side = min(cols, rows)
    y, x = (np.arange(rows, dtype=np.float32)[:, None] / side, np.arange(cols, dtype=np.float32) / side)
    angle, turn = rng.uniform(0, 2 * math.pi, 2).tolist()
    middle = cols / side / 2, rows / side / 2
    source = middle[0] * (1 + 0.75 * math.cos(angle)), middle[1] * (1 + 0.75 * math.sin(angle))
    distance, direction = cv2.cartToPolar(*np.broadcast_arrays(x - source[0], y - source[1]))
    rays = np.cos(3 * (direction + turn)) ** 2
    rays = rays * rays * rays * rays
    glow = 6 * np.exp(-((distance / 0.07) ** 2)) + 0.4 * np.exp(-distance / 0.35) + 0.14
    glow += rays * rays * rays * np.exp(-distance / 0.2)
    light = glow[..., None] * np.array([1, 0.93, 0.8], np.float32)
    for place, size, *colour in rng.random((7, 5)).tolist():
        place, size = 0.3 + 1.9 * place, 0.03 + 0.1 * size
        at = [a + place * (m - a) for a, m in zip(source, middle)]
        left, top = (max(0, math.floor((a - size) * side)) for a in at)
        right, bottom = (max(0, math.ceil((a + size) * side)) for a in at)
        r = np.hypot(x[left:right] - at[0], y[top:bottom] - at[1]) / size
        ghost = np.clip((1 - r) * 12, 0, 1) * (0.4 + 0.6 * np.minimum(r, 1) ** 3)
        light[top:bottom, left:right] += ghost[..., None] * (0.03 + 0.22 * np.array(colour, np.float32))
    kept = cv2.resize(np.exp(-s * light), (w, h), interpolation=cv2.INTER_LINEAR)
    return cv2.bitwise_not(cv2.multiply(cv2.bitwise_not(image), kept, dtype=cv2.CV_8U))


@_checked
def motion_blur(image, s, rng):
    """The camera moves in a straight line during the exposure. s: the path's length, 8 % of the short side at 1, as
    s^0.7; the direction is random."""
    h, w = image.shape[:2]
    length = 0.08 * s**0.7 * min(h, w)
    angle = rng.uniform(0, math.pi)
    dx, dy = math.cos(angle), math.sin(angle)
    doublings = max(0, math.ceil(math.log2(length / 10)))  # a long line is two shifted copies of one half as long
    step = (length + 1) / 2**doublings  # a drawn line is one pixel longer than its path
    y, x = np.mgrid[-5:6, -5:6]
    along = np.clip(x * dx + y * dy, (1 - step) / 2, (step - 1) / 2)
    line = np.clip(1 - np.hypot(x - along * dx, y - along * dy), 0, 1)
    out = cv2.filter2D(image, -1, line / line.sum(), borderType=BORDER)
    for k in range(doublings):
        far = step * 2**k / 2
        moves = (np.array([[1, 0, d * dx], [0, 1, d * dy]]) for d in (far, -far))
        ahead, behind = (cv2.warpAffine(out, move, (w, h), borderMode=BORDER) for move in moves)
        out = cv2.addWeighted(ahead, 0.5, behind, 0.5, 0)
    return out


@_checked
def dirty_lens(image, s, rng):
    """Dust, drops and smears on the front glass, far out of focus: they take light away and scatter a dim brownish veil
    of the whole scene. s: how opaque the dirt is, as s^0.8."""
    h, w = image.shape[:2]
    cols, rows = _small(image, 120)
    side = min(cols, rows)
    dirt = np.zeros((rows, cols), np.uint8)
    for x, y, size, depth in rng.random((70, 4)).tolist():
        at, radius = (int(x * cols * 16), int(y * rows * 16)), side * (0.012 + 0.08 * size**3)
        cv2.circle(dirt, at, int(radius * 16), 120 + 130 * depth, -1, cv2.LINE_AA, 4)
    dirt = cv2.GaussianBlur(dirt, (0, 0), 0.012 * side + 0.3, borderType=BORDER)
    smear = np.clip(0.2 + 0.5 * _smooth_field((rows, cols), 4, rng, 1)[..., 0], 0, 0.6)
    opacity = cv2.merge([s**0.8 * np.maximum(dirt * np.float32(1 / 255), smear)] * 3)
    veil = cv2.resize(cv2.resize(image, (4, 4), interpolation=cv2.INTER_AREA), (cols, rows))
    veil = veil * np.float32([0.36, 0.33, 0.29]) + np.float32([22, 20, 16])
    kept, added = (cv2.resize(cv2.convertScaleAbs(a), (w, h)) for a in (255 - 255 * opacity, veil * opacity))
    return cv2.add(cv2.multiply(image, kept, scale=1 / 255), added)


@_checked
def saturation(image, s, rng):
    """Colour is lost: every pixel moves towards its own luma. s: the share of the way, grey at 1."""
    luma = np.array([0.299, 0.587, 0.114])
    return cv2.transform(image, (1 - s) * np.eye(3) + s * np.ones((3, 1)) * luma)


# ---------------------------------------------------------------- transmission


@_checked
def compression(image, s, rng):
    """Block transform coding as in JPEG: in each 8x8 block of Y, Cr and Cb every cosine coefficient but the mean loses
    up to a threshold that rises with frequency, so most become 0. s: the threshold, 60 grey levels at 1. (JPEG rounds
    up or down, and its error does not grow steadily with coarser steps; this one's does.)"""
    h, w = image.shape[:2]
    ycc = cv2.cvtColor(cv2.copyMakeBorder(image, 0, -h % 8, 0, -w % 8, BORDER), cv2.COLOR_RGB2YCrCb)
    k = np.arange(8)
    dct = np.cos((2 * k + 1) * k[:, None] * np.pi / 16) * np.where(k, 0.5, 0.125**0.5)[:, None]
    dct = dct.astype(np.float32)  # orthonormal: rows are the 8 cosines
    threshold = 60 * s**1.2 * (1 + 0.25 * (k[:, None] + k))
    threshold[0, 0] = 0  # a block keeps its mean
    coded = []
    for plane, coarse in zip(cv2.split(ycc), (1, 1.5, 1.5)):
        rows = (plane.reshape(-1, 8).astype(np.float32) @ dct.T).reshape(-1, 8, plane.shape[1])
        blocks = (dct @ rows).reshape(-1, 8, plane.shape[1] // 8, 8)  # block row, v, block column, u
        most = np.float32(coarse * threshold)[:, None]
        blocks -= np.clip(blocks, -most, most)
        rows = dct.T @ blocks.reshape(rows.shape)
        coded.append(cv2.convertScaleAbs(cv2.max((rows.reshape(-1, 8) @ dct).reshape(plane.shape), 0)))
    return cv2.cvtColor(cv2.merge(coded), cv2.COLOR_YCrCb2RGB)[:h, :w].copy()


@_checked
def block_change(image, s, rng):
    """Blocks arrive in the wrong place: pairs of blocks of 1/10 of the short side are exchanged.
    s: the share of blocks, up to 64 %."""
    h, w = image.shape[:2]
    side = max(1, round(min(h, w) / 10))
    cols = w // side
    blocks = rng.permutation(h // side * cols)
    out = image.copy()
    for k in range(math.ceil(0.32 * s * len(blocks)) if len(blocks) > 1 else 0):
        (ya, xa), (yb, xb) = (np.array(divmod(b, cols)) * side for b in blocks[2 * k : 2 * k + 2])
        out[ya : ya + side, xa : xa + side] = image[yb : yb + side, xb : xb + side]
        out[yb : yb + side, xb : xb + side] = image[ya : ya + side, xa : xa + side]
    return out


@_checked
def shifting(image, s, rng):
    """Lost line synchronisation: bands of rows slide sideways and wrap round. s: the share of bands that
    slide, up to 68 %, and how far, up to 20 % of the short side."""
    h, w = image.shape[:2]
    bands = 36
    edges = np.concatenate([[0], np.sort(rng.random(bands - 1)), [1]])
    turn = rng.permutation(bands) / bands
    reach = rng.uniform(0.4, 1, bands) * rng.choice([-1, 1], bands)
    out = image.copy()
    for k in np.flatnonzero(turn < 0.68 * s**0.85):
        top, bottom = round(edges[k] * h), round(edges[k + 1] * h)
        by = math.copysign(math.ceil(abs(reach[k]) * (0.12 + 0.08 * s) * min(h, w)), reach[k])
        out[top:bottom] = np.roll(image[top:bottom], int(by), axis=1)
    return out


@_checked
def scan_lines(image, s, rng):
    """A raster display or interlaced signal: 40 dark lines along the short side. s: their depth, up to 85 %."""
    h, w = image.shape[:2]
    period = max(2.0, min(h, w) / 40)
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (np.arange(h) / period + rng.random()))
    gain = np.repeat((1 - 0.85 * s * wave).astype(np.float32), 3 * w).reshape(h, w, 3)
    return cv2.multiply(image, gain, dtype=cv2.CV_8U)


# ---------------------------------------------------------------- environment


@_checked
def darkness(image, s, rng):
    """Too little light: exposure falls in linear light and the sensor's shot and read noise come up.
    s: the loss, up to 5 stops."""
    light = 2.0 ** (-5 * s) * (np.arange(256) / 255) ** 2.2
    spread = np.sqrt(light * 4e-4 + 4e-6) * s  # of the noise, in linear light
    level = 255 * light ** (1 / 2.2)
    noise = 255 * (light + spread) ** (1 / 2.2) - level
    grain = _gaussian_noise(image.shape, rng, 1, np.float32)
    grain = cv2.multiply(grain, cv2.LUT(image, noise.astype(np.float32)), dst=grain)
    return cv2.add(grain, cv2.LUT(image, level.astype(np.float32)), dtype=cv2.CV_8U)


@_checked
def atmospheric_turbulence(image, s, rng):
    """Hot air between camera and scene: each place is displaced by its own smooth random tilt, and slightly blurred.
    s: the tilt (deviation up to 1.8 % of the short side) and the blur."""
    h, w = image.shape[:2]
    side = s**0.6 * min(h, w)
    tilt = _smooth_field(image.shape, 14, rng, 2) * np.float32(0.018 * side)
    tilt[..., 0] += np.arange(w, dtype=np.float32)
    tilt[..., 1] += np.arange(h, dtype=np.float32)[:, None]
    blurred = cv2.GaussianBlur(image, (0, 0), 0.004 * side + 0.05, borderType=BORDER)
    return cv2.remap(blurred, tilt, None, cv2.INTER_LINEAR, borderMode=BORDER)


@_checked
def noise(image, s, rng):
    """Additive Gaussian noise, independent in every pixel and channel. s: its deviation, up to 60 grey levels."""
    return cv2.add(image, _gaussian_noise(image.shape, rng, 60 * s, np.int16), dtype=cv2.CV_8U)


@_checked
def color_diffusion(image, s, rng):
    """Colour bleeds while brightness stays sharp: Gaussian blur of the two chroma planes alone.
    s: its deviation, up to 12 % of the short side."""
    h, w = image.shape[:2]
    sigma = 0.12 * s * min(h, w)
    small = _small(image, min(h, w) / max(1.0, sigma / 2))
    luma, *chroma = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb))
    for k, plane in enumerate(chroma):
        plane = cv2.resize(plane, small, interpolation=cv2.INTER_AREA)
        plane = cv2.GaussianBlur(plane, (0, 0), min(sigma, 2), borderType=BORDER)
        chroma[k] = cv2.resize(plane, (w, h), interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(cv2.merge([luma, *chroma]), cv2.COLOR_YCrCb2RGB)


# ---------------------------------------------------------------- postprocessing


@_checked
def sharpness_change(image, s, rng):
    """Oversharpening: an unsharp mask of radius 0.6 % of the short side, with its halos. s: its amount, 6 at 1, as
    s^0.8."""
    soft = cv2.GaussianBlur(image, (0, 0), 0.006 * min(image.shape[:2]) + 0.2, borderType=BORDER)
    amount = 6 * s**0.8
    return cv2.addWeighted(image, 1 + amount, soft, -amount, 0)


@_checked
def graffiti(image, s, rng):
    """Somebody sprays over the picture: eight looping strokes of opaque paint, one after the other. s: how much of them
    is written; together about a quarter of the area."""
    h, w = image.shape[:2]
    side = min(h, w)
    out = image.copy()
    t = np.linspace(0, 1, 60)
    for k, draws in enumerate(rng.random((8, 16))):
        start, run, turn, size = draws[:8].reshape(4, 2, 1)
        loops, width, paint, order = draws[8], draws[9], draws[10:13], draws[13:].argsort()
        swing = np.cos(2 * np.pi * ((1 + 3 * loops) * t + turn))
        path = (0.15 + 0.7 * start) * [[w], [h]] + side * ((run - 0.5) * t + (0.05 + 0.11 * size) * swing)
        points = np.rint(16 * path.T[: math.ceil((8 * s - k) * len(t))]).astype(np.int32)[:, None]
        colour = (paint * [90, 255, 95] + [0, 0, 160])[order].tolist()  # one channel low, one high: vivid
        cv2.polylines(out, [points], False, colour, max(1, round((0.025 + 0.017 * width) * side)), cv2.LINE_AA, 4)
        if 8 * s <= k + 1:
            break
    return out


@_checked
def watermark_damage(image, s, rng):
    """A stock agency's mark, tiled aslant over the picture: light letters with a dark shadow. s: its opacity, 80 % at
    1."""
    h, w = image.shape[:2]
    side = min(h, w)
    word = ("SAMPLE", "PREVIEW", "STOCK", "PROOF", "COPY")[rng.integers(5)]
    angle, phase = rng.uniform(15, 45) * rng.choice([-1, 1]), rng.random(2)
    font, scale, thick = cv2.FONT_HERSHEY_DUPLEX, side / 200, max(1, round(side / 80))
    (tw, th), _ = cv2.getTextSize(word, font, scale, thick)
    tile = np.zeros((max(2, round(2.4 * th)), max(2, round(1.25 * tw))), np.uint8)
    cv2.putText(tile, word, (0, round(1.6 * th)), font, scale, 255, thick, cv2.LINE_AA)
    reach = math.hypot(w, h)
    sheet = np.tile(tile, [math.ceil(reach / n) + 1 for n in tile.shape])
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), angle, 1)
    turn[:, 2] += phase * tile.shape[::-1] + (reach - np.array([w, h])) / 2  # image point -> sheet point
    mark, shadow = (
        cv2.warpAffine(sheet, turn - back, (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        for back in (0, np.column_stack([np.zeros((2, 2)), turn[:, :2] @ [side / 150, side / 150]]))
    )
    mark, shadow = (cv2.convertScaleAbs(a, alpha=0.8 * s) for a in (mark, cv2.subtract(shadow, mark)))
    kept = cv2.cvtColor(cv2.bitwise_not(cv2.add(mark, shadow)), cv2.COLOR_GRAY2RGB)
    return cv2.add(cv2.multiply(image, kept, scale=1 / 255), cv2.cvtColor(mark, cv2.COLOR_GRAY2RGB))


# ---------------------------------------------------------------- the names

STAGES: dict[str, tuple[str, ...]] = {
    "acquisition": ("lens blur", "lens flare", "motion blur", "dirty lens", "saturation"),
    "transmission": ("compression", "block change", "shifting", "scan lines"),
    "environment": ("darkness", "atmospheric turbulence", "noise", "color diffusion"),
    "postprocessing": ("sharpness change", "graffiti", "watermark damage"),
}
DEGRADATIONS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    op.__name__.replace("_", " "): op
    for op in (
        *(lens_blur, lens_flare, motion_blur, dirty_lens, saturation),
        *(compression, block_change, shifting, scan_lines),
        *(darkness, atmospheric_turbulence, noise, color_diffusion),
        *(sharpness_change, graffiti, watermark_damage),
    )
}
ALIASES = {  # what the released data and other tools call them
    "jpeg compression": "compression", "jpeg": "compression", "block exchange": "block change",
    "mean shift": "shifting", "scan line": "scan lines", "dark illumination": "darkness", "gaussian noise": "noise",
    "turbulence": "atmospheric turbulence", "hsv saturation": "saturation", "colour diffusion": "color diffusion",
    "sharpness": "sharpness change", "watermark": "watermark damage", "defocus blur": "lens blur",
}  # fmt: skip


def canonical(name: str) -> str:
    """The paper's name, in lower case, for a known name or alias in any case, with spaces, hyphens or underscores.
    ValueError with the nearest known name otherwise."""
    plain = " ".join(str(name).lower().replace("_", " ").replace("-", " ").split())
    plain = ALIASES.get(plain, plain)
    if plain not in DEGRADATIONS:
        near = difflib.get_close_matches(plain[:40], [*DEGRADATIONS, *ALIASES], 1, 0)[0]
        near = ALIASES.get(near, near)
        raise ValueError(f"unknown degradation {str(name)[:40]!r}; nearest is {near!r}, all are {list(DEGRADATIONS)}")
    return plain


def degrade(image: np.ndarray, degradations: Iterable[tuple[str, float]], seed: int) -> np.ndarray:
    """Eq. 13: X_d = D(X). Applies (type, intensity) pairs to an RGB uint8 image (H, W, 3) in stage order, whatever
    their order in the list; returns a new array. Each op draws from a stream of its own, made from the seed and the op,
    so that adding one does not reshuffle another. ValueError for a wrong image, type, intensity or seed."""
    _check_image(image)
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}; expected an integer >= 0")
    order, todo = list(DEGRADATIONS), []
    for pair in degradations:
        try:
            name, s = pair
        except (TypeError, ValueError):
            raise ValueError(f"degradations hold {pair!r}; expected (type, s) pairs such as ('noise', 0.3)") from None
        name = canonical(name)
        _check_intensity(name, s)
        todo.append((order.index(name), float(s)))
    out, applied = image.copy(), []
    for index, s in sorted(todo):
        stream = np.random.SeedSequence(int(seed), spawn_key=(index, applied.count(index)))
        out = DEGRADATIONS[order[index]](out, s, np.random.default_rng(stream))
        applied.append(index)
    return out


def sample_degradations(rng: np.random.Generator, low: int = 1, high: int = 3) -> list[Degradation]:
    """Random distinct types, each from a random stage, with s ~ U[0, 1] rounded to two decimals; in stage order.
    Their number is uniform in [low, high]."""
    if not 0 <= low <= high <= len(DEGRADATIONS):
        raise ValueError(f"low = {low}, high = {high}; expected 0 <= low <= high <= {len(DEGRADATIONS)}")
    order = list(DEGRADATIONS)
    weights = [1 / len(STAGES) / len(names) for names in STAGES.values() for _ in names]
    picked = rng.choice(len(order), rng.integers(low, high + 1), replace=False, p=weights)
    return [Degradation(order[i], round(float(rng.random()), 2)) for i in sorted(picked)]


# ---------------------------------------------------------------- the command line

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def _read(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3); ValueError for a file that is not a whole image."""
    data = path.read_bytes()
    cut = data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") < len(data) // 2  # OpenCV fills a cut JPEG with grey
    image = None if cut or not data else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{path}: {'cut off' if cut else 'not an image that OpenCV can read'}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _write(path: Path, data: bytes) -> None:
    """To a temporary name first, so that a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _write_image(path: Path, image: np.ndarray) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: its name must end in one of {', '.join(sorted(SUFFIXES))}")
    _write(path, cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())


def _degrade_file(source: Path, out: Path, labels: list[dict]) -> str | None:
    """Write the degraded copies of one photo; the error as text, so that one broken photo does not stop the rest."""
    try:
        image = _read(source)
        for label in labels:
            pairs = [(d["type"], d["intensity"]) for d in label["degradations"]]
            _write_image(out / label["image"], degrade(image, pairs, label["seed"]))
    except (ValueError, OSError, cv2.error) as error:
        return str(error)
    return None


def _plan(folder: Path, out: Path, levels, types, seed: int) -> dict[Path, list[dict]]:
    """Photo -> its labels, one per level. A photo has the same types and seed at all levels; both come from `seed` and
    its path alone, so that one more photo in the folder changes nothing for the others."""
    plan, taken = {}, set()
    for photo in sorted(folder.rglob("*")):
        name = photo.relative_to(folder)
        if photo.suffix.lower() not in SUFFIXES or name.name.startswith("."):
            continue
        if out.resolve() in photo.resolve().parents:  # our own work of last time
            continue
        target = name.with_suffix(".png")
        target = name.with_name(name.name + ".png") if target in taken else target  # cat.jpg beside cat.png
        taken.add(target)
        own = int(np.random.SeedSequence([seed, zlib.crc32(name.as_posix().encode())]).generate_state(1)[0])
        chosen = types or [d.type for d in sample_degradations(np.random.default_rng(own))]
        plan[photo] = [
            {
                "image": f"{100 * level:g}/{target.as_posix()}",
                "clean_image": name.as_posix(),
                "degradations": [{"type": type_, "intensity": level} for type_ in chosen],
                "seed": own,
            }
            for level in levels
        ]
    return plan


def _degrade_folder(out: Path, plan: dict[Path, list[dict]]) -> int:
    """Write every planned copy that is not there yet, on all cores, and out/labels.jsonl; returns the exit status."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = lambda results, **_: results  # noqa: E731
    labels = {label["image"]: label for planned in plan.values() for label in planned}
    file = out / "labels.jsonl"
    if file.exists():
        before = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if any(labels.get(label["image"], label) != label for label in before):
            raise ValueError(f"{file} is of other photos, --seed or --types; choose another --out, or delete {out}")
        labels = {label["image"]: label for label in before} | labels

    def save() -> None:
        lines = (json.dumps(labels[image], ensure_ascii=False) + "\n" for image in sorted(labels))
        _write(file, "".join(lines).encode())

    save()  # before the work: should it be cut short, the next run knows what these files are
    todo = {}
    for photo, planned in plan.items():
        if missing := [label for label in planned if not (out / label["image"]).exists()]:
            todo[photo] = missing
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{len(plan)} photos, {len(plan) - len(todo)} of them done before, to {out} on {cores} cores")
    errors = []
    pool = ProcessPoolExecutor(cores, initializer=cv2.setNumThreads, initargs=(1,))
    try:
        results = pool.map(_degrade_file, todo, [out] * len(todo), todo.values())
        for error, missing in zip(tqdm(results, total=len(todo), unit="photo"), todo.values()):
            if error:
                errors.append(error)
                for label in missing:
                    del labels[label["image"]]
    finally:
        pool.shutdown(cancel_futures=True)
    save()
    for error in errors:
        print(f"skipped {error}", file=sys.stderr)
    return 1 if errors else 0


def gallery(image: np.ndarray, seed: int, levels=(0.1, 0.25, 0.5, 0.75, 1.0), width: int = 240) -> np.ndarray:
    """Contact sheet, one row per op and one column per level, of the photo shrunk to `width` pixels."""
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    def label(text: str, across: int, down: int) -> np.ndarray:
        field = np.full((down, across, 3), 255, np.uint8)
        return cv2.putText(field, text, (8, down // 2 + 5), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)

    rows = [np.hstack([label("", 200, 30)] + [label(f"s = {s:g}", width, 30) for s in levels])]
    for name in DEGRADATIONS:
        rows.append(np.hstack([label(name, 200, len(small))] + [degrade(small, [(name, s)], seed) for s in levels]))
    return np.vstack(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Degrade photos in the sixteen ways of Robust-R1, Eq. 13.",
        epilog="Names are the paper's (see --list); aliases, any case and underscores are understood. "
        "Exit status: 0 all done, 1 some photos of a folder are broken and were skipped, 2 nothing done.",
    )
    add = parser.add_argument
    add("input", nargs="?", type=Path, help="a photo, or a folder of photos, with those in its folders")
    add("--out", type=Path, help="file to write, or folder if the input is one (default: INPUT-degraded, here)")
    add("--seed", type=int, default=0, help="fixes everything random (default 0)")
    add("--type", nargs=2, action="append", metavar=("NAME", "S"), dest="pairs",
        help="for a photo: a degradation and its intensity in [0, 1]; repeat for more (default: drawn)")  # fmt: skip
    add("--types", nargs="+", metavar="NAME", default=[], help="for a folder: the degradations (default: drawn)")
    add("--levels", nargs="+", type=float, default=[0.25, 0.5, 1.0], metavar="S",
        help="for a folder: intensities, each with an output folder (default: 0.25 0.5 1)")  # fmt: skip
    add("--gallery", type=Path, metavar="PHOTO", help="draw a contact sheet: every op at five levels")
    add("--list", action="store_true", help="print the stages, and for each op what it models and what s means")
    args = parser.parse_args(argv)
    source = args.gallery or args.input
    if args.list:
        for stage, names in STAGES.items():
            print(stage, *(f"  {name:24}{' '.join(DEGRADATIONS[name].__doc__.split())}" for name in names), sep="\n")
        return 0
    if source is None:
        parser.error("give a photo, a folder, --gallery PHOTO or --list")
    folder = source.is_dir()
    if folder and (args.pairs or args.gallery) or args.types and not folder:
        parser.error("--types and --levels are for a folder; --type NAME S and --gallery for a photo")
    ending = "-degraded" if folder else "-gallery.png" if args.gallery else "-degraded.png"
    out = args.out or Path(source.resolve().stem + ending)
    try:
        if folder:
            for level in args.levels:
                _check_intensity("--levels", level)
            plan = _plan(source, out, args.levels, [canonical(name) for name in args.types], args.seed)
            if not plan:
                raise ValueError(f"{source} holds no photo; looked for {', '.join(sorted(SUFFIXES))}")
            return _degrade_folder(out, plan)
        image = _read(source)
        if args.gallery:
            _write_image(out, gallery(image, args.seed))
            print(out)
        else:
            drawn = sample_degradations(np.random.default_rng(args.seed))
            pairs = [Degradation(canonical(name), float(s)) for name, s in args.pairs or drawn]
            _write_image(out, degrade(image, pairs, args.seed))
            print(f"{out}: " + ", ".join(f"{name}({s:.2f})" for name, s in pairs))
    except (ValueError, OSError, cv2.error) as error:
        parser.exit(2, f"degrade.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on from here\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
