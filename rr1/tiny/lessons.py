"""What the tiny model is taught from: endless pictures with what is drawn on them, how they are damaged, and talk about them."""
from __future__ import annotations

import cv2
import numpy as np
import torch
from torch.utils.data import IterableDataset

from degrade import DEGRADATIONS, degrade, sample_degradations
from rr1.chain import build_question
from rr1.tiny import world

TYPES = list(DEGRADATIONS)


class Batches(IterableDataset):
    """Endless batches, made in a worker process. `phase` says what is in them."""

    def __init__(self, processor, phase: str, batch: int, seed: list[int]):
        self.processor, self.phase, self.batch, self.seed = processor, phase, batch, seed

    def __iter__(self):
        cv2.setNumThreads(1), torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            yield self.pictures(rng)

    def pictures(self, rng: np.random.Generator) -> dict:
        """Pictures with what is drawn, how they are damaged and, in the last phase, conversations about them."""
        images, talks = [], []
        cells = np.zeros((self.batch, 4, 4, 2), np.int64)        # shape and colour at each visual token, 0 = nothing there
        middles = np.stack(np.meshgrid(*2 * [14 + 28 * np.arange(4)]), -1)       # (4, 4, 2): x, y of the tokens' middles
        grounds = np.zeros(self.batch, np.int64)
        damage = np.zeros((self.batch, 2, len(TYPES)), np.float32)    # present?, intensity
        for b in range(self.batch):
            scene = world.sample_scene(rng)
            spots = world.arrange(scene, rng)
            image, applied = world.draw(scene, rng, spots=spots), []
            if rng.random() < 0.75:
                applied = sample_degradations(rng, low=1, high=2)
                image = degrade(image, applied, seed=int(rng.integers(2**31)))
                for d in applied:
                    damage[b, :, TYPES.index(d.type)] = 1, d.intensity
            for thing, (center, radius) in zip(scene.things, spots):
                covered = np.hypot(*(middles - center).transpose(2, 0, 1)) < radius + 6
                cells[b, covered] = 1 + world.SHAPES.index(thing.shape), 1 + list(world.COLORS).index(thing.color)
            grounds[b] = world.GROUNDS.index(scene.ground)
            images.append(image)
            if self.phase == "whole":
                talks.append(self.conversations(scene, applied, rng))
        pixel_values, grid = self.processor.pixels(images)
        lines = [self.line(rng) for _ in talks]
        return {"pixel_values": pixel_values, "grid": grid, "cells": torch.from_numpy(cells), "grounds": torch.from_numpy(grounds),
                "damage": torch.from_numpy(damage), "conversations": talks, "lines": lines}

    def line(self, rng: np.random.Generator) -> list[int]:
        """The sentences of a chain, without tags and without a picture: the language that fine-tuning will put in order."""
        scene = world.sample_scene(rng)
        asked = world.questions(scene)
        chain = world.true_chain(scene, asked[rng.integers(len(asked))], sample_degradations(rng, low=1, high=2), None)
        damage = ", ".join(f"{kind}({s:.2f})" for kind, s in chain.degradations)
        return self.processor.response_ids("\n".join([damage, chain.influence, chain.reasoning, chain.conclusion]))

    def conversations(self, scene: world.Scene, damage: list, rng: np.random.Generator) -> list[tuple[list[int], list[str], list[int]]]:
        """What follows the picture: eight turns in any order, a caption, how it is damaged, three open questions, one with choices,
        which are answered by their text, and two more, one of them with choices, answered after saying what is there.
        Four turns stand alone: from those, looking at the picture is learnt fast. Four make one long conversation: its end is far from
        the picture, as the end of a chain will be.
        -> token ids, what kind each turn is of, the turn whose answer each token belongs to (-1: none)."""
        *asked, describe = world.questions(scene)
        harm = ", ".join(f"{kind}({s:.2f})" for kind, s in damage) or "nothing"
        turns = [("caption", describe.text, describe.answer), ("damage", "how is the picture damaged?", harm)]
        for k, i in enumerate(rng.permutation(2 * len(asked))[:6]):
            question, first = asked[i % len(asked)], k >= 4
            options = world.choices(question, rng) if k in (3, 5) else None
            text = build_question(question.text, options) + ("\nsay what you see, then answer." if first else "")
            answer = f"the picture shows {describe.answer}\n{question.statement}\n{question.answer}" if first else question.answer
            turns.append(("explained" if first else "choice" if options else "open", text, answer))
        order = rng.permutation(len(turns))
        return [self.conversation([turns[i] for i in part]) for part in (*order[:4, None], order[4:])]

    def conversation(self, turns: list[tuple[str, str, str]]) -> tuple[list[int], list[str], list[int]]:
        """(kind, question, answer) of each turn, one after the other, as `conversations` returns one."""
        ids, owner = [], []
        for t, (_, text, answer) in enumerate(turns):
            prompt = self.processor.prompt_ids(text, [1])
            prompt = prompt[prompt.index(self.processor.image_token_id) + 2:]        # what follows <|vision_end|>
            if t:                                                                    # the picture belongs to the first turn alone
                prompt = self.processor.tokenizer("\n<|im_start|>user\n")["input_ids"] + prompt
            response = self.processor.response_ids(answer)
            ids += prompt + response
            owner += [-1] * len(prompt) + [t] * len(response)
        return ids, [kind for kind, _, _ in turns], owner
