"""Eq. 13: the sixteen degradations of Robust-R1, on numpy and OpenCV alone; copy it anywhere.

    X_d = D(X; {(tau_i, s_i)}),   s_i ~ U[0, 1]          tau: type, s: intensity

In Python:

    from degrade import degrade
    damaged = degrade(photo, [("lens blur", 0.4), ("noise", 0.2)], seed=7)

From the shell:

    python degrade.py photo.jpg --type "lens blur" 0.4 --type noise 0.2 --out damaged.png
    python degrade.py photos/ --out damaged/     # folders 25, 50, 100 and labels.jsonl
    python degrade.py --gallery photo.jpg        # all sixteen at five levels on one sheet
    python degrade.py --list

An image is an RGB uint8 array (H, W, 3), in and out, of at most 32,000 pixels a side. For every op:

- s = 0 returns the image bit for bit, and (type, 0) in a list is as if it were not there;
- the mean difference from the clean image grows with s, as far as there is something to damage: a
  grey image has no colour to lose, and a flat one does not change where it is blurred or moved;
- raising s at the same seed deepens the same damage: what is random (places, angles, fields) does
  not depend on s. Powers of s are such that s = 0.1 can be seen;
- lengths are shares of the short side, so that a photo looks equally damaged at any size. Noise and
  compression live at the pixel and are the exceptions;
- one seed fixes every bit, with any number of threads and whatever vector instructions a processor
  has; another version of OpenCV may round a few pixels otherwise. No global random state is read or
  written.
"""

import argparse
import difflib
import functools
import json
import math
import numbers
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np

BORDER = cv2.BORDER_REFLECT  # unlike REFLECT_101 it is defined for a side of one pixel
LARGEST = 32000  # pixels a side: OpenCV keeps places in 16 bits
NORMAL_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])
# (11, 11): where a kernel's weights lie round its centre, as complex numbers x + i y.
PLACES = np.arange(-5, 6) + 1j * np.arange(-5, 6)[:, None]

STAGES = {  # in the order in which they are applied
    "acquisition": (
        "lens blur",
        "lens flare",
        "motion blur",
        "dirty lens",
        "saturation",
    ),
    "transmission": (
        "compression",
        "block change",
        "shifting",
        "scan lines",
    ),
    "environment": (
        "darkness",
        "atmospheric turbulence",
        "noise",
        "color diffusion",
    ),
    "postprocessing": (
        "sharpness change",
        "graffiti",
        "watermark damage",
    ),
}
# The paper's name -> op(image, s, rng) -> image. The ops below enter themselves, in that order.
DEGRADATIONS = {}


class Degradation(NamedTuple):
    """One damage: the paper's type tau and intensity s in [0, 1]."""

    type: str
    intensity: float


# ---------------------------------------------------------------- helpers


def _op(function):
    """Enter an op under its name, check its arguments, and make s = 0 the exact identity."""
    name = function.__name__.replace("_", " ")

    @functools.wraps(function)
    def checked(image, s, rng):
        _check_image(image)
        _check_intensity(name, s)
        if s == 0:
            return image.copy()
        return function(np.ascontiguousarray(image), float(s), rng)

    DEGRADATIONS[name] = checked
    return checked


def _check_image(image):
    dtype = getattr(image, "dtype", type(image).__name__)
    shape = getattr(image, "shape", ())
    is_rgb = shape[2:] == (3,) and 0 not in shape and max(shape) <= LARGEST
    if dtype != np.uint8 or not is_rgb:
        expected = f"expected uint8 RGB, (H, W, 3), with sides of 1 to {LARGEST}"
        raise ValueError(f"image is {dtype} {shape}; {expected}")


def _check_intensity(name, s):
    if not isinstance(s, numbers.Real) or not 0 <= s <= 1:  # NaN is not
        raise ValueError(f"intensity of {name!r} is {s!r}; expected a number in [0, 1]")


def _small_size(image, side):
    """(width, height) of the image shrunk to a short side of `side` pixels; never enlarged."""
    h, w = image.shape[:2]
    scale = min(1.0, side / min(h, w))
    return max(1, round(w * scale)), max(1, round(h * scale))


def _shrink(image, side):
    return cv2.resize(image, _small_size(image, side), interpolation=cv2.INTER_AREA)


