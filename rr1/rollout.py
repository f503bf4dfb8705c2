"""Sample G responses to one prompt from one prefill.

Shapes: B prompts, G responses each, N = B G rows, P tokens of the longest prompt, V vocabulary.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from rr1.vlm import Prompt, embed, scale_logits

SHRINK_AT = 0.75                     # rows that ended leave the batch once fewer than this share of it is still writing


@dataclass
class Rollout:
    """One sampled response: token ids (the end-of-turn token included unless cut off), the sampler's own log-probabilities."""
    ids: list[int]
    logps: list[float]
    truncated: bool


def _left_pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_side="left")


def next_token_logps(logits: torch.Tensor, temperature: float = 1.0, banned: Sequence[int] = (), top_k: int = 0,
                     top_p: float = 1.0) -> torch.Tensor:
    """(N, V) logits -> (N, V) log-probabilities to sample from. Temperature 0 is greedy: all weight on the largest logit."""
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logps = scale_logits(logits, temperature, banned).log_softmax(-1)
    if top_k or top_p < 1:
        ordered, index = logps.sort(dim=-1, descending=True, stable=True)
        outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p                # the mass before a token already reaches top_p
        if top_k:
            outside[:, top_k:] = True
        logps = logps.masked_fill(outside.scatter(-1, index, outside), float("-inf")).log_softmax(-1)
    return logps


def pick(logps: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """(N, V) log-probabilities and (N,) uniform numbers -> (N,) tokens: the first whose cumulative probability exceeds u."""
    cumulative = logps.exp().cumsum(-1)
    token = torch.searchsorted(cumulative, (u[:, None] * cumulative[:, -1:]), right=True)[:, 0]
    last = logps.shape[-1] - 1 - logps.isfinite().flip(-1).long().argmax(-1)       # rounding must not reach past the last possible
    return torch.minimum(token, last)


@torch.no_grad()
def sample_group(model, prompts: Sequence[Prompt], G: int, seeds: Sequence[int], *, end_id: int, max_new_tokens: int,
                 temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, banned: Sequence[int] = ()) -> list[list[Rollout]]:
    """G responses to each of B prompts -> B lists of G rollouts.

    The prompt is prefilled once and its cache expanded to G rows. A prompt's random numbers come from its own seed, so what is
    sampled does not depend on which prompts share the batch, on micro-batches or on the number of GPUs. `banned` ids are
    never sampled.
    """
    B, device = len(prompts), model.device
    ids, lengths = _left_pad([p.ids for p in prompts]), torch.tensor([len(p.ids) for p in prompts], device=device)
    P = ids.shape[1]
    attention = torch.zeros(B, P + max_new_tokens, dtype=torch.long, device=device)
    attention[:, P:] = 1
    attention[:, :P] = torch.arange(P, device=device) >= P - lengths[:, None]
    positions = _left_pad([p.positions.T for p in prompts]).permute(2, 0, 1)       # (3, B, P)
    cache = DynamicCache(config=model.config.text_config)
    run = model.model.language_model
    hidden = run(inputs_embeds=embed(model, ids, torch.cat([p.features for p in prompts])), attention_mask=attention[:, :P],
                 position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]       # (B, H)

    cache.batch_repeat_interleave(G)
    hidden, attention = hidden.repeat_interleave(G, 0), attention.repeat_interleave(G, 0)
    position = torch.tensor([p.next_position for p in prompts], device=device).repeat_interleave(G)
    u = torch.cat([torch.rand(G, max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)

    rows = torch.arange(B * G, device=device)                                      # which response each row of the batch writes
    writing = torch.ones(B * G, dtype=torch.bool, device=device)
    tokens = torch.full((B * G, max_new_tokens), -1, device=device)
    chosen_logps = torch.zeros(B * G, max_new_tokens, device=device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for t in range(max_new_tokens):
        logps = next_token_logps(model.lm_head(hidden), temperature, banned, top_k, top_p)
        token = pick(logps, u[rows, t])
        tokens[rows[writing], t] = token[writing]
        chosen_logps[rows, t] = logps.gather(-1, token[:, None])[:, 0]
        writing &= token != end_id
        if t + 1 == max_new_tokens or not writing.any():
            break
        if writing.float().mean() < SHRINK_AT:
            cache.batch_select_indices(writing)
            rows, position, attention, token = rows[writing], position[writing], attention[writing], token[writing]
            writing = writing[writing]
        hidden = run(inputs_embeds=model.get_input_embeddings()(token[:, None]), attention_mask=attention[:, :P + t + 1],
                     position_ids=(position + t).expand(3, -1)[..., None], past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    out = []
    for row, logp, n in zip(tokens.tolist(), chosen_logps.tolist(), (tokens >= 0).sum(1).tolist()):
        out.append(Rollout(row[:n], logp[:n], truncated=row[n - 1] != end_id))
    return [out[b * G:(b + 1) * G] for b in range(B)]
