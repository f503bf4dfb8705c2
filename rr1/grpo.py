"""Eq. 10-12: group-relative policy optimisation. Tensors in, tensors out.

    B  prompts in the batch            N = B * G  responses
    G  responses to each prompt        L          response tokens, padded

    logp      (N, L)  log pi_theta(token)   the policy that is trained; carries the gradient
    logp_old  (N, L)  log pi_old(token)     the policy that sampled; equal to logp at the first update of a rollout
    logp_ref  (N, L)  log pi_ref(token)     the frozen policy that the KL term holds on to
    mask      (N, L)  1 at the response's tokens, end of turn included; 0 at padding

Log-probabilities are float32 or better. What stands in them where mask is 0 does not matter, -inf and NaN included.
"""

import torch
from torch import Tensor

LOSSES = ("grpo", "dr_grpo", "dapo")


def group_advantages(rewards: Tensor, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """Eq. 10-11: A = (R - mu_R) / sigma_R within each group; rewards (B, G) -> advantages (B, G).

    sigma_R is the population standard deviation (1/G, as printed), plus `eps`; a group of equal rewards, or of one
    response, gets exactly 0. `scale_by_std=False` leaves the division out, as Dr. GRPO does.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; expected (B prompts, G responses each)")
    rewards = rewards - rewards[:, :1]  # changes nothing but rounding: equal rewards now give 0, not 1e-8 / eps
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True, correction=0) + eps)
    return advantages


def kl_to_reference(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """The k3 estimate of KL(pi_theta || pi_ref) at every token: exp(q) - q - 1 with q = logp_ref - logp; (N, L).

    Never negative, 0 where the two agree, and its gradient 1 - exp(q) depends on the reference (that of the plain
    log-ratio, k1, does not).
    """
    q = logp_ref.detach() - logp
    return q.exp() - q - 1


def policy_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    logp_ref: Tensor | None = None,
    beta: float = 0.0,
    loss: str = "grpo",
    n_sequences: int | None = None,
    n_tokens: int | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 12 as GRPO climbs it: -mean[ min(ratio A, clamp(ratio, 1 - clip, 1 + clip_high) A) - beta KL ].

    logp, logp_old, logp_ref, mask (N, L), advantages (N,) -> (scalar loss, statistics).

    `loss` says what the mean is over:
        grpo      the tokens of each response, then the responses:  sum_n (sum_t l_nt / length_n) / n_sequences
        dr_grpo   as if all were max_length long:                   sum_nt l_nt / (n_sequences * max_length)
        dapo      all tokens alike:                                 sum_nt l_nt / n_tokens
    n_sequences and n_tokens count the responses and the unmasked tokens of the whole optimizer step, over all ranks and
    micro-batches; then the losses of the micro-batches add up to the loss of the whole. Default: of this call.
    `max_length` is the longest response that may be sampled (default L, which varies with the padding).
    `clip_high` (default: clip) is the clip above 1, DAPO's clip-higher.

    statistics are detached sums over this call's unmasked tokens, to be added up over micro-batches and ranks and then
    divided by their `tokens`: `tokens` (the count), `ratio`, `clip_low` and `clip_high` (tokens whose gradient the clip
    took away: A < 0 below 1 - clip, A > 0 above 1 + clip_high), and `kl` where logp_ref is given.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; there are {', '.join(LOSSES)}")
    if beta and logp_ref is None:
        raise ValueError(f"beta is {beta}, and the KL term needs logp_ref")
    if not logp.shape == logp_old.shape == mask.shape or advantages.shape != logp.shape[:1]:
        got = [tuple(t.shape) for t in (logp, logp_old, mask, advantages)]
        raise ValueError(f"expected logp, logp_old, mask (N, L) and advantages (N,); got shapes {got}")
    mask = mask.bool()
    high = clip if clip_high is None else clip_high
    A = advantages.detach()[:, None]                                             # (N, 1)

    # masked_fill before exp: what stands in the padding reaches neither the loss nor the gradient
    log_ratio = (logp - logp_old.detach()).masked_fill(~mask, 0)                 # (N, L)
    ratio = log_ratio.exp()
    unclipped = ratio * A
    clipped = ratio.clamp(1 - clip, 1 + high) * A
    per_token = -torch.min(unclipped, clipped)                                   # (N, L)

    statistics = {
        "tokens": mask.sum(),
        "ratio": (ratio * mask).sum(),
        "clip_low": ((ratio < 1 - clip) & (A < 0) & mask).sum(),
        "clip_high": ((ratio > 1 + high) & (A > 0) & mask).sum(),
    }
    if logp_ref is not None:
        kl = kl_to_reference(logp.masked_fill(~mask, 0), logp_ref.masked_fill(~mask, 0))
        statistics["kl"] = kl.sum()
        if beta:
            per_token = per_token + beta * kl
    per_token = per_token * mask

    if loss == "grpo":
        total = (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()
        normaliser = len(logp) if n_sequences is None else n_sequences
    elif loss == "dr_grpo":
        total = per_token.sum()
        normaliser = (len(logp) if n_sequences is None else n_sequences) * (max_length or logp.shape[1])
    else:
        total = per_token.sum()
        normaliser = mask.sum() if n_tokens is None else n_tokens
    # clamp: a step whose every token is masked has loss 0, not 0 / 0
    return total / torch.as_tensor(normaliser).clamp(min=1), {k: v.detach() for k, v in statistics.items()}
