"""Attention over packed rows, [prompt, response 1 .. response G]: a response sees the prompt and itself.

Two ways, the same numbers: `Branches` takes the square in two parts, by the attention that PyTorch has everywhere; `block_mask` is for
FlexAttention (https://pytorch.org/blog/flexattention/), on a GPU. docs/sharing.md has the drawing.

Shapes: B rows of N columns, R responses in all, P tokens of the longest prompt, L of the longest response, H hidden size.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which x is multiplied here: autocast's where that is on, else its own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


@dataclass
class Branches:
    """Packed rows as their attention needs them: B rows of N columns, R responses in all, the longest prompt P, the longest response L."""
    P: int
    row: torch.Tensor                # (R,) the row that a response is in
    own: torch.Tensor                # (R, L) its columns, counted through all rows, (B N)
    mask: torch.Tensor               # (R, 1, S L, P + L) added to the scores of prompt and response: 0 or -inf; S heads share keys
    place: torch.Tensor              # (B, N) where a column's result is among those of prompts, (B P), then responses, (R L)

    @classmethod
    def of(cls, prompts: Sequence[int], starts: Sequence[tuple[int, int]], lengths: Sequence[int], rows: torch.Tensor, share: int) -> "Branches":
        """From the lengths of B prompts, (row, first column) and length of each response, the rows themselves, (B, N, H), and how many heads
        share keys."""
        (B, N, _), P, L, device = rows.shape, max(prompts), max(lengths), rows.device
        row, first = torch.tensor(starts).T
        inside = torch.arange(L) < torch.tensor(lengths)[:, None]                   # (R, L)
        own = ((row * N + first)[:, None] + torch.arange(L)).where(inside, 0)
        place = torch.zeros(B * N, dtype=torch.long)
        for b, n in enumerate(prompts):
            place[b * N:b * N + n] = b * P + torch.arange(n)
        place[own[inside]] = (B * P + torch.arange(len(starts) * L)).view(-1, L)[inside]
        hidden = torch.cat([(torch.arange(P) >= torch.tensor(prompts)[row][:, None])[:, None].expand(-1, L, -1),
                            torch.ones(L, L, dtype=torch.bool).triu(1).expand(len(starts), L, L)], 2).to(device)
        mask = torch.zeros(hidden.shape, dtype=product_dtype(rows), device=device).masked_fill_(hidden, float("-inf")).repeat(1, share, 1)[:, None]
        return cls(P, row.to(device), own.to(device), mask, place.view(B, N).to(device))


def block_mask(prompts: Sequence[int], starts: Sequence[tuple[int, int]], lengths: Sequence[int], rows: torch.Tensor) -> BlockMask:
    """The same rows, given as to `Branches.of`, for FlexAttention: one kernel that skips the blocks of 128 x 128 that nothing may look at.
    Padding sees the prompt and itself, so that no row is without a place to look at; nobody reads what it becomes."""
    torch._dynamo.config.recompile_limit = 64           # B, N and the mode change; past the default of 8 all N x N scores would be made
    (B, N, _), device = rows.shape, rows.device
    owner = torch.full((B, N), -2)                                                  # -1 the prompt, r a response's, -2 padding
    for b, n in enumerate(prompts):
        owner[b, :n] = -1
    for r, ((b, first), n) in enumerate(zip(starts, lengths, strict=True)):
        owner[b, first:first + n] = r
    owner = owner.to(device)

    def visible(b, head, q, k):
        return (k <= q) & ((owner[b, k] == -1) | (owner[b, k] == owner[b, q]))
    return create_block_mask(visible, B, None, N, N, device=device)


def branch_attention(module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, scaling=None, **options):
    """Attention of packed rows: query (B, heads, N, head size), key, value (B, shared heads, N, head size) -> (B, N, heads, head size).

    Prompts look at themselves, causally. Responses, as a batch of R, look at their prompt and at themselves. What one response could look
    at in another is never computed; of an (N, N) mask it would be most. With any other mask this is the attention of `transformers`.
    """
    if isinstance(attention_mask, BlockMask):                                       # under autocast the rotation leaves float32
        return flex_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, scaling=scaling, **options)
    if not isinstance(attention_mask, Branches):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    b, heads, shared = attention_mask, query.shape[1], key.shape[1]
    share, (R, L) = heads // shared, b.own.shape
    front = F.scaled_dot_product_attention(query[:, :, :b.P], *(x[:, :, :b.P].repeat_interleave(share, 1) for x in (key, value)),
                                           is_causal=True, scale=scaling)                                     # (B, heads, P, head size)
    own = lambda x: x.transpose(1, 2).flatten(0, 1)[b.own].transpose(1, 2)                                    # (R, heads, L, head size)
    seen = lambda x: torch.cat([x[:, :, :b.P][b.row], own(x)], 2)                                             # (R, heads, P + L, head size)
    back = F.scaled_dot_product_attention(own(query).reshape(R, shared, share * L, -1), seen(key), seen(value),
                                          attn_mask=b.mask, scale=scaling).reshape(R, heads, L, -1)
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in (front, back)])[b.place], None


AttentionInterface.register("branches", branch_attention)
AttentionMaskInterface.register("branches", sdpa_mask)
