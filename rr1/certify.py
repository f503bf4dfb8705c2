"""Does a checkpoint score packed groups exactly as separate rows, and sample what it scores?

    python -m rr1.certify --model FOLDER                  # any Qwen2.5-VL, random pictures
    torchrun --nproc-per-node 2 -m rr1.certify            # and one process against two

Packed groups (`vlm.group_logps`), without rr1/fast.py and with it, are held against the library's
own forward pass, one response at a time, pixels included: the log-probability of every response
token, first ones too, and the gradient of every parameter of a sum in which each token has a weight
of its own. Largest differences: of log-probabilities in nats, of gradients relative to the largest
entry of the parameter's. The sampler's own log-probabilities are held against the scorer's. Packed
groups take the opposite weights, so their gradients are added to those of the rows, and what is
left is the difference: the memory needed is that of the parameters, one gradient of each, and
twice the embedding, whose two uses are compared apart.

The exit status is 0 if all is within the limits: 1e-9 in float64, in which the norms (which the
library rounds to float32) are computed whole, and 1e-4 in float32. bfloat16 (autocast) is printed.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Parameter
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from rr1 import data, fast, rollout, runtime, tiny, vlm
from rr1.runtime import opt

LIMITS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": float("inf")}
ROW = "| {:8} | {:40} | {:15} | {:8} | {:12} |"
HEADER = (
    ROW.format("", "compared", "log-probability", "gradient", "")
    + "\n|---|---|---|---|---|"
)
TEMPERATURE = 0.7
SIZES = [(112, 112), (168, 84), (84, 140)]  # of the pictures: width, height
TEXTS = [
    "what is it?",
    "how many shapes are there, and what color is the largest?",
    "where?",
]


@dataclass
class Config:
    model: str = opt(tiny.SFT, "checkpoint folder or hub id")
    dtypes: list[str] = opt(list(LIMITS), "to compute in", list(LIMITS))
    group_sizes: list[int] = opt([2, 4, 8], "G, responses to each prompt", low=1)
    new_tokens: int = opt(24, "of the longest response", low=1)


def largest_gradients(model) -> dict[str, float]:
    """The largest entry of each parameter's gradient."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            low, high = p.grad.aminmax()
            found[name] = max(-low.item(), high.item())
    return found


def differences(model, expected: dict[str, float], a: Tensor, b: Tensor) -> list[float]:
    """The largest of two log-probabilities a, b (T,), and of gradients: the largest entry that is
    left of one, relative to that expected of it. The model has no gradients then."""
    gaps = []
    for name, left in largest_gradients(model).items():
        gaps.append(left / max(expected.get(name, 0.0), 1e-30))
    model.zero_grad(set_to_none=True)
    largest = torch.tensor(gaps, dtype=torch.float64).max()  # nan where one is
    return [(a - b).abs().max().item(), largest.item()]


def token_weights(responses: Sequence[Sequence[list[int]]]) -> list[Tensor]:
    """One weight for each token, so that no two errors cancel: one tensor for each prompt."""
    torch.manual_seed(0)
    sizes = [sum(map(len, group)) for group in responses]
    return [torch.randn(n, dtype=torch.float64) for n in sizes]


def questions(n: int) -> tuple[list[str], list[Image.Image]]:
    """n texts and n pictures of noise of different sizes."""
    rng = np.random.default_rng(0)
    texts, pictures = [], []
    for i in range(n):
        width, height = SIZES[i % len(SIZES)]
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        texts.append(TEXTS[i % len(TEXTS)])
        pictures.append(Image.fromarray(noise))
    return texts, pictures


def packed(model, prompts, responses, banned, weights: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of T response tokens, (T,). Adds to the gradients."""
    logps, mask, _ = vlm.group_logps(model, prompts, responses, TEMPERATURE, banned)
    logps = logps[mask > 0]  # (T,)
    w = torch.cat(list(weights)).to(logps)
    (logps * w).sum().backward()
    return logps.detach()


def separate(model, processor, responses, weights: Sequence[Tensor]) -> Tensor:
    """The same by the library's forward pass, one row [prompt, response] at a time."""
    found = []
    asked = zip(*questions(len(responses)), responses, weights, strict=True)
    for text, picture, group, own in asked:
        pixel_values, grid = processor.pixels([picture])
        prompt = processor.prompt_ids(text, processor.visual_tokens(grid))
        for response, w in zip(group, own.split([len(r) for r in group])):
            ids = torch.tensor([prompt + response], device=model.device)
            out = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixel_values.to(model.device),
                image_grid_thw=grid.to(model.device),
                mm_token_type_ids=(ids == processor.image_token_id).int(),
            )
            logits = out.logits[0, len(prompt) - 1 : -1]  # (L, V)
            logits = (
                logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE
            )
            logits[:, processor.banned_ids] = float("-inf")
            targets = ids[0, len(prompt) :, None]
            logps = logits.log_softmax(-1).gather(-1, targets)[:, 0]
            (logps * w.to(logps)).sum().backward()
            found.append(logps.detach())
    return torch.cat(found)


