"""How well does the tiny model answer? Held-out scenes, clean and damaged, greedy."""

from __future__ import annotations

import numpy as np
from PIL import Image
from tqdm import tqdm

from degrade import degrade, sample_degradations
from rr1 import data, vlm
from rr1.chain import build_question
from rr1.rollout import sample_group
from rr1.tiny import questions, scenes


def table(checkpoint: str) -> str:
    """The shares of right answers, one line a form and look."""
    model, processor = vlm.load(checkpoint)
    shares = examine(model.eval(), processor)
    return "\n".join(f"{key:18s}{share:.3f}" for key, share in shares.items())


def examine(
    model,
    processor,
    n: int = 512,
    seed: int = 10**6,
) -> dict[str, float]:
    """Share of right answers on n held-out scenes: a caption, an open and a choice question on
    each, clean and damaged by one or two degradations."""
    rng = np.random.default_rng(seed)
    right: dict[str, list[bool]] = {}
    for _ in tqdm(range(0, n, 64), desc="examining"):
        turns = []
        for scene in [scenes.sample_scene(rng) for _ in range(64)]:
            turns += turns_about(scene, rng)
        pictures = [Image.fromarray(turn[1]) for turn in turns]
        texts = [turn[2] for turn in turns]
        batch = data.collate(texts, pictures, processor)
        groups = sample_group(
            model,
            data.encode(model, batch),
            1,
            [0] * len(turns),
            end_id=processor.end_id,
            max_new_tokens=40,
            temperature=0,
        )
        for (key, _, _, answer), [response] in zip(turns, groups):
            said = processor.decode(response.ids)
            right.setdefault(key, []).append(said == answer)
    return {key: sum(found) / len(found) for key, found in right.items()}


def turns_about(scene: scenes.Scene, rng: np.random.Generator) -> list[tuple]:
    """(form and look, picture, question, answer) of three questions on both pictures."""
    clean = scenes.draw(scene, rng)  # uint8 (112, 112, 3)
    damage = sample_degradations(rng, low=1, high=2)
    damaged = degrade(clean, damage, seed=int(rng.integers(2**31)))
    *asked, describe = questions.questions(scene)
    first, second = rng.integers(len(asked), size=2)
    one, other = asked[first], asked[second]
    choice = build_question(other.text, questions.choices(other, rng))
    turns = []
    for look, picture in (("clean", clean), ("damaged", damaged)):
        turns.append((f"caption, {look}", picture, describe.text, describe.answer))
        turns.append((f"open, {look}", picture, one.text, one.answer))
        turns.append((f"choice, {look}", picture, choice, other.answer))
    return turns
