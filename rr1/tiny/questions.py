"""What is asked of a scene, and the chain that an ideal reader would write about it.

Every question has one right answer, and a caption names the shapes in one fixed reading order, so
that it has one right form.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from degrade import Degradation
from rr1.chain import Chain
from rr1.tiny.scenes import COLORS, GROUNDS, PLACES, SHAPES, Scene

COUNTS = ("one", "two", "three", "four")  # four never happens: it is a wrong choice


class Question(NamedTuple):
    kind: str  # "color", "shape", "place", "count", "ground", "caption"
    text: str
    answer: str
    statement: str  # the answer as a sentence: the chain's conclusion
    options: tuple[str, ...]  # what a choice question draws its wrong choices from


# ---------------------------------------------------------------- questions


def caption(scene: Scene) -> str:
    return f"{', '.join(map(str, scene.things))} on {scene.ground}"


def questions(scene: Scene) -> list[Question]:
    """Every question that can be asked of a scene; the caption is the last."""
    asked = []
    for shape, color, place in scene.things:
        text, said = f"what color is the {shape}?", f"the {shape} is {color}"
        asked.append(Question("color", text, color, said, tuple(COLORS)))
        text, said = f"what shape is {color}?", f"the {color} shape is a {shape}"
        asked.append(Question("shape", text, shape, said, SHAPES))
        text, said = f"where is the {shape}?", f"the {shape} is {place}"
        asked.append(Question("place", text, place, said, PLACES))
    count = COUNTS[len(scene.things) - 1]
    said = f"the number of shapes is {count}"
    asked.append(Question("count", "how many shapes are there?", count, said, COUNTS))
    said = f"the ground is {scene.ground}"
    asked.append(Question("ground", "what is the ground?", scene.ground, said, GROUNDS))
    described = caption(scene)
    return [*asked, Question("caption", "describe the picture.", described, described, ())]


def choices(question: Question, rng: np.random.Generator) -> list[str]:
    """Four choices in random order, one of them right."""
    wrong = [option for option in question.options if option != question.answer]
    picked = [question.answer, *(wrong[i] for i in rng.permutation(len(wrong))[:3])]
    return [picked[i] for i in rng.permutation(4)]


# ---------------------------------------------------------------- chains

EFFECTS = {
    "lens blur": "edges are soft",
    "lens flare": "light veils the scene",
    "motion blur": "edges smear one way",
    "dirty lens": "spots dim the view",
    "saturation": "colors look pale",
    "compression": "blocks eat detail",
    "block change": "pieces swap places",
    "shifting": "bands slide sideways",
    "scan lines": "stripes cross the scene",
    "darkness": "the scene is dim",
    "atmospheric turbulence": "shapes wobble",
    "noise": "grain hides detail",
    "color diffusion": "colors bleed over edges",
    "sharpness change": "edges ring",
    "graffiti": "strokes cover parts",
    "watermark damage": "marks lie over the scene",
}


def _severity(s: float) -> str:
    return "slightly" if s < 1 / 3 else "clearly" if s < 2 / 3 else "badly"


def true_chain(
    scene: Scene, question: Question, degradations: list[Degradation], answer: str | None
) -> Chain:
    """The chain that an ideal reader would write. It grows with the total intensity, Eq. (7)."""
    total = sum(s for _, s in degradations)
    effects = [f"{EFFECTS[kind]} {_severity(s)}" for kind, s in degradations]
    influence = ", ".join(effects) or "nothing is hidden"
    if total >= 0.5:
        influence += ", shapes and colors are harder to tell"
    if total >= 1.0:
        influence += ", and some may be lost"

    asked_about = [
        t for t in scene.things if t.shape in question.text or t.color in question.text
    ]
    seen = ", ".join(map(str, scene.things))
    if question.kind == "caption":
        seen = f"{COUNTS[len(scene.things) - 1]} of the shapes"
    elif total < 0.5 and question.kind != "count":
        seen = str(asked_about[0]) if asked_about else scene.ground
    reasoning = f"the picture shows {seen}"
    if total >= 1.0:
        reasoning = f"without the damage {reasoning} on {scene.ground}"
    return Chain(degradations, influence, reasoning, question.statement, answer)
