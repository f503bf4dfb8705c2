"""The drawn world: scenes, questions and true chains for a laptop with nothing downloaded.

A scene is a textured ground with one to three coloured shapes, each in a quarter of its own, drawn at 112 x 112 pixels
(16 visual tokens). Everything follows from a seed. No two shapes of a scene share a shape, a colour or a place, so every
question has one right answer, and a caption names the shapes in one fixed reading order, so it has one right form.

    python -m rr1.tiny.world --out runs/tiny-world        # writes train.jsonl, test.jsonl and the images
"""
from __future__ import annotations

import argparse
import json
import os
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from degrade import Degradation, degrade, sample_degradations
from rr1.chain import Chain, build_question, render

SIDE = 112                                                       # pixels; Qwen2.5-VL turns 28 x 28 of them into one token
COLORS = {"red": (214, 44, 40), "green": (30, 196, 70), "blue": (40, 84, 214), "yellow": (240, 208, 48),
          "purple": (142, 52, 176), "white": (242, 242, 242)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = ("top left", "top right", "bottom left", "bottom right")    # the reading order of captions
GROUNDS = ("grass", "sand", "water", "brick")
COUNTS = ("one", "two", "three", "four")                         # four never happens: it is there to be a wrong choice
TRAIN, TEST = 24576, 1024                                        # records in the written data set


class Thing(NamedTuple):
    shape: str
    color: str
    place: str

    def __str__(self) -> str:
        return f"a {self.color} {self.shape} {self.place}"


class Scene(NamedTuple):
    ground: str
    things: tuple[Thing, ...]


class Question(NamedTuple):
    kind: str                                                    # "color", "shape", "place", "count", "ground", "caption"
    text: str
    answer: str
    statement: str                                               # the answer as a sentence: the chain's conclusion
    options: tuple[str, ...]                                     # what a choice question draws its wrong choices from


# ---------------------------------------------------------------- scenes and pictures

def sample_scene(rng: np.random.Generator) -> Scene:
    """One to three things with distinct shapes, colours and places, in reading order."""
    n = int(rng.integers(1, 4))
    shapes, colors = rng.permutation(SHAPES)[:n], rng.permutation(list(COLORS))[:n]
    places = sorted(rng.permutation(len(PLACES))[:n])
    things = tuple(Thing(str(s), str(c), PLACES[p]) for s, c, p in zip(shapes, colors, places))
    return Scene(GROUNDS[rng.integers(len(GROUNDS))], things)


def _ground(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """A textured ground, float32 (side, side, 3)."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    fine = rng.standard_normal((side, side), dtype=np.float32)
    phase = rng.uniform(0, 2 * np.pi)
    if kind == "grass":                                          # upright blades
        base, texture = (96, 128, 72), 26 * cv2.blur(fine, (1, 9)) * 3
    elif kind == "sand":                                         # speckle on soft dunes
        base, texture = (206, 180, 132), 9 * fine + 8 * np.sin(9 * y + 3 * x + phase)
    elif kind == "water":                                        # level waves
        base, texture = (88, 132, 160), 16 * np.sin(44 * y + 1.5 * np.sin(7 * x + phase) + phase) + 3 * fine
    else:                                                        # brick: courses with mortar between
        row = np.floor(y * 9)
        mortar = (y * 9 % 1 < 0.13) | ((x * 5 + 0.5 * (row % 2)) % 1 < 0.07)
        base, texture = (158, 96, 78), np.where(mortar, 62, 5 * fine)
    return np.float32(base) + texture[..., None]


def _outline(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1 around (0, 0), float (n, 2)."""
    if shape == "square":
        return np.array([(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)])
    if shape == "cross":
        a, b = .95, .33
        return np.array([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)])
    corners, inner = {"triangle": (3, 1), "star": (10, .42), "circle": (60, 1), "ring": (60, 1)}[shape]
    angle = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    radius = np.where(np.arange(corners) % 2, inner, 1)
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], 1)


def arrange(scene: Scene, rng: np.random.Generator, side: int = SIDE) -> list[tuple[np.ndarray, float]]:
    """Where each thing stands: its centre (x, y) and radius in pixels, anywhere within its quarter."""
    spots = []
    for thing in scene.things:
        row, column = divmod(PLACES.index(thing.place), 2)
        radius = side * rng.uniform(0.15, 0.2)
        room = side / 4 - radius
        spots.append((side / 4 + np.array([column, row]) * side / 2 + rng.uniform(-room, room, 2), radius))
    return spots


