"""From rewards to advantages: Eq. (10) and others, chosen by `train_grpo.py --advantage`.

Each takes terms (B, G, K), the K rewards of each response, and weights (K,), and returns (B, G).
"""

import torch
from torch import Tensor

from rr1.grpo import group_advantages


def weighted_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """R of Eq. (9), (B, G)."""
    return (terms * weights).sum(-1)


def rloo(terms: Tensor, weights: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): R minus the mean of the group's other responses."""
    G = terms.shape[1]
    return centred(terms, weights) * G / max(1, G - 1)


def gdpo(terms: Tensor, weights: Tensor) -> Tensor:
    """GDPO (arXiv 2601.05242): each reward is normalised within its group by itself, then weighted
    and added. (The paper's last division, over the batch, only scales the step, and is left out.)
    """
    each = [group_advantages(reward) for reward in terms.unbind(-1)]
    return weighted_sum(torch.stack(each, -1), weights)


def maxrl(terms: Tensor, weights: Tensor) -> Tensor:
    """MaxRL (arXiv 2602.02710), for rewards of 0 or 1: (R - mean) / mean; 0 where none is right."""
    R = weighted_sum(terms, weights)
    share = R.mean(dim=1, keepdim=True)  # (B, 1)
    return torch.where(share > 0, R / share - 1, 0.0)


def best(terms: Tensor, weights: Tensor) -> Tensor:
    """Expert iteration: 1 for the group's best response (the first of equals), 0 for the others and
    where all are equal. With one update per rollout and beta 0 this is fine-tuning on the policy's
    own best responses."""
    R = weighted_sum(terms, weights)
    chosen = torch.zeros_like(R).scatter(1, R.argmax(dim=1, keepdim=True), 1.0)
    differ = R.amax(1, keepdim=True) > R.amin(1, keepdim=True)
    return chosen * differ


def of_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """Eq. 10-11."""
    return group_advantages(weighted_sum(terms, weights))


def centred(terms: Tensor, weights: Tensor) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): R minus the group's mean."""
    return group_advantages(weighted_sum(terms, weights), scale_by_std=False)


ADVANTAGES = {
    "grpo": of_sum,
    "dr_grpo": centred,
    "rloo": rloo,
    "gdpo": gdpo,
    "maxrl": maxrl,
    "best": best,
}
