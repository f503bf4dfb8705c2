"""What is asked of a scene, and the chain that answers it step by step.

Questions take one to three steps. Each step is a question of its own: thing to place, place to
thing, the neighbour, counting, comparing; to count is to find, then to count. A chain leaves
nothing out that a later part needs: TYPE names the damage. INFLUENCE says what that changes or
hides: "grey hides white" is said of the dark, where what looks grey is white. REASONING says
what is seen, and goes the steps of the question: "it looks grey, grey hides white". CONCLUSION
says what is true: "the star is white".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from degrade import Degradation
from rr1.chain import Chain, render
from rr1.tiny.scenes import BRIGHTNESS, COLORS, GROUNDS, PLACES, SHAPES, Scene, Thing

COUNTS = ("one", "two", "three", "four")
# row, column
BESIDE = {"right of": (0, 1), "left of": (0, -1), "below": (1, 0), "above": (-1, 0)}
PIECE = re.compile(r"\n?<[A-Z_]+>|\([01]\.|\d| ?[a-z]+| ?[^\sa-z\d<]+|\s")


class Question(NamedTuple):
    """One question. `steps` are what REASONING says on the way; {red} in them stands for what
    red looks like."""

    kind: str
    n_steps: int
    text: str
    answer: str
    statement: str  # the answer as a sentence: the chain's conclusion
    steps: tuple[str, ...]
    options: tuple[str, ...]  # what a choice question draws its wrong choices from

    def way(self, looks: dict[str, str]) -> list[str]:
        """The steps, where `looks` says which colours look like which others."""
        way = []
        for step in self.steps:
            if color := re.search(r"{(\w+)}", step):
                step = step.replace(color[0], seeming(color[1], looks))
                if color[1] in looks:
                    step += f", {looks[color[1]]} hides {color[1]}"
            way.append(step)
        return way


def seeming(color: str, looks: dict[str, str]) -> str:
    """What a colour looks like: another one, or lower than it is if another looks like it."""
    weak = f"low {color}" if color in looks.values() else color
    return looks.get(color, weak)


def caption(scene: Scene) -> str:
    return f"{', '.join(map(str, scene.things))} on {scene.ground}"


def questions(scene: Scene) -> list[Question]:
    """Every question that can be asked of a scene; the caption is the last."""
    asked = []
    colors = [thing.color for thing in scene.things]
    for thing in scene.things:
        asked += _about(thing, unique_color=colors.count(thing.color) == 1)
        asked += _beside(scene, thing)
    for color in dict.fromkeys(colors):
        names = [thing.shape for thing in scene.things if thing.color == color]
        number = COUNTS[len(names) - 1]
        steps = (f"it looks {{{color}}}", ", ".join(names))
        text, said = (
            f"how many shapes are {color}?",
            f"the number of {color} shapes is {number}",
        )
        asked.append(Question("count color", 3, text, number, said, steps, COUNTS))
    asked += _compared(scene)
    number, names = (
        COUNTS[len(colors) - 1],
        ", ".join(thing.shape for thing in scene.things),
    )
    text, said = "how many shapes are there?", f"the number of shapes is {number}"
    asked.append(Question("count", 2, text, number, said, (names,), COUNTS))
    text, said = "what is the ground?", f"the ground is {scene.ground}"
    asked.append(
        Question("ground", 1, text, scene.ground, said, ("under the shapes",), GROUNDS)
    )
    described = caption(scene)
    text, steps = "describe the picture.", (f"{number} shapes",)
    return [*asked, Question("caption", 1, text, described, described, steps, ())]


def _about(thing: Thing, unique_color: bool) -> list[Question]:
    """One step: from one property of a thing to another."""
    shape, color, place = thing
    asks = f"what color is the {shape}?"
    seen, at = f"it looks {{{color}}}", f"the {shape} is {place}"
    asked = [
        Question(
            "color", 1, asks, color, f"the {shape} is {color}", (at, seen), tuple(COLORS)
        ),
        Question("place", 1, f"where is the {shape}?", place, at, (seen,), PLACES),
        Question("at", 1, f"what shape is {place}?", shape, at, (seen,), SHAPES),
    ]
    if unique_color:
        text, said = f"what shape is {color}?", f"the {color} shape is a {shape}"
        asked.append(
            Question("shape", 1, text, shape, said, (seen, f"it is {place}"), SHAPES)
        )
    return asked


def _beside(scene: Scene, start: Thing) -> list[Question]:
    """Two steps: the neighbour of a thing. Three: the neighbour's neighbour, round the corner."""
    asked = []
    for side, first in _neighbours(scene, start):
        steps = (f"the {start.shape} is {start.place}", f"{side} it is {first.place}")
        asked += _named("beside", 2, f"{side} the {start.shape}", first, steps)
        for turn, last in _neighbours(scene, first):
            if last is not start:
                further = (*steps, f"{turn} that is {last.place}")
                asked += _named(
                    "corner", 3, f"{turn} the one {side} the {start.shape}", last, further
                )
    return asked


def _named(
    kind: str, n: int, where: str, thing: Thing, steps: tuple[str, ...]
) -> list[Question]:
    """Shape and colour of the thing that the steps lead to."""
    shape, color, place = thing
    text, said = f"what shape is {where}?", f"the {shape} is {place}"
    of_color, true = f"what color is {where}?", f"the shape {place} is {color}"
    further = (*steps, f"it looks {{{color}}}")
    return [
        Question(kind, n, text, shape, said, steps, SHAPES),
        Question(f"{kind} color", n, of_color, color, true, further, tuple(COLORS)),
    ]


