"""Sample G responses to one prompt from one prefill.

The G responses are written into one row of the cache, behind the one prompt: [prompt, G first tokens, G second tokens, ..]. A
mask lets each response see the prompt and itself, as in the packed row that is scored (`rr1.vlm.group_logps`), so the cache holds
P + G L columns a group instead of G (P + L), and a decoding step reads the prompt's keys once for the whole group.

Shapes: B prompts, G responses each, q of them still being written, P tokens of the longest prompt, L new tokens at most, V
vocabulary.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer

from rr1.branches import product_dtype
from rr1.vlm import Prompt, embed, hidden_states, scale_logits

SHRINK_AT = 0.75                     # what has ended leaves the batch once the batch without it is smaller than this share


@dataclass
class Rollout:
    """One sampled response: token ids (the end-of-turn token included unless cut off), the sampler's own log-probabilities."""
    ids: list[int]
    logps: list[float]
    truncated: bool

    @property
    def length(self) -> int:
        """Tokens without the end of turn, which one that was cut off does not have."""
        return len(self.ids) - (not self.truncated)


class Columns(DynamicLayer):
    """Keys and values of one layer in buffers of their final length: a step writes its columns, nothing is copied to grow. Keys are kept
    in the values' dtype: under autocast they come in float32, out of the rotation, and attention would narrow all of them every step.

    weight, bias: those that make a layer's queries, keys and values, one below the other, so that a decoding step has one product for
    all (and hooks on the three are not called). A copy for the time of a rollout, in the dtype of the pass: 0.4 GB of the 3B model in bfloat16."""

    def __init__(self, capacity: int, attention):
        super().__init__()
        self.capacity, self.prefilled = capacity, 0
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        if any(type(part) is not torch.nn.Linear for part in parts):
            raise TypeError(f"q_proj, k_proj and v_proj must be torch.nn.Linear to be sampled from, not {type(parts[0]).__name__}, "
                            f"{type(parts[1]).__name__}, {type(parts[2]).__name__}: merge adapters into the weights first")
        self.weight, self.bias = (torch.cat(tensors).to(product_dtype(tensors[0])) for tensors in zip(*((p.weight, p.bias) for p in parts)))

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts' keys and values (B, heads, P, head size), which fill the first columns; they come back as they are."""
        self.keys, self.values = (values.new_zeros(*new.shape[:2], self.capacity, new.shape[3]) for new in (keys, values))
        self.keys[:, :, :keys.shape[2]], self.values[:, :, :keys.shape[2]] = keys, values
        self.is_initialized, self.prefilled = True, keys.shape[2]
        return keys, values

    def write(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor) -> None:
        """New columns (B, heads, q, head size) go to the places `at` (q,)."""
        self.keys.index_copy_(2, at, keys.to(self.keys.dtype)), self.values.index_copy_(2, at, values.to(self.values.dtype))

    def get_seq_length(self) -> int:
        return self.prefilled


