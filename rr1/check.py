"""The exercises' judge: does a function compute an equation of the paper?

    check("Eq. 8", lambda length, right: 1 - abs(length - right) / right)

It is tried on 200 random cases beside the library's function.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from degrade import DEGRADATIONS
from rr1 import grpo, rewards

TYPES = list(DEGRADATIONS)[:4]


def damage(rng: np.random.Generator) -> list[tuple[str, float]]:
    """Up to three instances of four types; a type may come twice."""
    names = rng.choice(TYPES, size=rng.integers(4))
    return [(str(name), round(float(rng.random()), 2)) for name in names]


def two_damages(rng):
    return damage(rng), damage(rng)


def two_lengths(rng):
    return int(rng.integers(120)), int(rng.integers(1, 90))


def rewards_of_groups(rng):
    return (torch.from_numpy(rng.normal(size=(2, 4))),)


def ratio_and_advantage(rng):
    ratio, A = rng.uniform(0.5, 1.6, 4), rng.normal(size=4)
    return torch.from_numpy(ratio), torch.from_numpy(A), 0.2


def two_log_probabilities(rng):
    return tuple(torch.from_numpy(np.log(rng.uniform(0.05, 1, (2, 5)))))


# name -> a random case, the library's function
EQUATIONS: dict[str, tuple[Callable, Callable]] = {
    "Eq. 6": (two_damages, rewards.r_deg),
    "Eq. 6, as printed": (two_damages, rewards.r_deg_pairwise),
    "Eq. 8": (two_lengths, rewards.r_len),
    "Eq. 10": (rewards_of_groups, grpo.group_advantages),
    "clip": (
        ratio_and_advantage,
        lambda r, A, clip: grpo.clipped_objective(r, A, clip, clip),
    ),
    "KL": (two_log_probabilities, grpo.kl_to_reference),
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
        got, expected = np.asarray(function(*case)), np.asarray(right(*case))
        if got.shape != expected.shape or not np.allclose(
            got, expected, rtol=1e-2, atol=1e-3
        ):
            given = ", ".join(map(str, case))
            print(f"{name}: not yet. Given {given}: yours {got}, right {expected}")
            return False
    print(f"{name}: right on {cases} random cases")
    return True
