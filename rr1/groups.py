"""A prompt and its G responses on their way through a step of train_grpo.py: what is logged of
them, and what is written to be read.

Shapes: B prompts, G responses each, n prompts in a micro-batch, L tokens.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rr1 import rewards
from rr1.chain import Chain, is_well_formed, render
from rr1.rollout import Rollout
from rr1.runtime import Means
from rr1.vlm import Processor, Prompt


@dataclass
class Group:
    """One prompt on its way through a step, and what became of its G responses."""

    record: dict
    prompt: Prompt
    rollouts: list[Rollout]  # as sampled: token ids
    responses: list[rewards.Response]  # as text
    rewards: list[float] = field(default_factory=list)  # R, Eq. (9)
    terms: list[dict[str, float]] = field(default_factory=list)  # its parts, unweighted
    advantages: Tensor | None = None  # A, Eq. (10), (G,)


def to_text(r: Rollout, processor: Processor) -> rewards.Response:
    return rewards.Response(processor.decode(r.ids), r.length, r.truncated)


def measure(means: Means, groups: list[Group], R: Tensor) -> None:
    """Add what the responses are like. R (B, G)."""
    spread = R.std(1, correction=0)  # (B,)
    means.add("reward", R)
    means.add("reward_std", spread)
    means.add("zero_std", spread < 1e-6)
    for group in groups:
        for terms in group.terms:
            for name, value in terms.items():
                means.add(f"reward/{name}", value)
        means.add("tokens", [len(r.ids) for r in group.rollouts])
        means.add("length", [y.length for y in group.responses])
        means.add("truncated", [y.truncated for y in group.responses])
        means.add("well_formed", [is_well_formed(y) for y in group.responses])


def sampler_gap(groups: list[Group], logps: Tensor) -> Tensor:
    """|log-probability as sampled - as scored| of every token: rounding, and nothing else."""
    sampled = [torch.tensor(r.logps) for group in groups for r in group.rollouts]
    return (logps - pad_sequence(sampled, batch_first=True).to(logps)).abs()  # (n G, L)


def to_read(groups: list[Group]) -> list[dict]:
    """The groups' responses as rows of rollouts.jsonl."""
    rows = []
    for group in groups:
        record = group.record
        truth = record["response"] or render(Chain(record["degradations"]))
        for i, y in enumerate(group.responses):
            row = {
                "id": record["id"],
                "image": record["image"],
                "truth": truth,
                "response": y,
                "reward": group.rewards[i],
                **group.terms[i],
                "advantage": group.advantages[i],
                "truncated": y.truncated,
            }
            rows.append(row)
    return rows