def decode(model, x: torch.Tensor, position: torch.Tensor, visible: torch.Tensor, at: torch.Tensor, cache: Cache) -> torch.Tensor:
    """The language model on new tokens: embeddings x (B, q, H), all q of a group at one position (B,) -> hidden states (B, q, H).
    visible (B, q, n): which of the first n columns each may look at; at (q,): the columns that its keys and values are written to.

    What the layers of `transformers` compute, in fewer operations: for text the three parts of M-RoPE are one rotation, queries, keys and
    values are one product, and the heads that share keys are rows of one product, so that no key is copied for each of them.
    """
    text, (B, q, H) = model.model.language_model, x.shape
    heads, shared = text.config.num_attention_heads, text.config.num_key_value_heads
    angle = position[:, None, None, None].float() * text.rotary_emb.inv_freq.float()                           # (B, 1, 1, half a head)
    cos, sin = ((f(angle) * text.rotary_emb.attention_scaling).to(x.dtype) for f in (torch.cos, torch.sin))
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    turn = lambda x: torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    mask = torch.zeros_like(visible, dtype=cache.layers[0].keys.dtype).masked_fill_(~visible, float("-inf"))[:, None].repeat(1, 1, heads // shared, 1)
    norm = lambda layer, x: F.rms_norm(x, (H,), layer.weight, layer.variance_epsilon)
    for layer, columns in zip(text.layers, cache.layers):
        attention, h = layer.self_attn, norm(layer.input_layernorm, x)
        made = F.linear(h, columns.weight, columns.bias).view(B, q, -1, attention.head_dim)                   # (B, q, heads + 2 shared, ..)
        queries, keys = turn(made[:, :, :-shared]).transpose(1, 2).split([heads, shared], 1)                   # (B, heads or shared heads, q, ..)
        columns.write(keys, made[:, :, -shared:].transpose(1, 2), at)
        keys, values = (buffer[:, :, :visible.shape[-1]] for buffer in (columns.keys, columns.values))
        seen = F.scaled_dot_product_attention(queries.reshape(B, shared, heads // shared * q, -1), keys, values, attn_mask=mask)
        x = x + attention.o_proj(seen.reshape(B, heads, q, -1).transpose(1, 2).reshape(B, q, -1))
        x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
    return norm(text.norm, x)


class Captured:
    """A function of CUDA tensors, recorded once as a graph of kernels and replayed from then on: one launch for all layers in place of
    some 20 for each of them (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

    A graph knows addresses, not values: what is given is copied to where the recorded kernels read, and every result comes in the same
    place as the last. Buffers that the function writes to and the weights must stay where they are, and so must all shapes.
    """

    side = None                      # one stream for all recordings: each one that cuBLAS sees costs it a workspace for good

    def __init__(self, function, *inputs: torch.Tensor):
        self.inputs = [x.clone() for x in inputs]
        side = Captured.side = Captured.side or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*self.inputs)                                                  # once before, for what is allocated on first use
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output


def _left_pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_side="left")


def next_token_logps(logits: torch.Tensor, temperature: float = 1.0, banned: Sequence[int] = (), top_k: int = 0,
                     top_p: float = 1.0) -> torch.Tensor:
    """(.., V) logits -> (.., V) log-probabilities to sample from. Temperature 0 is greedy: all weight on the largest logit."""
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logps = scale_logits(logits, temperature, banned).log_softmax(-1)
    if top_k or top_p < 1:
        ordered, index = logps.sort(dim=-1, descending=True, stable=True)
        outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p                # the mass before a token already reaches top_p
        if top_k:
            outside[..., top_k:] = True
        logps = logps.masked_fill(outside.scatter(-1, index, outside), float("-inf")).log_softmax(-1)
    return logps


def pick(logps: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """(N, V) log-probabilities and (N,) uniform numbers -> (N,) tokens: the first whose cumulative probability exceeds u."""
    cumulative = logps.exp().cumsum(-1)
    total = cumulative[:, -1:]
    below = torch.minimum(u[:, None] * total, total.nextafter(torch.zeros_like(total)))        # rounding must not reach past the last possible
    return torch.searchsorted(cumulative, below, right=True)[:, 0]


@torch.inference_mode()
def sample_group(model, prompts: Sequence[Prompt], G: int, seeds: Sequence[int], *, end_id: int, max_new_tokens: int,
                 temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, banned: Sequence[int] = (),
                 capture: bool = False) -> list[list[Rollout]]:
    """G responses to each of B prompts -> B lists of G rollouts.

    A prompt's random numbers come from its own seed, so what is
    sampled does not depend on which prompts share the batch, on micro-batches or on the number of GPUs. `banned` ids are
    never sampled. `capture` replays the decoding step as a CUDA graph (`Captured`): fewer launches. Attention then goes over all P + G L
    columns from the start, since shapes must stay, so its sums round differently; the tokens are the same up to that.
    """
    B, device = len(prompts), model.device
    ids, lengths = _left_pad([p.ids for p in prompts]), torch.tensor([len(p.ids) for p in prompts], device=device)
    P = ids.shape[1]
    is_prompt = torch.arange(P, device=device) >= P - lengths[:, None]             # (B, P)
    positions = _left_pad([p.positions.T for p in prompts]).permute(2, 0, 1)       # (3, B, P)
    cache = Cache(layers=[Columns(P + G * max_new_tokens, layer.self_attn) for layer in model.model.language_model.layers])
    embeddings = embed(model, ids, torch.cat([p.features for p in prompts]))
    group = torch.arange(B, device=device)                                         # which prompt each row of the batch is
    hidden = hidden_states(model, embeddings, (group, torch.full_like(group, P - 1)), attention_mask=is_prompt.long(),
                           position_ids=positions, past_key_values=cache, use_cache=True)                      # (B, H)

    hidden = hidden[:, None].expand(-1, G, -1)                                     # (B, q, H), here q = G
    who = torch.arange(G, device=device).expand(B, G)                              # which response each place writes, (B, q)
    writing = torch.ones(B, G, dtype=torch.bool, device=device)
    position = torch.tensor([p.next_position for p in prompts], device=device)
    owner = torch.full((B, P + G * max_new_tokens), -2, device=device)             # of each column: -1 all, -2 none, g response g
    owner[:, :P] = torch.where(is_prompt, -1, -2)
    used, eager = P, lambda *inputs: decode(model, *inputs, cache)
    step = eager
    u = torch.stack([torch.rand(G, max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)
    tokens = torch.full((B, G, max_new_tokens), -1, device=device)
    chosen_logps = torch.zeros(B, G, max_new_tokens, device=device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for t in range(max_new_tokens):
        logps = next_token_logps(model.lm_head(hidden), temperature, banned, top_k, top_p)                    # (B, q, V)
        token = pick(logps.flatten(0, 1), u[group[:, None], who, t].flatten()).view(who.shape)
        b, g = group[:, None].expand_as(who)[writing], who[writing]
        tokens[b, g, t] = token[writing]
        chosen_logps[b, g, t] = logps.gather(-1, token[..., None])[..., 0][writing]
        writing = writing & (token != end_id)
        left = writing.sum(1)
        q = int(left.max())
        if t + 1 == max_new_tokens or not q:
            break
        if q * int((left > 0).sum()) < SHRINK_AT * writing.numel():                # finished groups leave, the others close up
            rows, places = left > 0, (~writing).long().argsort(dim=1, stable=True)[:, :q]
            cache.batch_select_indices(rows)
            group, position, owner = group[rows], position[rows], owner[rows]
            who, writing, token = (x.gather(1, places)[rows] for x in (who, writing, token))
        q = who.shape[1]
        owner[:, used:used + q] = torch.where(writing, who, -2)
        columns = owner[:, None, :None if capture else used + q]
        visible = (columns == -1) | (columns == who[:, :, None])                   # (B, q, columns)
        inputs = (model.get_input_embeddings()(token), position + t, visible, used + torch.arange(q, device=device))
        used += q
        if capture and (step is eager or step.inputs[0].shape != inputs[0].shape):  # at first, and when the batch has shrunk
            step = Captured(eager, *inputs)
        hidden = step(*inputs)

    out = []
    for row, logp, n in zip(tokens.flatten(0, 1).tolist(), chosen_logps.flatten(0, 1).tolist(), (tokens >= 0).sum(2).flatten().tolist()):
        out.append(Rollout(row[:n], logp[:n], truncated=row[n - 1] != end_id))
    return [out[b * G:(b + 1) * G] for b in range(B)]