def draw(scene: Scene, rng: np.random.Generator, side: int = SIDE, spots: list | None = None) -> np.ndarray:
    """The picture of a scene: uint8 RGB (side, side, 3). Size, tilt and position of each shape vary within its quarter."""
    spots = spots or arrange(scene, rng, side)
    big = 2 * side                                               # drawn at twice the size, then halved: smooth edges
    image = _ground(scene.ground, side, rng)
    image = cv2.resize(np.clip(image, 0, 255).astype(np.uint8), (big, big), interpolation=cv2.INTER_LINEAR)
    for thing, (center, radius) in zip(scene.things, spots):
        tilt = rng.uniform(-0.3, 0.3)
        turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        contours = [np.round((_outline(thing.shape) @ turn * radius + center) * 2).astype(np.int32)]
        if thing.shape == "ring":
            contours.append(np.round((_outline("circle") * 0.52 * radius + center) * 2).astype(np.int32))
        shade = rng.uniform(0.88, 1.0)
        cv2.fillPoly(image, contours, tuple(int(c * shade) for c in COLORS[thing.color]))
        cv2.polylines(image, contours, True, (24, 24, 24), max(1, big // 100), cv2.LINE_AA)
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------- questions

def caption(scene: Scene) -> str:
    return f"{', '.join(map(str, scene.things))} on {scene.ground}"


def questions(scene: Scene) -> list[Question]:
    """Every question that can be asked of a scene; the caption is the last."""
    asked = []
    for shape, color, place in scene.things:
        asked += [Question("color", f"what color is the {shape}?", color, f"the {shape} is {color}", tuple(COLORS)),
                  Question("shape", f"what shape is {color}?", shape, f"the {color} shape is a {shape}", SHAPES),
                  Question("place", f"where is the {shape}?", place, f"the {shape} is {place}", PLACES)]
    count = COUNTS[len(scene.things) - 1]
    asked += [Question("count", "how many shapes are there?", count, f"the number of shapes is {count}", COUNTS),
              Question("ground", "what is the ground?", scene.ground, f"the ground is {scene.ground}", GROUNDS),
              Question("caption", "describe the picture.", caption(scene), caption(scene), ())]
    return asked


def choices(question: Question, rng: np.random.Generator) -> list[str]:
    """Four choices in random order, one of them right."""
    wrong = [o for o in question.options if o != question.answer]
    picked = [question.answer, *(wrong[i] for i in rng.permutation(len(wrong))[:3])]
    return [picked[i] for i in rng.permutation(4)]


# ---------------------------------------------------------------- chains

EFFECTS = {"lens blur": "edges are soft", "lens flare": "light veils the scene", "motion blur": "edges smear one way",
           "dirty lens": "spots dim the view", "saturation": "colors look pale", "compression": "blocks eat detail",
           "block change": "pieces swap places", "shifting": "bands slide sideways", "scan lines": "stripes cross the scene",
           "darkness": "the scene is dim", "atmospheric turbulence": "shapes wobble", "noise": "grain hides detail",
           "color diffusion": "colors bleed over edges", "sharpness change": "edges ring", "graffiti": "strokes cover parts",
           "watermark damage": "marks lie over the scene"}


def _severity(s: float) -> str:
    return "slightly" if s < 1 / 3 else "clearly" if s < 2 / 3 else "badly"


def true_chain(scene: Scene, question: Question, degradations: list[Degradation], answer: str | None) -> Chain:
    """The chain that an ideal reader would write. It grows with the total intensity, Eq. (7)."""
    total = sum(d.intensity for d in degradations)
    influence = ", ".join(f"{EFFECTS[d.type]} {_severity(d.intensity)}" for d in degradations) or "nothing is hidden"
    if total >= 0.5:
        influence += ", shapes and colors are harder to tell"
    if total >= 1.0:
        influence += ", and some may be lost"
    target = next((t for t in scene.things if t.shape in question.text or t.color in question.text), None)
    if question.kind == "caption":
        seen = f"{COUNTS[len(scene.things) - 1]} of the shapes"
    elif total < 0.5 and question.kind != "count":
        seen = str(target) if target else scene.ground
    else:
        seen = ", ".join(map(str, scene.things))
    reasoning = f"the picture shows {seen}"
    if total >= 1.0:
        reasoning = f"without the damage {reasoning} on {scene.ground}"
    return Chain(degradations, influence, reasoning, question.statement, answer)


# ---------------------------------------------------------------- records on disk

class Sample(NamedTuple):
    clean: np.ndarray                                            # X,   uint8 RGB (112, 112, 3)
    image: np.ndarray                                            # X_d, the same shape
    record: dict                                                 # one line of the data set


def undamaged(index: int, seed: int) -> tuple[np.ndarray, list[Degradation], dict]:
    """Sample number `index` of the world `seed` before it is damaged: the clean picture, the damage, the record. Half are choice questions,
    three tenths open ones, two tenths captions; one picture in eight stays clean, the others carry one or two degradations."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    clean = draw(scene, rng)
    degradations = [] if rng.random() < 1 / 8 else sample_degradations(rng, low=1, high=2)
    form = str(rng.choice(["choice", "open", "caption"], p=[.5, .3, .2]))
    *asked, describe = questions(scene)
    question = describe if form == "caption" else asked[rng.integers(len(asked))]
    options = choices(question, rng) if form == "choice" else None
    answer = None if form == "caption" else question.answer     # choices are answered by text: an index is harder at this size
    chain = true_chain(scene, question, degradations, answer)
    record = {"id": f"{seed}-{index:06d}", "image": f"images/{seed}-{index:06d}.png", "form": form,
              "conversations": [{"from": "human", "value": "<image>" + build_question(question.text, options)},
                                {"from": "gpt", "value": render(chain)}],
              "degradations": [d._asdict() for d in degradations], "seed": index, "choices": options, "answer": answer,
              "caption": caption(scene), "source_id": f"scene {seed}-{index}"}
    return clean, degradations, record


def sample(index: int, seed: int) -> Sample:
    """Sample number `index` of the world `seed`: clean picture, damaged picture, record."""
    clean, degradations, record = undamaged(index, seed)
    return Sample(clean, degrade(clean, degradations, seed=index), record)


def _write_one(job: tuple[int, int, str, bool]) -> str:
    index, seed, folder, keep_clean = job
    cv2.setNumThreads(1)
    clean, image, record = sample(index, seed)
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    cv2.imwrite(os.path.join(folder, record["image"]), image[..., ::-1], fast)
    if keep_clean:
        record["clean_image"] = f"clean/{seed}-{index:06d}.png"
        cv2.imwrite(os.path.join(folder, record["clean_image"]), clean[..., ::-1], fast)
    return json.dumps(record)


def write(folder: str | Path, train: int = TRAIN, test: int = TEST, seed: int = 0) -> Path:
    """Write the data set: `train.jsonl`, `test.jsonl` (held out; with the clean pictures too), `images/`, `clean/`.

    A file of lines appears only when all its images are there, so a run that was cut off is simply run again.
    """
    folder = Path(folder)
    for name in ("images", "clean"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = {"train": [(i, 2 * seed, str(folder), False) for i in range(train)],
            "test": [(i, 2 * seed + 1, str(folder), True) for i in range(test)]}
    with get_context("spawn").Pool() as pool:
        for split, work in jobs.items():
            path = folder / f"{split}.jsonl"
            if path.exists():
                found = path.read_text().splitlines()
                if len(found) != len(work) or json.loads(found[0])["id"] != f"{work[0][1]}-000000":
                    raise SystemExit(f"{path} holds another world ({len(found)} records): give another --out, or delete {folder}")
                continue
            lines = list(tqdm(pool.imap(_write_one, work, chunksize=32), total=len(work), desc=f"drawing {path}"))
            temporary = path.with_suffix(".tmp")
            temporary.write_text("\n".join(lines) + "\n")
            os.replace(temporary, path)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the drawn world to disk as an ordinary data set.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="runs/tiny-world", help="folder to write")
    parser.add_argument("--train", type=int, default=TRAIN, help="training records")
    parser.add_argument("--test", type=int, default=TEST, help="held-out records")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another world")
    a = parser.parse_args()
    print("written:", write(a.out, a.train, a.test, a.seed))


if __name__ == "__main__":
    main()
