"""Eq. 13: the sixteen degradations of Robust-R1, in one file on numpy and OpenCV alone; copy it anywhere.

    X_d = D(X; {(tau_i, s_i)}),   s_i ~ U[0, 1]          tau: type, s: intensity

    from degrade import degrade, Degradation
    damaged = degrade(photo, [Degradation("lens blur", 0.4), Degradation("noise", 0.2)], seed=7)

An image is an RGB uint8 array (H, W, 3), in and out. For every op: s = 0 returns the image bit for bit; the difference
from the clean image grows with s; lengths are shares of the short side, so that a photo looks equally damaged at any
size (noise and compression live at the pixel and are the exceptions); one seed fixes everything, with no global state.
Random quantities (places, angles, fields) do not depend on s: raising s at the same seed deepens the same damage.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable
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
        _check_intensity(op.__name__.replace("_", " "), s)
        return image.copy() if s == 0 else op(image, float(s), rng)

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


def _gaussian_noise(shape: tuple[int, ...], rng: np.random.Generator, sigma: float = 1.0) -> np.ndarray:
    """float32 Gaussian noise from random bytes and the 256 quantiles of the normal law: five times numpy's speed."""
    quantiles = [sigma * NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)]
    noise = np.frombuffer(rng.bytes(math.prod(shape)), np.uint8).reshape(shape)
    return cv2.LUT(noise, np.array(quantiles, np.float32))


# ---------------------------------------------------------------- acquisition


@_checked
def lens_blur(image, s, rng):
    """Defocus: every point becomes a disk. s: its radius, up to 3 % of the short side."""
    h, w = image.shape[:2]
    radius = 0.03 * s**0.7 * min(h, w)
    shrink = max(1.0, radius / 4)  # a wide disk is applied to a smaller picture: same result, far fewer products
    small = cv2.resize(image, _small(image, min(h, w) / shrink), interpolation=cv2.INTER_AREA)
    radius /= shrink
    y, x = np.mgrid[-5:6, -5:6]
    disk = np.clip(radius + 1 - np.hypot(x, y), 0, 1)  # one pixel of soft edge: radius 0 is the identity
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
    glow = 1.5 * np.exp(-((distance / 0.09) ** 2)) + 0.3 * np.exp(-distance / 0.35) + 0.14
    glow += 0.5 * rays * rays * rays * np.exp(-distance / 0.2)
    light = glow[..., None] * np.array([1, 0.93, 0.8], np.float32)
    for place, size, *colour in rng.random((7, 5)).tolist():
        place, size = 0.3 + 1.9 * place, 0.03 + 0.1 * size
        at = [a + place * (m - a) for a, m in zip(source, middle)]
        left, top = (max(0, math.floor((a - size) * side)) for a in at)
        right, bottom = (max(0, math.ceil((a + size) * side)) for a in at)
        r = np.hypot(x[left:right] - at[0], y[top:bottom] - at[1]) / size
        ghost = np.clip((1 - r) * 12, 0, 1) * (0.4 + 0.6 * np.minimum(r, 1) ** 3)
        light[top:bottom, left:right] += ghost[..., None] * (0.03 + 0.22 * np.array(colour, np.float32))
    kept = cv2.resize(1 - s * np.minimum(light, 1), (w, h), interpolation=cv2.INTER_LINEAR)
    return cv2.bitwise_not(cv2.multiply(cv2.bitwise_not(image), kept, dtype=cv2.CV_8U))


@_checked
def motion_blur(image, s, rng):
    """The camera moves in a straight line during the exposure. s: the path's length, up to 8 % of the short side."""
    h, w = image.shape[:2]
    length = 0.08 * s**0.7 * min(h, w)
    angle = rng.uniform(0, np.pi)
    dx, dy = math.cos(angle), math.sin(angle)
    copies = max(1, math.ceil(length / 8))  # a long line is the mean of shifted copies of a short one
    step = (length + 1) / copies  # a drawn line is one pixel longer than its path
    piece = step - 1
    y, x = np.mgrid[-5:6, -5:6]
    along = np.clip(x * dx + y * dy, -piece / 2, piece / 2)
    line = np.clip(1 - np.hypot(x - along * dx, y - along * dy), 0, 1)
    blurred = cv2.filter2D(image, -1, line / line.sum(), borderType=BORDER)
    if copies == 1:
        return blurred
    total = np.zeros(image.shape, np.float32)
    for far in (np.arange(copies) - (copies - 1) / 2) * step:
        moved = cv2.warpAffine(blurred, np.array([[1, 0, far * dx], [0, 1, far * dy]]), (w, h), borderMode=BORDER)
        cv2.accumulate(moved, total)
    return cv2.convertScaleAbs(total, alpha=1 / copies)


