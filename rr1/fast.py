"""The same numbers in less time: `fast.enable(model)`, once after loading. Delete this file and
those calls, and everything still runs.

    scoring     attention over packed rows in two parts, so that what one response could look at in
                another is never computed
    sampling    a decoding step by hand, over buffers that were made once

docs/sharing.md draws it, docs/benchmarks.md says what it is worth. The functions that stand in for
these where they are not switched on: `vlm.attention_mask`, `rollout.new_cache`,
`rollout.decoding_step`.

Shapes: packed rows (B, N) hold R responses in all; P tokens of the longest prompt, L of the longest
response; `shared` key heads, each for `share` of the heads; q new tokens a row, n columns so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rr1.vlm import PROMPT


def enable(model) -> None:
    """Let `vlm.group_logps` and `rollout.sample_group` compute with this model what is below."""
    text = model.model.language_model
    text.set_attn_implementation("branches")
    share = text.config.num_attention_heads // text.config.num_key_value_heads
    model.fast_mask = partial(branches, share)
    model.fast_cache = new_cache
    model.fast_step = decoding_step


# ---------------------------------------------------------------- scoring


@dataclass
class Branches:
    """Packed rows as their attention needs them."""

    P: int
    row: Tensor  # (R,) the row that a response is in
    own: Tensor  # (R, L) its columns, counted through all rows, (B N); 0 for padding
    place: Tensor  # (B, N) where a column's result is, among those of the prompts, (B P), and then
    #                those of the responses, (R L)
    mask: Tensor  # (R, 1, share L, P + L) added to the scores of prompt and response: 0 or -inf


def branches(share: int, owner: Tensor, dtype: torch.dtype) -> dict[str, Branches]:
    """Owners of the columns (B, N), as in `vlm.Packed`.

    For the row  p p p p a a b  with the columns 0 .. 6:  own = [[4, 5], [6, 0]],
    place = [0, 1, 2, 3, 4, 5, 6], since a's results are 4 and 5, b's 6 and 7.
    """
    B, N = owner.shape
    prompt_length = (owner == PROMPT).sum(dim=1)  # (B,)
    P = int(prompt_length.max())
    column = (owner.flatten() >= 0).nonzero()[:, 0]  # of all response tokens, (T,)
    response = column // N * N + owner.flatten()[column]  # a number of its own for each, (T,)
    length = response.unique_consecutive(return_counts=True)[1]  # (R,)
    own = pad_sequence(column.split(length.tolist()), batch_first=True)  # (R, L)
    R, L = own.shape
    is_token = torch.arange(L, device=owner.device) < length[:, None]  # (R, L)
    row = own[:, 0] // N  # (R,)

    in_prompt = torch.arange(P, device=owner.device) < prompt_length[:, None]  # (B, P)
    place = torch.zeros(B, N, dtype=torch.long, device=owner.device)
    place[owner == PROMPT] = in_prompt.flatten().nonzero()[:, 0]
    place[owner >= 0] = B * P + is_token.flatten().nonzero()[:, 0]

    sees_prompt = in_prompt[row][:, None].expand(R, L, P)
    sees_itself = is_token.new_ones(L, L).tril().expand(R, L, L)
    visible = torch.cat([sees_prompt, sees_itself], dim=2)
    mask = torch.zeros(visible.shape, dtype=dtype, device=owner.device)
    mask = mask.masked_fill(~visible, float("-inf")).repeat(1, share, 1)[:, None]
    return {"full_attention": Branches(P, row, own, place, mask)}


def branch_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **options
):
    """Attention of packed rows: query (B, heads, N, size), key and value (B, shared, N, size) ->
    (B, N, heads, size). With any other mask it is the attention of `transformers`."""
    packed = attention_mask
    if not isinstance(packed, Branches):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    heads, shared, size = query.shape[1], key.shape[1], query.shape[3]
    P, (R, L) = packed.P, packed.own.shape

    def by_column(x: Tensor) -> Tensor:  # (.., heads, columns, size) -> (all columns, heads, size)
        return x.transpose(1, 2).flatten(0, 1)

    def of_responses(x: Tensor) -> Tensor:  # (B, heads, N, size) -> (R, heads, L, size)
        return by_column(x)[packed.own].transpose(1, 2)

    # 1. the prompts, each causally among itself
    prompt_key, prompt_value = key[:, :, :P], value[:, :, :P]
    of_prompts = F.scaled_dot_product_attention(
        query[:, :, :P], prompt_key, prompt_value, is_causal=True, scale=scaling, enable_gqa=True
    )
    # 2. the responses, each at its prompt and itself; heads that share keys: rows of one product
    keys = torch.cat([prompt_key[packed.row], of_responses(key)], dim=2)  # (R, shared, P + L, size)
    values = torch.cat([prompt_value[packed.row], of_responses(value)], dim=2)
    queries = of_responses(query).reshape(R, shared, heads // shared * L, size)
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=packed.mask, scale=scaling
    )
    # 3. back to the columns of the rows
    mixed = mixed.reshape(R, heads, L, size)
    return torch.cat([by_column(of_prompts), by_column(mixed)])[packed.place], None


AttentionInterface.register("branches", branch_attention)
AttentionMaskInterface.register("branches", sdpa_mask)


# ---------------------------------------------------------------- sampling


class Columns(DynamicLayer):
    """Keys and values of a layer in buffers of their final length: nothing is copied to grow. Keys
    are kept in the values' dtype, in which they are multiplied: autocast rotates in float32."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.used = capacity, 0

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        B, shared, _, size = values.shape
        self.keys = values.new_zeros(B, shared, self.capacity, size)
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Add new columns (B, shared, q, size) -> all (B, shared, n, size)."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        start, self.used = self.used, self.used + keys.shape[2]
        self.keys[:, :, start : self.used] = keys
        self.values[:, :, start : self.used] = values
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used


