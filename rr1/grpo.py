"""Eq. 10-12: group-relative policy optimisation. Tensors in, tensors out.

    B  prompts in the batch            N = B * G  responses
    G  responses to each prompt        L          response tokens, padded

    logp      (N, L)  log pi_theta(token)   the policy that is trained; carries the gradient
    logp_old  (N, L)  log pi_old(token)     the policy that sampled; at the first update, logp
    logp_ref  (N, L)  log pi_ref(token)     the frozen policy that the KL term holds on to
    mask      (N, L)  1 at the response's tokens, end of turn included; 0 at padding

Log-probabilities are float32 or better; where mask is 0 they may be anything, -inf and NaN too.
"""

import torch
from torch import Tensor

LOSSES = ("grpo", "dr_grpo", "dapo")
# exp of it is 5e8: far beyond any clip, far below what float32 holds
LARGEST_EXPONENT = 20.0


def group_advantages(
    rewards: Tensor, scale_by_std: bool = True, eps: float = 1e-4
) -> Tensor:
    """Eq. 10-11: A = (R - mu_R) / sigma_R within each group; (B, G) -> (B, G).

    sigma_R is the population standard deviation (1/G, as printed), plus `eps`. A group of equal
    rewards, or of one response, gets exactly 0. Dr. GRPO does not divide: `scale_by_std=False`.
    """
    if rewards.ndim != 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}; expected (B prompts, G each)"
        )
    # so that equal rewards give 0, and not rounding / eps
    rewards = rewards - rewards[:, :1]
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True, correction=0) + eps)
    return advantages


def kl_to_reference(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """The k3 estimate of KL(pi_theta || pi_ref): exp(q) - q - 1 with q = logp_ref - logp; (N, L).

    It is never negative, and 0 where the two agree. Its gradient 1 - exp(q) depends on the
    reference; that of the plain log-ratio, k1, does not. Beyond LARGEST_EXPONENT q is a constant.
    """
    q = (logp_ref.detach() - logp).clamp(max=LARGEST_EXPONENT)
    return q.exp() - q - 1


def clipped_objective(ratio: Tensor, A: Tensor, clip: float, clip_high: float) -> Tensor:
    """min(ratio A, clamp(ratio, 1 - clip, 1 + clip_high) A); ratio (N, L), A (N, 1) -> (N, L).

    Eq. 3 of Shao et al. 2024 (arXiv 2402.03300), who have min and clamp from PPO.
    """
    unclipped = ratio * A
    clipped = ratio.clamp(1 - clip, 1 + clip_high) * A
    return torch.min(unclipped, clipped)


def average(per_token, mask, loss, n_sequences, n_tokens, max_length) -> Tensor:
    """The mean of per_token (N, L), which is 0 where mask (N, L) is 0; see `policy_loss`."""
    if loss == "grpo":
        per_token = per_token / mask.sum(dim=1, keepdim=True).clamp(min=1)
        normaliser = n_sequences
    elif loss == "dr_grpo":
        normaliser = n_sequences * max_length
    else:
        normaliser = n_tokens
    # clamp: a step whose every token is masked has loss 0, not 0 / 0
    return per_token.sum() / torch.as_tensor(normaliser).clamp(min=1)


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
    """Eq. 12 as GRPO climbs it: -mean[ clipped objective - beta KL ] -> (scalar, statistics).

    `loss` says what the mean of the terms l_nt is over:
        grpo     each response's tokens, then responses: sum_n (sum_t l_nt / length_n) / n_sequences
        dr_grpo  as if all were max_length long:         sum_nt l_nt / (n_sequences * max_length)
        dapo     all tokens alike:                       sum_nt l_nt / n_tokens
    n_sequences and n_tokens (default: of this call) count the responses and unmasked tokens of the
    whole step, over all ranks and micro-batches: then the losses of the micro-batches add up to
    that of the whole. `max_length` is the longest that a response may be (default L, which varies
    with the padding). `clip_high` (default: clip) is the clip above 1, DAPO's clip-higher.

    The statistics are detached sums over unmasked tokens, to be added up like the losses and then
    divided by `tokens`, their count: `ratio`; `clip_low` and `clip_high`, tokens whose gradient the
    clip took away (A < 0 below 1 - clip, A > 0 above 1 + clip_high); `kl` where logp_ref is given.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; there are {', '.join(LOSSES)}")
    if beta and logp_ref is None:
        raise ValueError(f"beta is {beta}, and the KL term needs logp_ref")
    if not logp.shape == logp_old.shape == mask.shape or advantages.shape != logp.shape[:1]:
        got = [tuple(t.shape) for t in (logp, logp_old, mask, advantages)]
        raise ValueError(f"expected (N, L) thrice and advantages (N,); got {got}")
    mask = mask.bool()
    A = advantages.detach()[:, None]  # (N, 1)
    high = clip if clip_high is None else clip_high

    # masked_fill before exp: what stands in the padding reaches neither the loss nor the gradient
    log_ratio = (logp - logp_old.detach()).masked_fill(~mask, 0)  # (N, L)
    ratio = log_ratio.clamp(max=LARGEST_EXPONENT).exp()
    per_token = -clipped_objective(ratio, A, clip, high)  # (N, L)
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

    N, L = logp.shape
    n_sequences = N if n_sequences is None else n_sequences
    n_tokens = mask.sum() if n_tokens is None else n_tokens
    value = average(per_token * mask, mask, loss, n_sequences, n_tokens, max_length or L)
    return value, {name: total.detach() for name, total in statistics.items()}