@_checked
def dirty_lens(image, s, rng):
    """Dust, drops and smears on the front glass, far out of focus: they take light away and scatter a grey veil.
    s: how opaque the dirt is."""
    h, w = image.shape[:2]
    cols, rows = _small(image, 120)
    side = min(cols, rows)
    dirt = np.zeros((rows, cols), np.uint8)
    for x, y, size, depth in rng.random((60, 4)).tolist():
        at, radius = (int(x * cols * 16), int(y * rows * 16)), side * (0.012 + 0.09 * size**3)
        cv2.circle(dirt, at, int(radius * 16), 110 + 130 * depth, -1, cv2.LINE_AA, 4)
    dirt = cv2.GaussianBlur(dirt, (0, 0), 0.012 * side + 0.3, borderType=BORDER)
    smear = np.clip(0.2 + 0.5 * _smooth_field((rows, cols), 4, rng, 1)[..., 0], 0, 0.6)
    opacity = s * np.maximum(dirt * np.float32(1 / 255), smear)
    veil = cv2.resize(cv2.resize(image, (4, 4), interpolation=cv2.INTER_AREA), (cols, rows))
    veil = veil * np.array([0.40, 0.37, 0.33], np.float32) + np.array([22, 20, 16], np.float32)
    added = cv2.resize(veil * opacity[..., None], (w, h), interpolation=cv2.INTER_LINEAR)
    kept = cv2.resize(cv2.merge([1 - opacity] * 3), (w, h), interpolation=cv2.INTER_LINEAR)
    return cv2.add(cv2.multiply(image, kept, dtype=cv2.CV_32F), added, dtype=cv2.CV_8U)


@_checked
def saturation(image, s, rng):
    """Colour is lost: every pixel moves towards its own luma. s: the share of the way, grey at 1."""
    luma = np.array([0.299, 0.587, 0.114])
    return cv2.transform(image, (1 - s) * np.eye(3) + s * np.ones((3, 1)) * luma)


# ---------------------------------------------------------------- transmission