def new_cache(model, columns: int) -> Cache:
    return Cache(layers=[Columns(columns) for _ in model.model.language_model.layers])


def norm(layer, x: Tensor) -> Tensor:
    """RMSNorm in one operation."""
    return F.rms_norm(x, x.shape[-1:], layer.weight, layer.variance_epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, heads, q, size): the pair (x_i, x_{i + size/2}) is turned by its
    angle. For text the three axes of M-RoPE say the same."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def decoding_step(
    model, embeddings: Tensor, position: Tensor, visible: Tensor, cache: Cache
) -> Tensor:
    """`rollout.decoding_step`, where heads that share keys are rows of one product, so that no key
    is copied for each of them."""
    text, x = model.model.language_model, embeddings
    B, q, _ = x.shape
    shared = text.config.num_key_value_heads
    share = text.config.num_attention_heads // shared
    # in float32, as the library has it: (B, 1, 1, size / 2)
    angle = position[:, None, None, None].float() * text.rotary_emb.inv_freq.float()
    scale = text.rotary_emb.attention_scaling
    cos, sin = (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)
    mask = torch.zeros(visible.shape, dtype=cache.layers[0].keys.dtype, device=x.device)
    mask = mask.masked_fill(~visible, float("-inf")).repeat(1, share, 1)[:, None]

    for layer, columns in zip(text.layers, cache.layers, strict=True):
        attention = layer.self_attn
        by_head = (B, q, -1, attention.head_dim)
        h = norm(layer.input_layernorm, x)
        queries = rotate(attention.q_proj(h).view(by_head).transpose(1, 2), cos, sin)
        keys = rotate(attention.k_proj(h).view(by_head).transpose(1, 2), cos, sin)
        values = attention.v_proj(h).view(by_head).transpose(1, 2)  # (B, shared, q, size)
        keys, values = columns.update(keys, values)  # (B, shared, n, size)
        queries = queries.reshape(B, shared, share * q, -1)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        mixed = mixed.reshape(B, shared * share, q, -1).transpose(1, 2).reshape(B, q, -1)
        x = x + attention.o_proj(mixed)
        x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
    return norm(text.norm, x)
