"""Sample G responses to one prompt from one prefill.

The G responses are written into one row of the cache, behind the one prompt. Its columns are

    p p p p | a b c | a b c | a c | c        prompt p; responses a, b, c, a token of each a step

A response sees the prompt and itself, as in the packed row that is scored (`vlm.group_logps`). So
the prompt is computed once, and a step reads its keys once for the whole group. A response that has
ended leaves, a group that has ended leaves the batch.

Shapes: B prompts, G responses each, q of them still being written, P tokens of the longest prompt,
n columns of the cache, H hidden size, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache

from rr1.vlm import NOBODY, PROMPT, Prompt, embed, scale_logits

# what has ended leaves once the batch without it is smaller than this share
SHRINK_AT = 0.75


@dataclass
class Rollout:
    """One sampled response: its tokens, the end of turn included unless it was cut off, and the
    sampler's log-probability of each."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    truncated: bool = True

    @property
    def length(self) -> int:
        """Tokens without the end of turn, which one that was cut off does not have."""
        return len(self.ids) - (not self.truncated)


@dataclass
class Writers:
    """Who is still writing: B rows, one a prompt, with q places each, one a response."""

    position: Tensor  # (B,) where the first token of its responses stands
    owner: Tensor  # (B, n) of each column of the cache: PROMPT, a response, NOBODY
    prompt: Tensor  # (B, q) which prompt a place continues
    response: Tensor  # (B, q) which of its G responses it writes
    active: Tensor  # (B, q) False where that response has ended
    token: Tensor  # (B, q) its newest token

    def note(self, rollouts: list[list[Rollout]], logps: Tensor, end_id: int) -> None:
        """Add each newest token and its log-probability (B, q) to its rollout."""
        news = self.prompt, self.response, self.token, logps
        for b, g, token, logp in zip(*[new[self.active].tolist() for new in news]):
            rollouts[b][g].ids.append(token)
            rollouts[b][g].logps.append(logp)
            rollouts[b][g].truncated = token != end_id
        self.active = self.active & (self.token != end_id)

    def close_up(self, cache: Cache) -> None:
        """Let groups that have ended leave, and so many places as have ended in every group; not
        before it is worth the copying."""
        left = self.active.sum(dim=1)  # (B,)
        rows, q = left > 0, int(left.max())
        if q * int(rows.sum()) >= SHRINK_AT * self.active.numel():
            return
        active_first = (~self.active).long().argsort(dim=1, stable=True)
        places = active_first[rows, :q]
        cache.batch_select_indices(rows)
        self.position = self.position[rows]
        self.owner = self.owner[rows]
        self.prompt = self.prompt[rows].gather(1, places)
        self.response = self.response[rows].gather(1, places)
        self.active = self.active[rows].gather(1, places)
        self.token = self.token[rows].gather(1, places)

    def open_columns(self) -> Tensor:
        """A new column for each place -> (B, q, n): which columns a place may look at."""
        new = self.response.where(self.active, NOBODY)
        self.owner = torch.cat([self.owner, new], dim=1)
        owner = self.owner[:, None]
        return (owner == PROMPT) | (owner == self.response[:, :, None])


def new_cache(model, columns: int) -> Cache:
    """For the keys and values of so many columns."""
    return DynamicCache()


def decoding_step(
    model, embeddings: Tensor, position: Tensor, visible: Tensor, cache: Cache
) -> Tensor:
    """The language model on the next token of each response: embeddings (B, q, H), positions (B,),
    visible columns (B, q, n) -> hidden states (B, q, H)."""
    B, q, _ = embeddings.shape
    out = model.model.language_model(
        inputs_embeds=embeddings,
        position_ids=position[:, None].expand(3, B, q),
        attention_mask=visible[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state


def prefill(model, prompts: Sequence[Prompt], cache: Cache) -> tuple[Tensor, Tensor]:
    """Left-padded prompts through the language model -> the hidden states (B, H) that predict the
    first tokens, and the owners (B, P) of the columns."""

    def left_pad(rows: list[Tensor], value: int = 0) -> Tensor:
        return pad_sequence(
            rows, batch_first=True, padding_side="left", padding_value=value
        )

    ids = left_pad([p.ids for p in prompts])  # (B, P)
    positions = left_pad([p.positions.T for p in prompts])  # (B, P, 3)
    owner = left_pad([torch.full_like(p.ids, PROMPT) for p in prompts], NOBODY)
    out = model.model.language_model(
        inputs_embeds=embed(model, ids, torch.cat([p.features for p in prompts])),
        position_ids=positions.permute(2, 0, 1),
        attention_mask=owner == PROMPT,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1], owner


def next_token_logps(
    logits: Tensor, temperature: float = 1.0, banned: Sequence[int] = ()
) -> Tensor:
    """(.., V) logits -> (.., V) log-probabilities to sample from. Temperature 0 is greedy: all
    weight on the largest logit."""
    if temperature == 0:
        best = scale_logits(logits, 1.0, banned).argmax(-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    return scale_logits(logits, temperature, banned).log_softmax(-1)


def pick(logps: Tensor, u: Tensor) -> Tensor:
    """(.., V) log-probabilities, (..) uniform numbers -> (..) tokens: the first whose cumulative
    probability exceeds u."""
    cumulative = logps.exp().cumsum(-1)
    total = cumulative[..., -1]
    # not past the last possible token
    below_total = total.nextafter(torch.zeros_like(total))
    threshold = torch.minimum(u * total, below_total)
    return torch.searchsorted(cumulative, threshold[..., None], right=True)[..., 0]


@torch.inference_mode()
def sample_group(
    model,
    prompts: Sequence[Prompt],
    G: int,
    seeds: Sequence[int],
    *,
    end_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
) -> list[list[Rollout]]:
    """G responses to each of B prompts -> B lists of G rollouts; `banned` ids are never sampled.

    A prompt's random numbers come from its own seed, so what is sampled does not depend on which
    prompts share the batch, nor on the number of processes.
    """
    B, device = len(prompts), model.device
    columns = max(len(p.ids) for p in prompts) + G * max_new_tokens
    cache = getattr(model, "fast_cache", new_cache)(model, columns)  # see rr1/fast.py
    step = getattr(model, "fast_step", decoding_step)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = torch.stack([torch.rand(G, max_new_tokens, generator=g) for g in generators])
    uniform = uniform.to(device)  # (B, G, L)
    rollouts = [[Rollout() for _ in range(G)] for _ in prompts]

    hidden, owner = prefill(model, prompts, cache)
    hidden = hidden[:, None].expand(-1, G, -1)  # (B, q, H), here q = G
    writers = Writers(
        position=torch.tensor([p.next_position for p in prompts], device=device),
        owner=owner,
        prompt=torch.arange(B, device=device)[:, None].expand(B, G),
        response=torch.arange(G, device=device).expand(B, G),
        active=torch.ones(B, G, dtype=torch.bool, device=device),
        token=torch.zeros(B, G, dtype=torch.long, device=device),
    )
    for t in range(max_new_tokens):
        logits = model.lm_head(hidden)
        logps = next_token_logps(logits, temperature, banned)  # (B, q, V)
        writers.token = pick(logps, uniform[writers.prompt, writers.response, t])
        writers.note(rollouts, logps.gather(-1, writers.token[..., None])[..., 0], end_id)
        if t + 1 == max_new_tokens or not writers.active.any():
            break
        writers.close_up(cache)
        visible = writers.open_columns()
        embeddings = model.get_input_embeddings()(writers.token)  # (B, q, H)
        hidden = step(model, embeddings, writers.position + t, visible, cache)
    return rollouts