def _enlarge(small, image):
    h, w = image.shape[:2]
    return cv2.resize(small, (w, h))


def _convolve(image, kernel):
    """With an 11x11 kernel, whose weights become whole numbers over an odd sum.

    So no result lies half-way between two grey levels, and every processor rounds alike.
    """
    kernel = np.rint(1000 * kernel / kernel.sum())
    kernel[5, 5] += (kernel.sum() + 1) % 2
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=BORDER)


def _smooth_field(h, w, cells, channels, rng):
    """(h, w, channels) float32: smooth noise, of unit variance at its knots.

    `cells` knots along the short side, one a pixel at most.
    """
    cells = min(cells, h, w)
    long_side = math.ceil(cells * max(h, w) / min(h, w)) + 1
    # The long side is drawn first, so that a longer picture only appends knots.
    field = rng.standard_normal((long_side, cells + 1, channels), dtype=np.float32)
    if h <= w:
        field = field.transpose(1, 0, 2)
    # With 64 bits, so that every processor gives the same 32.
    field = cv2.resize(np.float64(field), (w, h), interpolation=cv2.INTER_CUBIC)
    return np.float32(field).reshape(h, w, channels)


def _cover(image, kept, added):
    """image * kept / 255 + added; kept and added are first enlarged to the image's size."""
    kept = cv2.multiply(image, _enlarge(kept, image), scale=1 / 255)
    return cv2.add(kept, _enlarge(added, image))


def _random_bytes(shape, rng):
    """Uniform bytes; a table of NORMAL_QUANTILES makes them Gaussian, far faster than numpy."""
    return np.frombuffer(rng.bytes(math.prod(shape)), np.uint8).reshape(shape)


# ---------------------------------------------------------------- acquisition


@_op
def lens_blur(image, s, rng):
    """Defocus: every point becomes a disk. s: its radius, 3 % of the short side at 1, as s^0.7."""
    side = min(image.shape[:2])
    radius = 0.03 * s**0.7 * side
    # A wide disk is applied to a smaller picture: the same result for far fewer products.
    shrink = max(1.0, radius / 4)
    small = _shrink(image, side / shrink)
    # One pixel of soft edge, so that a disk of radius 0 is the identity.
    disk = np.clip(radius / shrink + 1 - np.abs(PLACES), 0, 1)
    return _enlarge(_convolve(small, disk), image)


@_op
def lens_flare(image, s, rng):
    """A light shining into the lens: glow, veil and rays, and ghosts mirrored through the centre.

    All added as light (screen blend). s: the strength of that light.
    """
    cols, rows = _small_size(image, 100)
    side = min(cols, rows)
    # Places are complex numbers, from the centre, in short sides.
    y, x = np.mgrid[:rows, :cols]
    place = (x - cols / 2 + 1j * (y - rows / 2)) / side  # (rows, cols)
    angle, turn = rng.uniform(0, 2 * math.pi, 2)
    source = 0.375 * (cols * math.cos(angle) + 1j * rows * math.sin(angle)) / side
    distance = np.abs(place - source)
    rays = np.cos(3 * (np.angle(place - source) + turn)) ** 24 * np.exp(-distance / 0.2)
    glow = 6 * np.exp(-((distance / 0.07) ** 2)) + 0.4 * np.exp(-distance / 0.35) + 0.14
    light = (glow + rays)[..., None] * [1, 0.93, 0.8]  # (rows, cols, 3)
    for along, size, *colour in rng.random((7, 5)):
        centre = (0.7 - 1.9 * along) * source
        r = np.minimum(np.abs(place - centre) / (0.03 + 0.1 * size), 1)
        ghost = np.minimum((1 - r) * 12, 1) * (0.4 + 0.6 * r**3)
        light += ghost[..., None] * (0.03 + 0.22 * np.array(colour))
    kept = cv2.convertScaleAbs(np.exp(-s * light), alpha=255)
    return _cover(image, kept, cv2.bitwise_not(kept))


