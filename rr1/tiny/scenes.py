"""Scenes of the drawn world and their pictures.

A scene is a textured ground with one to four coloured shapes, each in a quarter of its own, drawn
at 112 x 112 pixels (16 visual tokens). No two share a shape or a place; colours may repeat. The
colours stand on two ladders, so that what one looks like depends on the damage: white, grey and
black differ in brightness alone, and rust, slate and sage are red, blue and green with half of
their colour gone.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

SIDE = 112  # pixels; Qwen2.5-VL turns 28 x 28 of them into one token
COLORS = {
    "white": (244, 244, 244),
    "grey": (134, 134, 134),
    "black": (46, 46, 46),
    "red": (214, 44, 40),
    "blue": (40, 84, 214),
    "green": (30, 196, 70),
    "rust": (148, 72, 70),
    "slate": (65, 85, 143),
    "sage": (86, 160, 104),
    "yellow": (240, 208, 48),
}
BRIGHTNESS = ("white", "grey", "black")
# twice as frequent: dark or faded, they look like others
FICKLE = ("white", "grey", "red", "blue", "green")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# the reading order of captions
PLACES = ("top left", "top right", "bottom left", "bottom right")
GROUNDS = ("grass", "sand", "water", "brick")


class Thing(NamedTuple):
    shape: str
    color: str
    place: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape} {self.place}"


class Scene(NamedTuple):
    ground: str
    things: tuple[Thing, ...]  # in reading order


def sample_scene(rng: np.random.Generator) -> Scene:
    """One to four things with distinct shapes and places; a third of them repeat the colour of
    the one before."""
    n = int(rng.choice([1, 2, 3, 4], p=[0.1, 0.25, 0.35, 0.3]))
    shapes = rng.permutation(SHAPES)[:n]
    weights = np.array([2 if color in FICKLE else 1 for color in COLORS])
    colors = list(
        rng.choice(list(COLORS), size=n, replace=False, p=weights / weights.sum())
    )
    for i in range(1, n):
        if rng.random() < 1 / 3:
            colors[i] = colors[i - 1]
    places = sorted(rng.permutation(len(PLACES))[:n])
    things = []
    for shape, color, place in zip(shapes, colors, places, strict=True):
        things.append(Thing(str(shape), str(color), PLACES[place]))
    return Scene(str(rng.choice(GROUNDS)), tuple(things))


# ---------------------------------------------------------------- pictures

CORNERS = ((-1, -1), (1, -1), (1, 1), (-1, 1))
CROSS = (
    (-0.33, -0.95),
    (0.33, -0.95),
    (0.33, -0.33),
    (0.95, -0.33),
    (0.95, 0.33),
    (0.33, 0.33),
    (0.33, 0.95),
    (-0.33, 0.95),
    (-0.33, 0.33),
    (-0.95, 0.33),
    (-0.95, -0.33),
    (-0.33, -0.33),
)
# corners, and how far every other one is from the middle
ROUND = {
    "triangle": (3, 1),
    "star": (10, 0.42),
    "circle": (60, 1),
    "ring": (60, 1),
}
EDGE = (24, 24, 24)


def _ground(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """A textured ground, float32 (side, side, 3)."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    fine = rng.standard_normal((side, side), dtype=np.float32)
    phase = rng.uniform(0, 2 * np.pi)
    if kind == "grass":  # upright blades
        base = (96, 128, 72)
        texture = 26 * cv2.blur(fine, (1, 9)) * 3
    elif kind == "sand":  # speckle on soft dunes
        base = (206, 180, 132)
        dunes = np.sin(9 * y + 3 * x + phase)
        texture = 9 * fine + 8 * dunes
    elif kind == "water":  # level waves
        base = (88, 132, 160)
        swell = 1.5 * np.sin(7 * x + phase)
        waves = np.sin(44 * y + swell + phase)
        texture = 16 * waves + 3 * fine
    else:  # brick: courses with mortar between
        base = (158, 96, 78)
        row = np.floor(y * 9)
        level = y * 9 % 1 < 0.13
        upright = (x * 5 + 0.5 * (row % 2)) % 1 < 0.07
        texture = np.where(level | upright, 62, 5 * fine)
    return np.float32(base) + texture[..., None]


def _outline(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1 around (0, 0), float (n, 2)."""
    if shape == "square":
        return 0.8 * np.array(CORNERS, float)
    if shape == "cross":
        return np.array(CROSS)
    corners, inner = ROUND[shape]
    corner = np.arange(corners)
    angle = corner * 2 * np.pi / corners - np.pi / 2
    radius = np.where(corner % 2, inner, 1)
    x = np.cos(angle) * radius
    y = np.sin(angle) * radius
    return np.stack([x, y], 1)


def arrange(
    scene: Scene, rng: np.random.Generator, side: int = SIDE
) -> list[tuple[np.ndarray, float]]:
    """Where each thing stands: its centre (x, y) and radius in pixels, anywhere within its
    quarter."""
    spots = []
    for thing in scene.things:
        row, column = divmod(PLACES.index(thing.place), 2)
        radius = side * rng.uniform(0.15, 0.2)
        room = side / 4 - radius
        corner = np.array([column, row]) * side / 2
        center = corner + side / 4 + rng.uniform(-room, room, 2)
        spots.append((center, radius))
    return spots


def draw(
    scene: Scene, rng: np.random.Generator, side: int = SIDE, spots: list | None = None
) -> np.ndarray:
    """The picture of a scene: uint8 RGB (side, side, 3). Size, tilt and position of each shape
    vary."""
    spots = spots or arrange(scene, rng, side)
    big = 2 * side  # drawn at twice the size, then halved: smooth edges
    ground = _ground(scene.ground, side, rng)
    image = np.clip(ground, 0, 255).astype(np.uint8)
    image = cv2.resize(image, (big, big), interpolation=cv2.INTER_LINEAR)
    for thing, (center, radius) in zip(scene.things, spots, strict=True):
        tilt = rng.uniform(-0.3, 0.3)
        cos, sin = np.cos(tilt), np.sin(tilt)
        turn = np.array([[cos, sin], [-sin, cos]])
        outlines = [_outline(thing.shape) @ turn]
        if thing.shape == "ring":
            outlines.append(_outline("circle") * 0.52)
        contours = []
        for outline in outlines:
            corners = 2 * (outline * radius + center)
            contours.append(np.round(corners).astype(np.int32))
        shade = rng.uniform(0.92, 1.0)
        color = tuple(int(c * shade) for c in COLORS[thing.color])
        width = max(1, big // 100)
        cv2.fillPoly(image, contours, color)
        cv2.polylines(image, contours, True, EDGE, width, cv2.LINE_AA)
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
