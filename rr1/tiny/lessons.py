"""What the tiny model is taught from: endless pictures, what is drawn on them, how they are
damaged, and talk about them."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch.utils.data import IterableDataset

from degrade import DEGRADATIONS, Degradation, degrade, sample_degradations
from rr1.chain import build_question
from rr1.tiny import questions, scenes

TYPES = list(DEGRADATIONS)
FIRST = "\nsay what you see, then answer."


class Batches(IterableDataset):
    """Endless batches, made in a worker process. `phase` says what is in them."""

    def __init__(self, processor, phase: str, batch: int, seed: list[int]):
        self.processor = processor
        self.phase = phase
        self.batch = batch
        self.seed = seed

    def __iter__(self):
        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            yield self.pictures(rng)

    def pictures(self, rng: np.random.Generator) -> dict:
        """Pictures with what is drawn, how they are damaged and, in the last phase, conversations
        about them."""
        cells = np.zeros((self.batch, 4, 4, 2), np.int64)
        grounds = np.zeros(self.batch, np.int64)
        damage = np.zeros((self.batch, 2, len(TYPES)), np.float32)  # present?, intensity
        images, talks = [], []
        for b in range(self.batch):
            scene = scenes.sample_scene(rng)
            spots = scenes.arrange(scene, rng)
            image = scenes.draw(scene, rng, spots=spots)
            applied = []
            if rng.random() < 0.75:
                applied = sample_degradations(rng, low=1, high=2)
                seed = int(rng.integers(2**31))
                image = degrade(image, applied, seed=seed)
            for kind, s in applied:
                damage[b, :, TYPES.index(kind)] = 1, s
            cells[b] = cells_of(scene, spots)
            grounds[b] = scenes.GROUNDS.index(scene.ground)
            images.append(image)
            if self.phase == "whole":
                talks.append(self.conversations(scene, applied, rng))
        pixel_values, grid = self.processor.pixels(images)
        lines = [self.line(rng) for _ in talks]
        batch = {
            "pixel_values": pixel_values,
            "grid": grid,
            "conversations": talks,
            "lines": lines,
        }
        arrays = {"cells": cells, "grounds": grounds, "damage": damage}
        for name, array in arrays.items():
            batch[name] = torch.from_numpy(array)
        return batch

    def line(self, rng: np.random.Generator) -> list[int]:
        """The sentences of a chain, without tags and without a picture: the language that
        fine-tuning will put in order."""
        scene = scenes.sample_scene(rng)
        asked = questions.questions(scene)
        question = asked[rng.integers(len(asked))]
        damage = sample_degradations(rng, low=1, high=2)
        chain = questions.true_chain(scene, question, damage, None)
        text = "\n".join(
            [in_words(damage), chain.influence, chain.reasoning, chain.conclusion]
        )
        return self.processor.response_ids(text)

    def conversations(
        self, scene: scenes.Scene, damage: list[Degradation], rng: np.random.Generator
    ) -> list[tuple[list[int], list[str], list[int]]]:
        """What follows the picture: eight turns in any order. A caption; how it is damaged; three
        open questions and one with choices; two more, one of them with choices, answered after
        saying what is there.

        Four turns stand alone: from those, looking at the picture is learnt fast. Four make one
        long conversation: its end is far from the picture, as the end of a chain will be.
        -> token ids, the kind of each turn, the turn whose answer each token belongs to (-1: none).
        """
        *asked, describe = questions.questions(scene)
        turns = [("caption", describe.text, describe.answer)]
        turns.append(
            ("damage", "how is the picture damaged?", in_words(damage) or "nothing")
        )
        chosen = rng.permutation(2 * len(asked))[:6]
        for k, i in enumerate(chosen):
            question = asked[i % len(asked)]
            options = None
            if k in (3, 5):
                options = questions.choices(question, rng)
            kind = "choice" if options else "open"
            text, answer = build_question(question.text, options), question.answer
            if k >= 4:
                kind = "explained"
                text += FIRST
                answer = (
                    f"the picture shows {describe.answer}\n{question.statement}\n{answer}"
                )
            turns.append((kind, text, answer))
        turns = [turns[i] for i in rng.permutation(len(turns))]
        parts = [[turn] for turn in turns[:4]]
        parts.append(turns[4:])
        return [self.conversation(part) for part in parts]

    def conversation(
        self, turns: list[tuple[str, str, str]]
    ) -> tuple[list[int], list[str], list[int]]:
        """(kind, question, answer) of each turn, one after the other, as `conversations` has it."""
        ids, owner = [], []
        for number, (_, text, answer) in enumerate(turns):
            prompt = self.processor.prompt_ids(text, [1])
            image = prompt.index(self.processor.image_token_id)
            prompt = prompt[image + 2 :]  # what follows <|vision_end|>
            if number:  # the picture belongs to the first turn alone
                prompt = (
                    self.processor.tokenizer("\n<|im_start|>user\n")["input_ids"] + prompt
                )
            response = self.processor.response_ids(answer)
            ids += prompt
            ids += response
            owner += [-1] * len(prompt) + [number] * len(response)
        return ids, [kind for kind, _, _ in turns], owner


def in_words(damage: list[Degradation]) -> str:
    return ", ".join(f"{kind}({s:.2f})" for kind, s in damage)


def cells_of(scene: scenes.Scene, spots: list) -> np.ndarray:
    """Shape and colour at each visual token, int (4, 4, 2); 0 is nothing."""
    middle = 14 + 28 * np.arange(4)
    x, y = np.meshgrid(middle, middle)  # of each token, (4, 4)
    cells = np.zeros((4, 4, 2), np.int64)
    for thing, (center, radius) in zip(scene.things, spots, strict=True):
        distance = np.hypot(x - center[0], y - center[1])
        covered = distance < radius + 6
        color = list(scenes.COLORS).index(thing.color)
        shape = scenes.SHAPES.index(thing.shape)
        cells[covered] = 1 + shape, 1 + color
    return cells