def sample(model, processor, prompts, G: int, new_tokens: int) -> tuple[list, float]:
    """Responses as token ids, and how far the scorer is from what the sampler noted."""
    groups = rollout.sample_group(
        model,
        prompts,
        G,
        seeds=range(len(prompts)),
        end_id=processor.end_id,
        max_new_tokens=new_tokens,
        temperature=TEMPERATURE,
        banned=processor.banned_ids,
    )
    ids, noted = [], []
    for group in groups:
        ids.append([r.ids for r in group])
        for r in group:
            noted += r.logps
    with torch.no_grad():
        banned = processor.banned_ids
        logps, mask, _ = vlm.group_logps(model, prompts, ids, TEMPERATURE, banned)
    return ids, (logps.new_tensor(noted) - logps[mask > 0]).abs().max().item()


def certify(config: Config, rt: runtime.Runtime, dtype: str) -> Iterator[tuple]:
    """What is compared in this dtype: (what, largest differences of log-probabilities and, but for
    the sampler, of gradients)."""
    stored = torch.float64 if dtype == "float64" else torch.float32
    model, processor = vlm.load(config.model, stored, rt.device)
    vlm.freeze_vision(model)
    # where it shares its weights with the embedding, each use has a gradient of its own
    model.lm_head.weight = Parameter(model.lm_head.weight.detach())
    banned = processor.banned_ids
    asked = questions(max(len(SIZES), rt.world_size))  # one a process at least
    batch = data.collate(*asked, processor)
    prompts = data.encode(model, batch)
    largest = max(config.group_sizes)
    for way in ("plain", "fast"):
        if way == "fast":
            fast.enable(model)
        written, gap = sample(model, processor, prompts, largest, config.new_tokens)
        yield f"{way}: sampler, scorer", [gap]
        for G in config.group_sizes:
            responses = [group[:G] for group in written]
            weights = token_weights(responses)
            opposite = [-w for w in weights]
            rows = separate(model, processor, responses, weights)
            gradients = largest_gradients(model)
            found = packed(model, prompts, responses, banned, opposite)
            gaps = differences(model, gradients, found, rows)
            yield f"{way}: packed, separate, G {G}, {len(found)} tokens", gaps
        if rt.world_size > 1:  # of the last G
            packed(model, prompts, responses, banned, opposite)
            gradients = largest_gradients(model)
            if not rt.is_main:
                model.zero_grad()
            mine = slice(rt.rank, None, rt.world_size)
            share = packed(model, prompts[mine], responses[mine], banned, weights[mine])
            runtime.sum_gradients(model.parameters(), rt)
            whole = found.split([len(w) for w in weights])[mine]
            gaps = differences(model, gradients, share, torch.cat(whole))
            yield f"{way}: {rt.world_size} processes, one", gaps


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    rt = runtime.setup(0)
    vlm.PACK_FROM = 0.0  # packed, whatever it saves
    if rt.is_main:
        print(config.model, HEADER, sep="\n\n", flush=True)
    holds = True
    for dtype in config.dtypes:
        exact = patch.object(Qwen2_5_VLRMSNorm, "forward", fast.norm)
        half = torch.autocast(rt.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        with exact if dtype == "float64" else nullcontext(), half:
            limit = LIMITS[dtype]
            for what, gaps in certify(config, rt, dtype):
                within = all(gap <= limit for gap in gaps)
                holds = holds and within
                verdict = f"{'within' if within else 'OVER'} {limit:.0e}"
                logps, gradients, *_ = [f"{gap:.1e}" for gap in gaps] + [""]
                if rt.is_main:
                    print(ROW.format(dtype, what, logps, gradients, verdict), flush=True)
    if not holds:
        raise SystemExit(1)
    runtime.teardown(rt)


if __name__ == "__main__":
    main()