@_checked
def compression(image, s, rng):
    """Block transform coding as in JPEG: in each 8x8 block of Y, Cr and Cb the cosine coefficients below a threshold,
    which rises with frequency, become 0, the others lose three quarters of it. s: the threshold, up to 80 grey levels. (JPEG
    rounds coefficients up or down, so its error does not grow steadily with coarser steps; this one does.)"""
    h, w = image.shape[:2]
    ycc = cv2.cvtColor(cv2.copyMakeBorder(image, 0, -h % 8, 0, -w % 8, BORDER), cv2.COLOR_RGB2YCrCb)
    k = np.arange(8)
    dct = np.cos((2 * k + 1) * k[:, None] * np.pi / 16) * np.where(k, 0.5, 0.125**0.5)[:, None]
    dct = dct.astype(np.float32)  # orthonormal: rows are the 8 cosines
    threshold = 80 * s**1.2 * (1 + 0.25 * (k[:, None] + k))
    threshold[0, 0] = 0  # a block keeps its mean
    coded = []
    for plane, coarse in zip(cv2.split(ycc), (1, 1.5, 1.5)):
        rows = (plane.reshape(-1, 8).astype(np.float32) @ dct.T).reshape(-1, 8, plane.shape[1])
        blocks = (dct @ rows).reshape(-1, 8, plane.shape[1] // 8, 8)  # block row, v, block column, u
        step = np.float32(coarse * threshold)[:, None]
        blocks = np.where(np.abs(blocks) >= step, blocks - np.copysign(0.75 * step, blocks), 0)
        rows = dct.T @ blocks.reshape(rows.shape)
        coded.append((rows.reshape(-1, 8) @ dct).reshape(plane.shape))
    ycc = cv2.max(cv2.merge(coded), 0)
    return cv2.cvtColor(cv2.convertScaleAbs(ycc), cv2.COLOR_YCrCb2RGB)[:h, :w].copy()


@_checked
def block_change(image, s, rng):
    """Blocks arrive in the wrong place: pairs of blocks of 1/14 of the short side are exchanged.
    s: the share of blocks, up to 60 %."""
    h, w = image.shape[:2]
    side = max(1, round(min(h, w) / 14))
    cols = w // side
    blocks = rng.permutation(h // side * cols)
    out = image.copy()
    for k in range(math.ceil(0.3 * s * len(blocks)) if len(blocks) > 1 else 0):
        (ya, xa), (yb, xb) = (np.array(divmod(b, cols)) * side for b in blocks[2 * k : 2 * k + 2])
        out[ya : ya + side, xa : xa + side] = image[yb : yb + side, xb : xb + side]
        out[yb : yb + side, xb : xb + side] = image[ya : ya + side, xa : xa + side]
    return out


@_checked
def shifting(image, s, rng):
    """Lost line synchronisation: bands of rows slide sideways and wrap round. s: the share of bands that slide,
    and how far, up to 20 % of the short side."""
    h, w = image.shape[:2]
    bands = 40
    edges = np.concatenate([[0], np.sort(rng.random(bands - 1)), [1]])
    turn = rng.permutation(bands) / bands
    reach = rng.uniform(0.4, 1, bands) * rng.choice([-1, 1], bands)
    out = image.copy()
    for k in np.flatnonzero(turn < s**0.7):
        top, bottom = round(edges[k] * h), round(edges[k + 1] * h)
        by = math.copysign(math.ceil(abs(reach[k]) * (0.06 + 0.14 * s) * min(h, w)), reach[k])
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
    grain = cv2.multiply(cv2.LUT(image, noise.astype(np.float32)), _gaussian_noise(image.shape, rng))
    return cv2.add(cv2.LUT(image, level.astype(np.float32)), grain, dtype=cv2.CV_8U)


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
    return cv2.add(image, _gaussian_noise(image.shape, rng, 60 * s), dtype=cv2.CV_8U)


@_checked
def color_diffusion(image, s, rng):
    """Colour bleeds while brightness stays sharp: Gaussian blur of the two chroma planes alone.
    s: its deviation, up to 12 % of the short side."""
    h, w = image.shape[:2]
    sigma = 0.12 * s * min(h, w)
    shrink = max(1.0, sigma / 2)
    ycc = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    chroma = cv2.resize(ycc[..., 1:], _small(image, min(h, w) / shrink), interpolation=cv2.INTER_AREA)
    chroma = cv2.GaussianBlur(chroma, (0, 0), sigma / shrink, borderType=BORDER)
    ycc[..., 1:] = cv2.resize(chroma, (w, h), interpolation=cv2.INTER_LINEAR).reshape(h, w, 2)
    return cv2.cvtColor(ycc, cv2.COLOR_YCrCb2RGB)


# ---------------------------------------------------------------- postprocessing


@_checked
def sharpness_change(image, s, rng):
    """Oversharpening: an unsharp mask of 0.6 % of the short side, with halos. s: its amount, up to 6."""
    soft = cv2.GaussianBlur(image, (0, 0), 0.006 * min(image.shape[:2]) + 0.2, borderType=BORDER)
    return cv2.addWeighted(image, 1 + 6 * s**0.8, soft, -6 * s**0.8, 0)


@_checked
def graffiti(image, s, rng):
    """Somebody sprays over the picture: looping strokes of opaque paint. s: how much of the tags is written, up to
    about 15 % of the area."""
    h, w = image.shape[:2]
    side = min(h, w)
    out = image.copy()
    t = np.linspace(0, 1, 80)
    strokes = 9
    for k in range(strokes):
        start, run = rng.random(2), rng.uniform(-0.5, 0.5, 2)
        loops, phase, size = rng.uniform(1, 4), rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.05, 0.16, 2)
        colour = np.array([rng.integers(0, 90), rng.integers(160, 256), rng.integers(0, 256)])[rng.permutation(3)]
        width = rng.uniform(0.018, 0.032)
        x = start[0] * w + side * (run[0] * t + size[0] * np.cos(2 * np.pi * loops * t + phase[0]))
        y = start[1] * h + side * (run[1] * t + size[1] * np.sin(2 * np.pi * loops * t + phase[1]))
        path = np.column_stack([x, y])[: math.ceil(np.clip(strokes * s - k, 0, 1) * len(t))]
        if len(path):
            points = np.rint(path * 16).astype(np.int32).reshape(-1, 1, 2)
            cv2.polylines(out, [points], False, colour.tolist(), max(1, round(width * side)), cv2.LINE_AA, 4)
    return out


@_checked
def watermark_damage(image, s, rng):
    """A stock agency's mark, tiled across the picture: light letters with a dark shadow. s: its opacity, up to 80 %."""
    h, w = image.shape[:2]
    side = min(h, w)
    word = ("SAMPLE", "PREVIEW", "STOCK", "PROOF", "COPY")[rng.integers(5)]
    angle, sx, sy = rng.uniform(15, 45) * rng.choice([-1, 1]), *rng.random(2)
    scale, thick = side / 300, max(1, round(side / 120))
    (tw, th), _ = cv2.getTextSize(word, cv2.FONT_HERSHEY_DUPLEX, scale, thick)
    tile = np.zeros((max(2, round(2.4 * th)), max(2, round(1.25 * tw))), np.uint8)
    cv2.putText(tile, word, (0, round(1.6 * th)), cv2.FONT_HERSHEY_DUPLEX, scale, 255, thick, cv2.LINE_AA)
    turn = cv2.getRotationMatrix2D((0, 0), angle, 1)
    turn[:, 2] = sx * tile.shape[1], sy * tile.shape[0]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    mark = cv2.warpAffine(tile, turn, (w, h), flags=flags, borderMode=cv2.BORDER_WRAP)
    turn[:, 2] -= turn[:, :2] @ [side / 150, side / 150]
    shadow = cv2.subtract(cv2.warpAffine(tile, turn, (w, h), flags=flags, borderMode=cv2.BORDER_WRAP), mark)
    mark, shadow = cv2.convertScaleAbs(mark, alpha=0.8 * s), cv2.convertScaleAbs(shadow, alpha=0.8 * s)
    kept = cv2.cvtColor(cv2.bitwise_not(cv2.add(mark, shadow)), cv2.COLOR_GRAY2RGB)  # mark and shadow do not overlap
    return cv2.add(cv2.multiply(image, kept, scale=1 / 255), cv2.cvtColor(mark, cv2.COLOR_GRAY2RGB))


# ---------------------------------------------------------------- the names

STAGES: dict[str, tuple[str, ...]] = {
    "acquisition": ("lens blur", "lens flare", "motion blur", "dirty lens", "saturation"),
    "transmission": ("compression", "block change", "shifting", "scan lines"),
    "environment": ("darkness", "atmospheric turbulence", "noise", "color diffusion"),
    "postprocessing": ("sharpness change", "graffiti", "watermark damage"),
}
DEGRADATIONS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    name: globals()[name.replace(" ", "_")] for names in STAGES.values() for name in names
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
        near = difflib.get_close_matches(plain, [*DEGRADATIONS, *ALIASES], 1, 0)[0]
        raise ValueError(f"unknown degradation {name!r}; did you mean {ALIASES.get(near, near)!r}? "
                         f"Known: {', '.join(DEGRADATIONS)}")  # fmt: skip
    return plain


def degrade(image: np.ndarray, degradations: Iterable[tuple[str, float]], seed: int) -> np.ndarray:
    """Eq. 13: X_d = D(X). Applies (type, intensity) pairs to an RGB uint8 (H, W, 3) image in stage order, whatever
    their order in the list; returns a new array. Each op draws from a stream of its own made from the seed and its
    name, so that adding one op does not reshuffle another. ValueError for a wrong image, type, intensity or seed."""
    _check_image(image)
    order = list(DEGRADATIONS)
    todo = sorted((order.index(canonical(name)), float(s)) for name, s in degradations)
    out = image.copy()
    for position, (index, s) in enumerate(todo):
        again = sum(earlier == index for earlier, _ in todo[:position])
        stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, again)))
        out = DEGRADATIONS[order[index]](out, s, stream)
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
