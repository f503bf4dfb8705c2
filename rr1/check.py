"""The exercises' judge: does a function compute an equation of the paper?

    check("Eq. 8", lambda length, right: 1 - abs(length - right) / right)

It is tried on 200 random cases beside the library's function.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from degrade import DEGRADATIONS
from rr1 import grpo, rewards
from rr1.annotate import target_words
from rr1.chain import Chain, parse, render

TYPES = list(DEGRADATIONS)[:4]

# ---------------------------------------------------------------- random cases


def damage(rng: np.random.Generator) -> list[tuple[str, float]]:
    """Up to three instances of four types; a type may come twice."""
    names = rng.choice(TYPES, size=rng.integers(4))
    return [(str(name), round(float(rng.random()), 2)) for name in names]


def one_damage(rng):
    return (damage(rng),)


def two_damages(rng):
    return damage(rng), damage(rng)


def written_chain(rng):
    """Cut off somewhere, every other time."""
    text = render(Chain(damage(rng), "the star (0.30) is smeared"))
    end = rng.integers(2 * len(text))
    return (text[:end],)


def row_of_tokens(rng):
    """What is said after each token (L, V), the tokens (L,), whether they are the chain's (L,)."""
    logits = torch.from_numpy(rng.normal(size=(6, 5)))
    ids = torch.from_numpy(rng.integers(5, size=6))
    prompt = rng.integers(1, 6)
    return logits, ids, torch.arange(6) >= prompt


def two_lengths(rng):
    return int(rng.integers(120)), int(rng.integers(1, 90))


def rewards_of_groups(rng):
    return (torch.from_numpy(rng.normal(size=(2, 4))),)


def two_pixels(rng):
    """Bright ones: a rounding of one grey level is below 1 %."""
    image = rng.integers(110, 256, (1, 2, 3), dtype=np.uint8)
    return image, rng.random(), rng


def ratio_and_advantage(rng):
    ratio, A = rng.uniform(0.5, 1.6, 4), rng.normal(size=4)
    return torch.from_numpy(ratio), torch.from_numpy(A), 0.2


# ---------------------------------------------------------------- what is right


def intensities(text):
    return [s for _, s in parse(text).degradations]


def mean_surprise(logits, ids, mask):
    chain = mask[1:]
    return cross_entropy(logits[:-1][chain], ids[1:][chain])


def words(degradations):
    total = sum(s for _, s in degradations)
    return target_words(total)


def clipped(ratio, A, clip):
    return grpo.clipped_objective(ratio, A, clip, clip)


# name -> a random case, what is right
EQUATIONS: dict[str, tuple[Callable, Callable]] = {
    "Eq. 4": (written_chain, intensities),
    "Eq. 5": (row_of_tokens, mean_surprise),
    "Eq. 6": (two_damages, rewards.r_deg),
    "Eq. 7": (one_damage, words),
    "Eq. 8": (two_lengths, rewards.r_len),
    "Eq. 10": (rewards_of_groups, grpo.group_advantages),
    "saturation": (two_pixels, DEGRADATIONS["saturation"]),
    "clip": (ratio_and_advantage, clipped),
}


def check(name: str, function: Callable, cases: int = 200) -> bool:
    """Says whether `function` is right on random cases, or shows the first where it is not.

    ValueError where there is no equation of that name.
    """
    if name not in EQUATIONS:
        raise ValueError(f"unknown equation {name!r}; there are {', '.join(EQUATIONS)}")
    make, right = EQUATIONS[name]
    rng = np.random.default_rng(0)
    for _ in range(cases):
        case = make(rng)
        got = np.asarray(function(*case))
        expected = np.asarray(right(*case))
        same_shape = got.shape == expected.shape
        if not same_shape or not np.allclose(got, expected, rtol=1e-2, atol=1e-3):
            given = ", ".join(map(str, case))
            print(f"{name}: not yet. Given {given}: yours {got}, right {expected}")
            return False
    print(f"{name}: right on {cases} random cases")
    return True