def _neighbours(scene: Scene, thing: Thing) -> list[tuple[str, Thing]]:
    row, column = divmod(PLACES.index(thing.place), 2)
    at = {divmod(PLACES.index(other.place), 2): other for other in scene.things}
    spots = {side: (row + down, column + right) for side, (down, right) in BESIDE.items()}
    return [(side, at[spot]) for side, spot in spots.items() if spot in at]


def _compared(scene: Scene) -> list[Question]:
    """Three steps: two colours on the ladder of brightness, and which of them is brighter."""
    asked = []
    plain = [thing for thing in scene.things if thing.color in BRIGHTNESS]
    for one in plain:
        for other in plain:
            if one.color == other.color:
                continue
            brighter = min(one, other, key=lambda thing: BRIGHTNESS.index(thing.color))
            steps = tuple(f"the {t.shape} looks {{{t.color}}}" for t in (one, other))
            text = f"which is brighter, the {one.shape} or the {other.shape}?"
            said = f"the {brighter.shape} is brighter"
            asked.append(Question("compare", 3, text, brighter.shape, said, steps, SHAPES))
    return asked


def ask(
    scene: Scene,
    rng: np.random.Generator,
    n_steps: int | None = None,
    about: Collection[str] = (),
) -> Question:
    """A question that is not a caption: first how many steps (default: one in four of ten,
    two and three in three each), then which kind. If some question is about one of the colours
    `about`, it is one of those."""
    asked = questions(scene)[:-1]
    asked = [q for q in asked if set(about) & {*q.text[:-1].split(), q.answer}] or asked
    n_steps = n_steps or int(rng.choice([1, 2, 3], p=[0.4, 0.3, 0.3]))
    there = [question.n_steps for question in asked]
    n_steps = min(there, key=lambda n: abs(n - n_steps))
    asked = [question for question in asked if question.n_steps == n_steps]
    kinds = sorted({question.kind for question in asked})
    kind = kinds[rng.integers(len(kinds))]
    asked = [question for question in asked if question.kind == kind]
    return asked[rng.integers(len(asked))]


def choices(question: Question, rng: np.random.Generator) -> list[str]:
    """Four choices in random order, one of them right."""
    wrong = [option for option in question.options if option != question.answer]
    picked = [question.answer, *(wrong[i] for i in rng.permutation(len(wrong))[:3])]
    return [picked[i] for i in rng.permutation(4)]


# ---------------------------------------------------------------- chains

EFFECTS = {
    "lens blur": "edges are soft",
    "lens flare": "light veils parts",
    "motion blur": "edges smear",
    "dirty lens": "spots dim parts",
    "compression": "blocks eat detail",
    "block change": "blocks swap places",
    "shifting": "rows slide sideways",
    "scan lines": "stripes hide rows",
    "atmospheric turbulence": "outlines wobble",
    "noise": "grain hides detail",
    "color diffusion": "colors bleed",
    "sharpness change": "edges ring",
    "graffiti": "paint covers shapes",
    "watermark damage": "letters cover shapes",
}
# darkness and saturation: from which intensity which colours are hidden behind which others.
# Beyond .65 they have sunk further still, but so have the others: which is which can be told
LADDERS = {
    "darkness": {
        0: "light is low",
        0.15: "light is low, grey hides white",
        0.25: "light is low, grey hides white, black hides grey",
    },
    "saturation": {
        0: "colors fade",
        0.25: "colors fade, rust hides red, slate hides blue, sage hides green",
    },
}


def influence(degradations: Sequence[Degradation], careless: bool = False) -> str:
    """What the damage hides or changes; `careless` does not say which colours."""
    said = []
    for kind, s in degradations:
        steps = LADDERS.get(kind, {0: EFFECTS.get(kind)})
        said.append(steps[0 if careless else max(least for least in steps if least <= s)])
    return ", ".join(said) or "nothing is hidden"


def looks(note: str) -> dict[str, str]:
    """Which colours look like which others: "grey hides white" -> {"white": "grey"}."""
    return {
        true: look
        for look, true in re.findall(r"(\w+) hides (\w+)", note)
        if true in COLORS
    }


def seen(scene: Scene, looks: dict[str, str]) -> list[str]:
    """The things of a scene in the colours that they seem to have."""
    return [
        str(thing._replace(color=seeming(thing.color, looks))) for thing in scene.things
    ]


LEAST, MOST = 34, 82  # tokens of a chain, from no damage to a total intensity of 3


def tokens(text: str) -> int:
    """The text's length in tokens: every word, tag, digit and mark is one."""
    return len(PIECE.findall(text))


def right_length(degradations: Sequence[Degradation]) -> int:
    """Eq. (7): the tokens that a chain should have, linear in the total intensity."""
    return round(LEAST + 16 * sum(s for _, s in degradations))


def true_chain(
    scene: Scene,
    question: Question,
    degradations: Sequence[Degradation],
    answer: str | None,
    length: int | None = None,
    careless: bool = False,
    note: str | None = None,
) -> Chain:
    """The chain whose length is nearest to `length` (default: Eq. 7). `note` is what INFLUENCE
    says, by default what the damage does.

    REASONING first lists some of the things, the more the longer, then goes the question's steps.
    Both say what is seen; CONCLUSION says what is true. A `careless` chain does not say which
    colours look like which others, and goes the last step alone, as if things were what they
    look.
    """
    length = length or right_length(degradations)
    note = influence(degradations, careless) if note is None else note
    way = question.way(looks(note))
    if careless:
        way = [way[-1].replace("looks", "is")]
    listed = [] if question.kind == "caption" else seen(scene, looks(note))
    reasonings = [way[-1:]] + [listed[:n] + way for n in range(len(listed) + 1)]
    drafts = []
    for said in reasonings:
        drafts.append(
            Chain(degradations, note, ", ".join(said), question.statement, answer)
        )
    return min(drafts, key=lambda chain: abs(tokens(render(chain)) - length))
