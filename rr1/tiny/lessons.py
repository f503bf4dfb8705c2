"""What the tiny model is taught from: endless pictures, what is drawn on them, how they are
damaged, and talk about them.

The language model sees clean pictures, a tenth of them mildly damaged. What the vision tower reads
of the content, it reads of clean and mildly damaged pictures; how a picture is damaged, it reads of
all.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import IterableDataset

from degrade import Degradation, degrade
from rr1.chain import build_question
from rr1.tiny import questions, scenes, world
from rr1.vlm import Processor

STEPWISE = "say what you see, then answer step by step."


@dataclass(eq=False)
class Batches(IterableDataset):
    """Endless batches, made in a worker process: `talking` pictures with conversations, and
    `damaged` ones without. `notes`: the share of pictures whose colours are not the true ones, as
    a note says."""

    processor: Processor
    talking: int
    damaged: int
    seed: list[int]
    talk: bool
    notes: float = 0.0

    def __iter__(self):
        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            yield self.batch(rng)

    def batch(self, rng: np.random.Generator) -> dict:
        """Pixels; what is at each visual token and on the ground (-100: not to be read); the
        damage; conversations."""
        n = self.talking + self.damaged
        cells = np.full((n, 4, 4, 2), -100, np.int64)  # shape and colour, 0 = nothing there
        grounds = np.full(n, -100, np.int64)
        damage = np.zeros((n, 2, len(world.TYPES)), np.float32)  # present?, intensity
        images, talks, lines = [], [], []
        for b in range(n):
            scene = seen = scenes.sample_scene(rng)
            note = ""
            if b < self.talking and rng.random() < self.notes:
                seen, note = looks_otherwise(scene, rng)
            spots = scenes.arrange(scene, rng)
            image = scenes.draw(seen, rng, spots=spots)
            applied = sample_lesson_damage(rng, mild=b < self.talking, rare=self.talk)
            image = degrade(image, applied, seed=int(rng.integers(2**31)))
            for kind, s in applied:
                damage[b, :, world.TYPES.index(kind)] = 1, s
            images.append(image)
            if b < self.talking:
                cells[b] = cells_of(seen, spots)
                grounds[b] = scenes.GROUNDS.index(scene.ground)
                if self.talk:
                    talks.append(self.conversations(scene, note, rng))
                    lines += [self.line(rng) for _ in range(3)]
        pixel_values, grid = self.processor.pixels(images)
        batch = {
            "pixel_values": pixel_values,
            "grid": grid,
            "conversations": talks,
            "lines": lines,
        }
        arrays = {"cells": cells, "grounds": grounds, "damage": damage}
        return batch | {name: torch.from_numpy(array) for name, array in arrays.items()}

    def line(self, rng: np.random.Generator) -> list[int]:
        """The sentences of a chain without tags and without a picture: the language that
        fine-tuning will put in order."""
        scene = scenes.sample_scene(rng)
        applied = world.sample_damage(rng, ("light", "medium", "strong")[rng.integers(3)])
        note = questions.influence(applied)
        if rng.random() < self.notes:
            note = looks_otherwise(scene, rng)[1]
        question = questions.ask(scene, rng, about=questions.looks(note))
        length = int(rng.integers(questions.LEAST, questions.MOST))
        chain = questions.true_chain(scene, question, applied, None, length, note=note)
        damage = ", ".join(f"{kind}({s:.2f})" for kind, s in chain.degradations)
        parts = [
            question.text,
            damage,
            chain.influence,
            chain.reasoning,
            chain.conclusion,
        ]
        return self.processor.response_ids("\n".join(parts))

    def conversations(
        self, scene: scenes.Scene, note: str, rng: np.random.Generator
    ) -> list[tuple]:
        """What follows the picture: a caption, five questions answered at once, two of them with
        choices, and two answered step by step. All but two ask about what the note hides, if
        they can. Four turns stand alone: from those, looking at the picture is learnt fast. The
        others make one long conversation: its end is far from the picture, as the end of a chain
        will be. Each question begins with the note."""
        looks = questions.looks(note)
        describe = questions.questions(scene)[-1]
        turns = [("caption", describe.text, describe.answer)]
        for k in range(7):
            question = questions.ask(scene, rng, about=looks)
            if k in (0, 2):  # looking a thing up by its shape is learnt last
                asked = [
                    q for q in questions.questions(scene) if q.kind in ("color", "place")
                ]
                question = asked[rng.integers(len(asked))]
            stepwise = k >= 5
            options = questions.choices(question, rng) if k in (1, 3, 5) else None
            text = build_question(question.text, options)
            answer = question.answer
            if stepwise:
                listed = questions.seen(scene, looks)
                listed = listed[: rng.integers(len(listed) + 1)]
                seen = ", ".join([*listed, *question.way(looks)])
                text += f"\n{STEPWISE}"
                answer = f"{seen}\n{question.statement}\n{question.answer}"
            kind = "choice" if options else f"{question.n_steps} steps"
            kind = "undone" if question.answer in looks else kind
            kind = f"stepwise {kind}" if stepwise else kind
            turns.append((kind, text, answer))
        start = note + "\n" * bool(note)
        turns = [(kind, start + text, answer) for kind, text, answer in turns]
        turns = [turns[i] for i in rng.permutation(len(turns))]
        return [
            self.conversation(part) for part in (*([turn] for turn in turns[:4]), turns[4:])
        ]

    def conversation(
        self, turns: list[tuple[str, str, str]]
    ) -> tuple[list[int], list[tuple]]:
        """(kind, question, answer) of each turn, one after the other -> token ids; of each
        answer its kind and where it starts and ends."""
        ids, answers = [], []
        for kind, text, answer in turns:
            prompt = self.processor.prompt_ids(text, [1])
            picture = prompt.index(self.processor.image_token_id)
            prompt = prompt[picture + 2 :]  # after <|vision_end|>
            if ids:  # the picture belongs to the first turn alone
                turn = self.processor.tokenizer("\n<|im_start|>user\n")
                prompt = turn["input_ids"] + prompt
            response = self.processor.response_ids(answer)
            start = len(ids) + len(prompt)
            ids += prompt + response
            answers.append((kind, start, start + len(response)))
        return ids, answers


def sample_lesson_damage(
    rng: np.random.Generator, mild: bool, rare: bool
) -> list[Degradation]:
    """None or, in a half (a tenth where `rare`), a mild one; or any, where it need not be mild."""
    if not mild:
        level = ("light", "medium", "strong", "strong")[rng.integers(4)]
        return world.sample_damage(rng, level)
    if rng.random() > (0.1 if rare else 0.5):
        return []
    return [Degradation(str(rng.choice(world.TYPES)), float(rng.uniform(0.1, 0.35)))]


def looks_otherwise(
    scene: scenes.Scene, rng: np.random.Generator
) -> tuple[scenes.Scene, str]:
    """The scene with some colours drawn as others, and a note that says so ("white looks grey").
    Who reads the note can tell the true colours: no colour of the scene is looked like."""
    true = sorted({thing.color for thing in scene.things})
    others = [color for color in scenes.COLORS if color not in true]
    rng.shuffle(others)
    n = int(rng.integers(4))
    changed = [true[rng.integers(len(true))], *others[:n]]
    rng.shuffle(changed)
    looks = dict(zip(changed, others[n:], strict=False))
    things = [
        thing._replace(color=looks.get(thing.color, thing.color)) for thing in scene.things
    ]
    begun = ("light is low", "colors fade")[rng.integers(2)]
    note = ", ".join([begun, *(f"{other} hides {color}" for color, other in looks.items())])
    return scene._replace(things=tuple(things)), note


def cells_of(scene: scenes.Scene, spots: list) -> np.ndarray:
    """Shape and colour at each visual token, int (4, 4, 2); 0 is nothing."""
    middles = np.stack(np.meshgrid(*2 * [14 + 28 * np.arange(4)]), -1)  # (4, 4, 2): x, y
    cells = np.zeros((4, 4, 2), np.int64)
    for thing, (center, radius) in zip(scene.things, spots, strict=True):
        covered = np.hypot(*(middles - center).transpose(2, 0, 1)) < radius + 6
        color = list(scenes.COLORS).index(thing.color)
        cells[covered] = 1 + scenes.SHAPES.index(thing.shape), 1 + color
    return cells
