"""From rewards to advantages: Eq. (10) and others, chosen by `train_grpo.py --advantage`.

Each takes terms (B, G, K), the K weighted rewards of each response, whose sum over K is R of
Eq. (9), and returns (B, G).
"""

import torch
from torch import Tensor

from rr1.grpo import group_advantages


def rloo(terms: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): R minus the mean of the group's other responses."""
    R, G = terms.sum(-1), terms.shape[1]
    return group_advantages(R, scale_by_std=False) * G / max(1, G - 1)


def gdpo(terms: Tensor) -> Tensor:
    """GDPO (arXiv 2601.05242): each reward is normalised within its group by itself, then they are
    added. (The paper's last division, over the batch, only scales the step, and is left out.)"""
    return sum(group_advantages(term) for term in terms.unbind(-1))


def maxrl(terms: Tensor) -> Tensor:
    """MaxRL (arXiv 2602.02710), for rewards of 0 or 1: (R - mean) / mean; 0 where none is right."""
    R = terms.sum(-1)
    share = R.mean(dim=1, keepdim=True)  # (B, 1)
    return torch.where(share > 0, R / share - 1, 0.0)


def best(terms: Tensor) -> Tensor:
    """Expert iteration: 1 for the group's best response (the first of equals), 0 for the others and
    where all are equal. With one update per rollout and beta 0 this is fine-tuning on the policy's
    own best responses."""
    R = terms.sum(-1)
    chosen = torch.zeros_like(R).scatter(1, R.argmax(dim=1, keepdim=True), 1.0)
    return chosen * (R.amax(1, keepdim=True) > R.amin(1, keepdim=True))


def of_sum(terms: Tensor) -> Tensor:
    """Eq. 10-11."""
    return group_advantages(terms.sum(-1))


def centred(terms: Tensor) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): R minus the group's mean."""
    return group_advantages(terms.sum(-1), scale_by_std=False)


ADVANTAGES = {
    "grpo": of_sum,
    "dr_grpo": centred,
    "rloo": rloo,
    "gdpo": gdpo,
    "maxrl": maxrl,
    "best": best,
}