@_op
def motion_blur(image, s, rng):
    """The camera moves in a straight line during the exposure, in a random direction.

    s: the path's length, 8 % of the short side at 1, as s^0.7.
    """
    h, w = image.shape[:2]
    length = 0.08 * s**0.7 * min(h, w)
    direction = np.exp(1j * rng.uniform(0, math.pi))
    # A long line is two shifted copies of one half as long.
    doublings = max(0, math.ceil(math.log2(length / 10)))
    step = (length + 1) / 2**doublings  # a drawn line is one pixel longer than its path
    along = np.clip((PLACES / direction).real, (1 - step) / 2, (step - 1) / 2)
    line = np.clip(1 - np.abs(PLACES - along * direction), 0, 1)
    out = _convolve(image, line)
    for k in range(doublings):
        far = step * 2**k / 2 * direction
        # In 1/32 of a pixel: every processor moves alike.
        move = np.rint([[32, 0, 32 * far.real], [0, 32, 32 * far.imag]]) / 32
        ahead = cv2.warpAffine(out, move, (w, h), borderMode=BORDER)
        behind = cv2.warpAffine(
            out, cv2.invertAffineTransform(move), (w, h), borderMode=BORDER
        )
        out = cv2.addWeighted(ahead, 0.5, behind, 0.5, 0)
    return out


@_op
def dirty_lens(image, s, rng):
    """Dust, drops and smears on the front glass, far out of focus.

    They take light away and scatter a dim brownish veil of the whole scene. s: how opaque the dirt
    is, as s^0.8.
    """
    cols, rows = _small_size(image, 120)
    side = min(cols, rows)
    dirt = np.zeros((rows, cols), np.uint8)
    for x, y, size, depth in rng.random((70, 4)).tolist():
        centre = int(x * cols * 16), int(y * rows * 16)  # in sixteenths of a pixel: 4 bits
        radius = int(side * (0.012 + 0.08 * size**3) * 16)
        cv2.circle(dirt, centre, radius, 120 + 130 * depth, -1, cv2.LINE_AA, 4)
    dirt = cv2.GaussianBlur(dirt, (0, 0), 0.012 * side + 0.3, borderType=BORDER)
    dirt = dirt[..., None] * np.float32(1 / 255)
    smear = np.clip(0.2 + 0.5 * _smooth_field(rows, cols, 4, 1, rng), 0, 0.6)
    opacity = np.repeat(s**0.8 * np.maximum(dirt, smear), 3, axis=2)  # (rows, cols, 3)
    veil = cv2.resize(image, (4, 4), interpolation=cv2.INTER_AREA)
    veil = cv2.resize(veil, (cols, rows)) * np.float32([0.36, 0.33, 0.29])
    veil += np.float32([22, 20, 16])
    kept = cv2.convertScaleAbs(255 - 255 * opacity)
    return _cover(image, kept, cv2.convertScaleAbs(veil * opacity))


@_op
def saturation(image, s, rng):
    """Colour is lost: every pixel moves to its own luma. s: the share of the way, grey at 1."""
    matrix = (1 - s) * np.eye(3) + s * np.array([0.299, 0.587, 0.114])
    return cv2.transform(image, matrix)


# ---------------------------------------------------------------- transmission


