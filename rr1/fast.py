"""The same numbers in less time: `fast.enable(model)`, once after loading. Delete this file and
those calls, and everything but `rr1.certify` still runs.

    scoring     attention over packed rows in two parts, so that what one response could look at in
                another is never computed
    sampling    a decoding step by hand, over buffers that were made once

docs/learn/sharing.md draws it, docs/dev/benchmarks.md says what it is worth. The functions that
stand in for these where they are not switched on: `vlm.attention_mask`, `rollout.new_cache`,
`rollout.decoding_step`.

Shapes: packed rows (B, N) hold R responses in all; P tokens of the longest prompt, L of the longest
response; `shared` key heads, each for `share` of the heads; q new tokens a row, n columns so far.
"""

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
    is_prompt = owner == PROMPT
    prompt_length = is_prompt.sum(dim=1)  # (B,)
    P = int(prompt_length.max())
    column = (owner >= 0).flatten().nonzero()[:, 0]  # of all response tokens, (T,)
    # a number of its own for each response, (T,)
    response = column // N * N + owner.flatten()[column]
    length = response.unique_consecutive(return_counts=True)[1]  # (R,)
    own = pad_sequence(column.split(length.tolist()), batch_first=True)  # (R, L)
    R, L = own.shape
    row = own[:, 0] // N  # (R,)

    token = torch.arange(max(P, L), device=owner.device)
    in_prompt = token[:P] < prompt_length[:, None]  # (B, P)
    in_response = token[:L] < length[:, None]  # (R, L)
    place = torch.zeros_like(owner)
    place[is_prompt] = in_prompt.flatten().nonzero()[:, 0]
    place[owner >= 0] = B * P + in_response.flatten().nonzero()[:, 0]

    sees_prompt = in_prompt[row][:, None].expand(R, L, P)
    sees_itself = in_response.new_ones(L, L).tril().expand(R, L, L)
    mask = additive(torch.cat([sees_prompt, sees_itself], dim=2), share, dtype)
    return {"full_attention": Branches(P, row, own, place, mask)}


def additive(visible: Tensor, share: int, dtype: torch.dtype) -> Tensor:
    """What rows may look at, (B, q, n), -> (B, 1, share q, n), 0 or -inf: added to the scores."""
    mask = torch.where(visible, 0.0, float("-inf")).to(dtype)
    return mask.repeat(1, share, 1)[:, None]


def branch_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Branches | Tensor | None,
    scaling: float | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Attention of packed rows: query (B, heads, N, size), key and value (B, shared, N, size) ->
    (B, N, heads, size). With any other mask it is the attention of `transformers`."""
    packed = attention_mask
    if not isinstance(packed, Branches):
        options |= {"attention_mask": packed, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, **options)
    P = packed.P
    R, L = packed.own.shape
    _, heads, _, size = query.shape
    shared = key.shape[1]

    # (.., heads, columns, size) -> (all columns, heads, size)
    def by_column(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    # (B, heads, N, size) -> (R, heads, L, size)
    def of_responses(x: Tensor) -> Tensor:
        return by_column(x)[packed.own].transpose(1, 2)

    # 1. the prompts, each causally among itself
    prompt_key = key[:, :, :P]
    prompt_value = value[:, :, :P]
    of_prompts = F.scaled_dot_product_attention(
        query[:, :, :P],
        prompt_key,
        prompt_value,
        is_causal=True,
        scale=scaling,
        enable_gqa=True,
    )
    # 2. the responses, each at its prompt and itself; heads that share keys: rows of one product
    # (R, shared, P + L, size) each
    keys = torch.cat([prompt_key[packed.row], of_responses(key)], dim=2)
    values = torch.cat([prompt_value[packed.row], of_responses(value)], dim=2)
    mixed = F.scaled_dot_product_attention(
        of_responses(query).reshape(R, shared, -1, size),
        keys,
        values,
        attn_mask=packed.mask,
        scale=scaling,
    )
    # 3. back to the columns of the rows
    results = by_column(of_prompts), by_column(mixed.reshape(R, heads, L, size))
    return torch.cat(results)[packed.place], None


AttentionInterface.register("branches", branch_attention)
AttentionMaskInterface.register("branches", sdpa_mask)


# ---------------------------------------------------------------- sampling


class Columns(DynamicLayer):
    """Keys and values of a layer in buffers of their final length: nothing is copied to grow. Keys
    are kept in the values' dtype, in which they are multiplied: autocast rotates in float32."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.used = 0

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        B, shared, _, size = values.shape
        self.keys = values.new_zeros(B, shared, self.capacity, size)
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Add new columns (B, shared, q, size) -> all (B, shared, n, size)."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        new = slice(self.used, self.used + keys.shape[2])
        self.keys[:, :, new] = keys
        self.values[:, :, new] = values
        self.used = new.stop
        return self.keys[:, :, : new.stop], self.values[:, :, : new.stop]

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
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(turned, dim=-1)


def decoding_step(
    model,
    embeddings: Tensor,
    position: Tensor,
    visible: Tensor,
    cache: Cache,
) -> Tensor:
    """`rollout.decoding_step`, where heads that share keys are rows of one product, so that no key
    is copied for each of them."""
    text = model.model.language_model
    x = embeddings
    B, q, _ = x.shape
    heads = text.config.num_attention_heads
    shared = text.config.num_key_value_heads
    # in float32, as the library has it: (B, 1, 1, size / 2)
    angle = position[:, None, None, None].float() * text.rotary_emb.inv_freq.float()
    scale = text.rotary_emb.attention_scaling
    cos = (angle.cos() * scale).to(x.dtype)
    sin = (angle.sin() * scale).to(x.dtype)
    mask = additive(visible, heads // shared, cache.layers[0].keys.dtype)

    for layer, columns in zip(text.layers, cache.layers, strict=True):
        attention = layer.self_attn
        by_head = (B, q, -1, attention.head_dim)
        h = norm(layer.input_layernorm, x)
        queries = attention.q_proj(h).view(by_head).transpose(1, 2)  # (B, heads, q, size)
        keys = attention.k_proj(h).view(by_head).transpose(1, 2)  # (B, shared, q, size)
        values = attention.v_proj(h).view(by_head).transpose(1, 2)
        keys = rotate(keys, cos, sin)
        keys, values = columns.update(keys, values)  # (B, shared, n, size) each
        mixed = F.scaled_dot_product_attention(
            rotate(queries, cos, sin).reshape(B, shared, -1, attention.head_dim),
            keys,
            values,
            attn_mask=mask,
        )
        mixed = mixed.reshape(B, heads, q, -1).transpose(1, 2)
        x = x + attention.o_proj(mixed.reshape(B, q, -1))
        x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
    return norm(text.norm, x)