@_op
def compression(image, s, rng):
    """Block transform coding as in JPEG, with 8x8 blocks of Y, Cr and Cb.

    Every cosine coefficient but a block's mean loses up to a threshold that rises with frequency,
    so that most become 0. s: the threshold, 60 grey levels at 1. (JPEG rounds up or down, and its
    error does not grow steadily with coarser steps; this one's does.)
    """
    h, w = image.shape[:2]
    padded = cv2.copyMakeBorder(image, 0, -h % 8, 0, -w % 8, BORDER)
    planes = cv2.split(cv2.cvtColor(padded, cv2.COLOR_RGB2YCrCb))
    # (8, 8), orthonormal: row k is the cosine of frequency k.
    dct = cv2.dct(np.eye(8), flags=cv2.DCT_ROWS).T
    k = np.arange(8)
    threshold = 60 * s**1.2 * (1 + 0.25 * (k[:, None] + k))
    threshold[0, 0] = 0
    coded = []
    for plane, coarseness in zip(planes, (1, 1.5, 1.5)):
        height, width = plane.shape
        rows = plane.reshape(-1, 8) @ dct.T
        blocks = dct @ rows.reshape(-1, 8, width)
        # Block row, frequency down, block column, frequency across.
        blocks = blocks.reshape(-1, 8, width // 8, 8)
        most = coarseness * threshold[:, None]
        blocks -= np.clip(blocks, -most, most)
        rows = dct.T @ blocks.reshape(-1, 8, width)
        plane = (rows.reshape(-1, 8) @ dct).reshape(height, width)
        # What lies half-way between two grey levels goes up, however a processor sums.
        coded.append(cv2.convertScaleAbs(cv2.max(plane, 0), beta=0.001))
    return cv2.cvtColor(cv2.merge(coded), cv2.COLOR_YCrCb2RGB)[:h, :w].copy()


@_op
def block_change(image, s, rng):
    """Blocks arrive in the wrong place: pairs of them, 1/10 of the short side, are exchanged.

    s: the share of blocks, up to 64 %.
    """
    h, w = image.shape[:2]
    side = max(1, round(min(h, w) / 10))
    rows, cols = h // side, w // side
    order = rng.permutation(rows * cols)
    pairs = min(math.ceil(0.32 * s * len(order)), len(order) // 2)
    here = order[: 2 * pairs]
    there = here.reshape(pairs, 2)[:, ::-1].ravel()  # the other block of each pair
    out = image.copy()

    def blocks(of):
        # (rows, cols, side, side, 3), a view.
        return (
            of[: rows * side, : cols * side]
            .reshape(rows, side, cols, side, 3)
            .swapaxes(1, 2)
        )

    blocks(out)[here // cols, here % cols] = blocks(image)[there // cols, there % cols]
    return out


@_op
def shifting(image, s, rng):
    """Lost line synchronisation: bands of rows slide sideways and wrap round.

    s: the share of rows that have slid, up to 70 %, each by up to 20 % of the short side.
    """
    h, w = image.shape[:2]
    bands = 36
    edges = np.int64(np.rint(h * np.array([0, *np.sort(rng.random(bands - 1)), 1])))
    turn = rng.permutation(bands)
    reach = np.ceil(0.2 * min(h, w) * rng.uniform(0.4, 1, bands))  # in whole pixels
    reach = np.int64(reach * rng.choice([-1, 1], bands))
    left = math.ceil(0.7 * s**0.9 * h)  # of the rows that slide
    out = image.copy()
    for k in turn:
        band = slice(edges[k], min(edges[k + 1], edges[k] + left))
        out[band] = np.roll(image[band], reach[k], axis=1)
        left -= band.stop - band.start
    return out


@_op
def scan_lines(image, s, rng):
    """A raster display or interlaced signal: 40 dark lines along the short side.

    s: their depth, up to 85 %.
    """
    h, w = image.shape[:2]
    period = max(2.0, min(h, w) / 40)
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (np.arange(h) / period + rng.random()))
    gain = np.float32(1 - 0.85 * s * wave)  # (h,)
    gain = np.repeat(gain, 3 * w).reshape(h, w, 3)
    return cv2.multiply(image, gain, dtype=cv2.CV_8U)


# ---------------------------------------------------------------- environment


@_op
def darkness(image, s, rng):
    """Too little light: exposure falls in linear light, and shot and read noise come up.

    s: the loss, up to 5 stops.
    """
    light = 2.0 ** (-5 * s) * (np.arange(256) / 255) ** 2.2  # of each grey level
    deviation = s * np.sqrt(light * 4e-4 + 4e-6)  # of the noise, in linear light
    level = 255 * light ** (1 / 2.2)
    noise_level = 255 * (light + deviation) ** (1 / 2.2) - level
    grain = cv2.LUT(_random_bytes(image.shape, rng), np.float32(NORMAL_QUANTILES))
    grain = cv2.multiply(grain, cv2.LUT(image, np.float32(noise_level)), dst=grain)
    return cv2.add(grain, cv2.LUT(image, np.float32(level)), dtype=cv2.CV_8U)


@_op
def atmospheric_turbulence(image, s, rng):
    """Hot air between camera and scene: a smooth random tilt displaces each place, with some blur.

    s: the tilt (deviation up to 1.8 % of the short side) and the blur.
    """
    h, w = image.shape[:2]
    reach = s**0.6 * min(h, w)
    source = np.float32(0.018 * reach) * _smooth_field(h, w, 14, 2, rng)  # (h, w, 2): x, y
    source[..., 0] += np.arange(w)
    source[..., 1] += np.arange(h)[:, None]
    blurred = cv2.GaussianBlur(image, (0, 0), 0.004 * reach + 0.05, borderType=BORDER)
    source, fraction = cv2.convertMaps(source, None, cv2.CV_16SC2)
    return cv2.remap(blurred, source, fraction, cv2.INTER_LINEAR, borderMode=BORDER)


@_op
def noise(image, s, rng):
    """Gaussian noise, independent in every pixel and channel. s: its deviation, to 60 levels."""
    table = np.int16(np.rint(60 * s * NORMAL_QUANTILES))
    return cv2.add(image, cv2.LUT(_random_bytes(image.shape, rng), table), dtype=cv2.CV_8U)


@_op
def color_diffusion(image, s, rng):
    """Colour bleeds while brightness stays sharp: a Gaussian blur of the two chroma planes alone.

    s: its deviation, up to 12 % of the short side.
    """
    side = min(image.shape[:2])
    sigma = 0.12 * s * side
    planes = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    # A wide blur is applied to a smaller picture.
    chroma = _shrink(planes[..., 1:], side / max(1.0, sigma / 2))
    chroma = cv2.GaussianBlur(chroma, (0, 0), min(sigma, 2), borderType=BORDER)
    planes[..., 1:] = _enlarge(chroma, image)
    return cv2.cvtColor(planes, cv2.COLOR_YCrCb2RGB)


# ---------------------------------------------------------------- postprocessing


@_op
def sharpness_change(image, s, rng):
    """Oversharpening: an unsharp mask of radius 0.6 % of the short side, with its halos.

    s: its amount, 6 at 1, as s^0.8.
    """
    sigma = 0.006 * min(image.shape[:2]) + 0.2
    soft = cv2.GaussianBlur(image, (0, 0), sigma, borderType=BORDER)
    amount = 6 * s**0.8
    return cv2.addWeighted(image, 1 + amount, soft, -amount, 0)


@_op
def graffiti(image, s, rng):
    """Somebody sprays over the picture: eight looping strokes of opaque paint.

    s: how much of them is written; together about a quarter of the area.
    """
    h, w = image.shape[:2]
    side = min(h, w)
    out = image.copy()
    t = np.linspace(0, 1, 60)
    strokes = rng.random((8, 16))
    # The first stroke lies on top: what comes later never covers what was there.
    for k in reversed(range(math.ceil(8 * s))):
        start, run, turn, size = strokes[k, :8].reshape(4, 2, 1)
        loops, width = strokes[k, 8:10]
        swing = np.cos(2 * np.pi * ((1 + 3 * loops) * t + turn))
        path = side * ((run - 0.5) * t + (0.05 + 0.11 * size) * swing)
        path += (0.15 + 0.7 * start) * [[w], [h]]  # (2, 60): x, y
        written = path.T[: math.ceil((8 * s - k) * 60)]
        points = np.int32(np.rint(16 * written))  # in sixteenths of a pixel: 4 bits
        # one channel low, one high: vivid
        colour = strokes[k, 10:13] * [90, 255, 95] + [0, 0, 160]
        colour = colour[strokes[k, 13:].argsort()]
        thickness = max(1, round((0.025 + 0.017 * width) * side))
        cv2.polylines(out, [points], False, colour.tolist(), thickness, cv2.LINE_AA, 4)
    return out


@_op
def watermark_damage(image, s, rng):
    """A stock agency's mark, tiled aslant over the picture: light letters with a dark shadow.

    s: its opacity, 80 % at 1.
    """
    h, w = image.shape[:2]
    side = min(h, w)
    word = ("SAMPLE", "PREVIEW", "STOCK", "PROOF", "COPY")[rng.integers(5)]
    turn = np.exp(1j * rng.uniform(0.26, 0.79) * rng.choice([-1, 1]))  # 15 to 45 degrees
    cols, rows = math.ceil(side * len(word) / 8), math.ceil(0.31 * side)
    tile = np.zeros((rows, cols), np.uint8)
    start, font = (0, round(0.22 * side)), cv2.FONT_HERSHEY_DUPLEX
    thickness = max(1, round(side / 80))
    cv2.putText(tile, word, start, font, side / 200, 255, thickness, cv2.LINE_AA)
    drop = math.ceil(side / 160)  # of the shadow, to the right and down
    # Where each pixel lies in the tile or the one beside it: sums of a part of its x and its y.
    of_x = np.arange(-drop, w) * turn + complex(*rng.random(2) * [cols, rows])
    of_y = np.arange(-drop, h)[:, None] * turn * 1j
    tile_x = np.float32(of_x.real % cols - cols) + np.float32(of_y.real % cols)
    tile_y = np.float32(of_x.imag % rows - rows) + np.float32(of_y.imag % rows)
    place, fraction = cv2.convertMaps(tile_x, tile_y, cv2.CV_16SC2)
    marks = cv2.remap(tile, place, fraction, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    marks = cv2.convertScaleAbs(marks, alpha=0.8 * s)
    marks = cv2.cvtColor(marks, cv2.COLOR_GRAY2RGB)
    mark, shadow = marks[drop:, drop:], marks[:-drop, :-drop]
    return _cover(image, cv2.bitwise_not(cv2.max(mark, shadow)), mark)


# ---------------------------------------------------------------- the names

ALIASES = {  # what the released data and other tools call them
    "jpeg compression": "compression",
    "jpeg": "compression",
    "block exchange": "block change",
    "mean shift": "shifting",
    "scan line": "scan lines",
    "dark illumination": "darkness",
    "gaussian noise": "noise",
    "turbulence": "atmospheric turbulence",
    "hsv saturation": "saturation",
    "colour diffusion": "color diffusion",
    "sharpness": "sharpness change",
    "watermark": "watermark damage",
    "defocus blur": "lens blur",
}


def canonical(name: str) -> str:
    """The paper's name, in lower case, for a known name or alias.

    Any case, and spaces, hyphens or underscores. ValueError with the nearest known name otherwise.
    """
    plain = " ".join(str(name).lower().replace("_", " ").replace("-", " ").split())
    plain = ALIASES.get(plain, plain)
    if plain not in DEGRADATIONS:
        near = difflib.get_close_matches(
            plain[:40], [*DEGRADATIONS, *ALIASES], 1, cutoff=0
        )[0]
        known = f"nearest is {ALIASES.get(near, near)!r}, all are {list(DEGRADATIONS)}"
        raise ValueError(f"unknown degradation {str(name)[:40]!r}; {known}")
    return plain


def degrade(
    image: np.ndarray, degradations: list[tuple[str, float]], seed: int
) -> np.ndarray:
    """Eq. 13: X_d = D(X), a new array.

    Applies (type, intensity) pairs to an RGB uint8 image (H, W, 3) in stage order, whatever their
    order in the list. Each op draws from a stream of its own, made from the seed and the op, so
    that adding one does not reshuffle another. ValueError for a wrong image, type, intensity or
    seed.
    """
    _check_image(image)
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"seed is {seed!r}; expected an integer >= 0")
    strengths = {name: [] for name in DEGRADATIONS}
    for pair in degradations:
        try:
            name, s = pair
        except (TypeError, ValueError):
            raise ValueError(
                f"degradations hold {pair!r}; expected (type, s) pairs"
            ) from None
        name = canonical(name)
        _check_intensity(name, s)
        if s > 0:
            strengths[name].append(s)
    out = image.copy()
    for index, (name, op) in enumerate(DEGRADATIONS.items()):
        for repeat, s in enumerate(sorted(strengths[name])):
            stream = np.random.SeedSequence(seed, spawn_key=(index, repeat))
            out = op(out, s, np.random.default_rng(stream))
    return out


def sample_degradations(rng, low: int = 1, high: int = 3) -> list[Degradation]:
    """Random distinct types, each from a random stage, with s ~ U[0, 1] to two decimals.

    In stage order; their number is uniform in [low, high].
    """
    order = list(DEGRADATIONS)
    if not 0 <= low <= high <= len(order):
        raise ValueError(
            f"low = {low}, high = {high}; expected 0 <= low <= high <= {len(order)}"
        )
    shares = [0.25 / len(names) for names in STAGES.values() for _ in names]
    picked = rng.choice(len(order), rng.integers(low, high + 1), replace=False, p=shares)
    return [Degradation(order[i], round(float(rng.random()), 2)) for i in sorted(picked)]


# ---------------------------------------------------------------- files

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
ENDINGS = ", ".join(sorted(SUFFIXES))


def _is_cut_jpeg(data):
    """Whether a JPEG ends before its end-of-image marker; OpenCV fills the rest with grey."""
    at = 2
    while at < len(data) and data[at : at + 2] != b"\xff\xda":
        # past the segments before the first scan
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[at:]


def _read(path):
    """RGB uint8 (H, W, 3); ValueError for a file that is not a whole image."""
    data = path.read_bytes()
    if not data or _is_cut_jpeg(data):
        raise ValueError(f"{path}: cut off")
    data = np.frombuffer(data, np.uint8)
    # turned as EXIF says; of 16 bits the upper 8
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if image is None:
        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
        if image is None:
            raise ValueError(f"{path}: not an image that OpenCV can read")
        # Floats, from the smallest range that holds them.
        largest = next(top for top in (1, 255, 65535, np.inf) if not image.max() > top)
        image = cv2.convertScaleAbs(image.clip(0), alpha=255 / largest)
        if image.ndim == 2:
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return image[..., 2::-1]  # from BGR, or BGR and alpha


def _write(path, data):
    """To a temporary name first, so that a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _write_image(path, image):
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: its name must end in one of {ENDINGS}")
    _write(path, cv2.imencode(path.suffix, image[..., ::-1])[1].tobytes())


# ---------------------------------------------------------------- a folder


def _plan(folder, out, levels, types, seed):
    """The labels of all copies, one a photo and level, by the copy's name.

    A photo has the same types and seed at all levels. Both come from `seed` and its path alone, and
    its copies are named after its whole name: one more photo changes nothing for the others.
    """
    for level in levels:
        _check_intensity("--levels", level)
    plan = {}
    for photo in sorted(folder.rglob("[!.]*")):
        is_photo = photo.suffix.lower() in SUFFIXES and photo.is_file()
        is_our_copy = out.resolve() in photo.resolve().parents
        if not is_photo or is_our_copy:
            continue
        name = photo.relative_to(folder).as_posix()
        entropy = [seed, zlib.crc32(os.fsencode(name))]
        photo_seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        drawn = sample_degradations(np.random.default_rng(photo_seed))
        chosen = types or [d.type for d in drawn]
        content_hash = zlib.crc32(photo.read_bytes())
        for level in levels:
            image = f"{100 * level:g}/{name}.png"
            if image in plan:
                raise ValueError(f"--levels {levels}: two of them fall into one folder")
            plan[image] = {
                "image": image,
                "clean_image": name,
                "clean_crc32": content_hash,
                "degradations": [{"type": type_, "intensity": level} for type_ in chosen],
                "seed": photo_seed,
            }
    if not plan:
        raise ValueError(f"{folder} holds no photo; looked for {ENDINGS}")
    return plan


def _read_labels(file):
    """Those of an earlier run, by the copy's name."""
    lines = file.read_text().splitlines() if file.exists() else []
    try:
        return {label["image"]: label for label in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: a line is no label ({error}); delete the line") from None


def _degrade_folder(folder, out, plan):
    """Write every planned copy that is not there yet, and out/labels.jsonl; the exit status."""
    file = out / "labels.jsonl"
    labels = _read_labels(file)
    todo = []
    for image, label in plan.items():
        before = labels.get(image, label)
        if before | {"clean_crc32": label["clean_crc32"]} != label:
            raise ValueError(
                f"{file} is of another --seed or --types; choose another --out"
            )
        if before != label:
            print(
                f"{label['clean_image']} was replaced; {image} is made again",
                file=sys.stderr,
            )
        if labels.get(image) != label or not (out / image).exists():
            todo.append(label)
    print(f"{len(plan)} copies to {out}, {len(plan) - len(todo)} of them there")
    for image, label in labels.items():
        if not (folder / label["clean_image"]).exists():
            print(
                f"{label['clean_image']} is gone; {image} and its label stay",
                file=sys.stderr,
            )

    def work(label):
        """Write a copy; an error as text, so that a broken photo does not stop the rest."""
        try:
            pairs = [d.values() for d in label["degradations"]]
            copy = degrade(_read(folder / label["clean_image"]), pairs, label["seed"])
            _write_image(out / label["image"], copy)
            labels[label["image"]] = label
        except (ValueError, OSError, cv2.error) as error:
            return f"skipped {error}\n"

    cv2.setNumThreads(1)  # the photos are what is done in parallel
    pool = ThreadPoolExecutor()
    try:
        errors = set(pool.map(work, todo)) - {None}
    finally:
        pool.shutdown(cancel_futures=True)
        lines = [json.dumps(labels[image]) + "\n" for image in sorted(labels)]
        _write(file, "".join(lines).encode())
    sys.stderr.writelines(sorted(errors))
    return 1 if errors else 0


# ---------------------------------------------------------------- the command line


def gallery(image, seed):
    """Contact sheet: a row per op, at s = 0.1, 0.25, 0.5, 0.75 and 1."""
    small = _shrink(image, 160)
    rows = []
    for name in DEGRADATIONS:
        row = np.hstack(
            [degrade(small, [(name, s)], seed) for s in (0.1, 0.25, 0.5, 0.75, 1)]
        )
        row = cv2.copyMakeBorder(row, 30, 0, 0, 0, cv2.BORDER_CONSTANT, value=[255] * 3)
        rows.append(cv2.putText(row, name, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 0))
    return np.vstack(rows)


def _parser():
    parser = argparse.ArgumentParser(
        description="Degrade photos in the sixteen ways of Robust-R1, Eq. 13.",
        epilog="Names are the paper's (see --list); aliases, any case and underscores are "
        "understood. A photo is turned as its EXIF data say; 16 bits (the upper 8 are kept) and "
        "floats are scaled to 8 bits; transparency, colour profile, metadata and all frames but "
        "the first are dropped. "
        "Exit status: 0 all done, 1 broken photos of a folder were skipped, 2 nothing done.",
    )
    add = parser.add_argument
    add(
        "input",
        nargs="?",
        type=Path,
        help=f"a photo, or a folder with photos, at any depth: {ENDINGS}",
    )
    add(
        "--out",
        type=Path,
        help="file or folder to write (default: INPUT-degraded, here)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="fixes everything random (default 0)",
    )
    add(
        "--type",
        nargs=2,
        action="append",
        metavar=("NAME", "S"),
        help="for a photo: a degradation and its intensity; repeat for more (default: drawn)",
    )
    add(
        "--gallery",
        action="store_true",
        help="for a photo: a sheet of all sixteen at five levels",
    )
    add(
        "--types",
        nargs="+",
        help="for a folder: the degradations (default: drawn for each photo)",
    )
    add(
        "--levels",
        nargs="+",
        type=float,
        help="for a folder: intensities, a folder each (default: 0.25 0.5 1)",
    )
    add(
        "--list",
        action="store_true",
        help="print the stages, and for each op what it models and what s means",
    )
    return parser


def _run(source, args):
    is_folder = source.is_dir()
    wrong = (args.type or args.gallery) if is_folder else (args.types or args.levels)
    if wrong:
        raise ValueError(
            "--type NAME S and --gallery are for a photo, --types and --levels for a folder"
        )
    out = args.out or Path(
        source.resolve().stem + ("-degraded" if is_folder else "-degraded.png")
    )
    if is_folder:
        types = [canonical(name) for name in args.types or ()]
        levels = args.levels or [0.25, 0.5, 1.0]
        return _degrade_folder(source, out, _plan(source, out, levels, types, args.seed))
    image = _read(source)
    if args.gallery:
        image, done = gallery(image, args.seed), "all sixteen"
    else:
        pairs = args.type or sample_degradations(np.random.default_rng(args.seed))
        pairs = [(canonical(name), float(s)) for name, s in pairs]
        image = degrade(image, pairs, args.seed)
        done = ", ".join(f"{name}({s:.2f})" for name, s in pairs)
    _write_image(out, image)
    print(f"{out}: {done}")
    return 0


def main(argv=None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.list:
        for stage, names in STAGES.items():
            print(stage)
            for name in names:
                print(f"  {name:24}{' '.join(DEGRADATIONS[name].__doc__.split())}")
        return 0
    if args.input is None:
        parser.error("give a photo, a folder or --list")
    try:
        return _run(args.input, args)
    except (ValueError, OSError, cv2.error) as error:
        parser.exit(2, f"degrade.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on from here\n")


if __name__ == "__main__":
    sys.exit(main())
