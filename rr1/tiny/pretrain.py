"""Build the tiny Qwen2.5-VL from nothing: tokenizer, vision tower, language model.

    torchrun --nproc-per-node 2 -m rr1.tiny.pretrain      # 2 cores; writes runs/tiny-base/model
    python -m rr1.tiny.pretrain --examine rr1/tiny/base   # its answers on held-out scenes

1. vision   the vision tower alone learns to say what is drawn at each visual token and how the
            picture is damaged. Without this the language model stays on text statistics for a long
            time; with it grounding starts at once.
2. whole    everything learns captions, open and choice questions, some answered after saying what
            is there, and how pictures are damaged, on clean and damaged ones. A picture's
            conversations branch off one image prefix (`rr1.vlm.group_logps`), so it is read once.
            The read-outs of phase 1 stay on as a small extra loss, so that the features that
            fine-tuning will find frozen still tell the damage. Beside it the language model reads
            the sentences of chains, without pictures, as any language model has read English.

Each phase ends with its weights in --out; a run that is started again skips what is done.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rr1 import files, runtime, vlm
from rr1.run_folder import draw_curves
from rr1.runtime import opt
from rr1.tiny import examine, scenes
from rr1.tiny.lessons import TYPES, Batches
from rr1.tiny.model import build_model, build_processor
from rr1.vlm import Prompt, encode_images, group_logps, make_prompt

Read = dict[str, float]  # what was read, or answered, right: shares by name


class Heads(nn.Module):
    """Linear read-outs of the merged features: the shape and colour at each token and where it is,
    the ground, the damage. Where it is matters: M-RoPE turns neighbouring columns too little for
    the language model to tell them apart by that."""

    def __init__(self, hidden: int):
        super().__init__()
        self.shape = nn.Linear(hidden, 1 + len(scenes.SHAPES))
        self.color = nn.Linear(hidden, 1 + len(scenes.COLORS))
        self.place = nn.Linear(hidden, 16)
        self.ground = nn.Linear(hidden, len(scenes.GROUNDS))
        self.present = nn.Linear(hidden, len(TYPES))
        self.intensity = nn.Linear(hidden, len(TYPES))

    def forward(self, features: Tensor, batch: dict) -> tuple[Tensor, Read]:
        """features (B, 16, H) -> loss, shares read right."""
        whole = features.mean(1)  # (B, H)
        shape = self.shape(features).flatten(0, 1)  # (16 B, classes)
        color = self.color(features).flatten(0, 1)
        place = self.place(features).flatten(0, 1)
        present, intensity = self.present(whole), self.intensity(whole)  # (B, types)
        ground = self.ground(whole)  # (B, grounds)
        true_shape, true_color = batch["cells"].flatten(0, 2).unbind(-1)  # (16 B,) each
        true_place = torch.arange(16).repeat(len(features))
        is_there, s = batch["damage"].unbind(1)  # (B, types) each
        n_there = is_there.sum().clamp(min=1)
        errors = (intensity - s).abs() * is_there
        error = errors.sum() / n_there
        loss = 2 * F.cross_entropy(shape, true_shape)
        loss = loss + 2 * F.cross_entropy(color, true_color)
        loss = loss + 0.5 * F.cross_entropy(place, true_place)
        loss = loss + 0.5 * F.cross_entropy(ground, batch["grounds"])
        loss = loss + 4 * F.binary_cross_entropy_with_logits(present, is_there) + 2 * error
        filled, found = true_shape > 0, present > 0
        named = found.sum() + is_there.sum()
        read = {
            "shape": share_right(shape[filled], true_shape[filled]),
            "color": share_right(color[filled], true_color[filled]),
            "place": share_right(place, true_place),
            "ground": share_right(ground, batch["grounds"]),
            "damage_f1": 2 * (found * is_there).sum() / named.clamp(min=1),
            "intensity_error": error,
        }
        return loss, {name: value.item() for name, value in read.items()}


def share_right(logits: Tensor, truth: Tensor) -> Tensor:
    return (logits.argmax(-1) == truth).float().mean()


def text_loss(model, lines: list[list[int]]) -> Tensor:
    """Mean token loss of text without a picture."""
    nothing = torch.zeros(0, model.config.text_config.hidden_size)
    start = torch.zeros(3, 1, dtype=torch.long)
    prompts = []
    for ids in lines:
        first = torch.tensor(ids[:1])
        prompts.append(Prompt(first, start, nothing))
    rest = [[ids[1:]] for ids in lines]
    logps, mask, _ = group_logps(model, prompts, rest)
    return -(logps * mask).sum() / mask.sum()


def language_loss(model, batch: dict, prompts: list[Prompt]) -> tuple[Tensor, Read]:
    """Mean over the turns of the answer's mean token loss; by kind, the share of answers whose
    every token is likelier than not."""
    talks = list(chain.from_iterable(batch["conversations"]))
    groups = []
    for conversations in batch["conversations"]:
        groups.append([talk[0] for talk in conversations])
    logps, _, _ = group_logps(model, prompts, groups)  # (N, L)
    losses, right = [], defaultdict(list)
    for row, (ids, kinds, owner) in enumerate(talks):
        owner = torch.tensor(owner)
        for number, kind in enumerate(kinds):
            answer = logps[row, : len(ids)][owner == number]  # of its tokens
            losses.append(-answer.mean())
            likely = answer.exp() > 0.5
            right[kind].append(bool(likely.all()))
    shares = {kind: sum(answers) / len(answers) for kind, answers in right.items()}
    return torch.stack(losses).mean(), shares


@torch.no_grad()
def same_size(model, heads: Heads, batch: dict, size: float = 0.3) -> None:
    """Scale the features, by the merger's last layer, and the embeddings to a root mean square
    of `size`; the read-outs of the features stay what they were."""
    features = encode_images(model, batch["pixel_values"], batch["grid"])
    features = torch.cat(features)
    rms = features.square().mean().sqrt()
    factor = size / rms
    last = model.model.visual.merger.mlp[-1]
    last.weight.mul_(factor)
    last.bias.mul_(factor)
    for head in heads.children():
        head.weight.div_(factor)
    embeddings = model.get_input_embeddings().weight
    rms = embeddings.square().mean().sqrt()
    embeddings.mul_(size / rms)


@dataclass
class Config:
    out: str = opt(
        "runs/tiny-base", "the run's folder; the checkpoint is its subfolder model/"
    )
    vision_steps: int = opt(2800, "steps of the vision phase")
    steps: int = opt(900, "steps of the whole phase")
    batch: int = opt(
        32, "pictures a step, over all processes; the vision phase takes twice as many"
    )
    lr: float = opt(1.5e-3, "peak learning rate")
    seed: int = opt(0, "fixes the weights' start and the data")
    examine: str = opt("", "train nothing: examine this checkpoint on 512 held-out scenes")


PANELS = {
    "read from the features": ["shape", "color", "place", "ground", "damage_f1"],
    "intensity error": ["intensity_error"],
    "answers likelier than not": ["caption", "damage", "open", "choice", "explained"],
}


def losses(
    model,
    heads: Heads,
    batch: dict,
    header: list[int],
) -> tuple[Tensor, Read]:
    """The batch's loss and what was right. `header`: the ids before and of a picture."""
    features = encode_images(model, batch["pixel_values"], batch["grid"])
    loss, read = heads(torch.stack(features).float(), batch)
    if batch["conversations"]:
        first = make_prompt(model, header, batch["grid"][:1], features[:1])
        prompts = [Prompt(first.ids, first.positions, f) for f in features]
        answers, kinds = language_loss(model, batch, prompts)
        text = text_loss(model, batch["lines"])
        loss = answers + 0.3 * text + 0.2 * loss
        read |= kinds | {"text_loss": text.item()}
    return loss, read


def train(
    done: Path,
    steps: int,
    lessons: Batches,
    optimizers: list,
    both: nn.ModuleDict,
    loss_of: Callable,
    rt: runtime.Runtime,
) -> None:
    """One phase; `both` model and heads are saved to, or read from, the file `done`."""
    if done.exists():
        load_model(both, done)
        return
    loader = DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=4)
    batches = iter(loader)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    sums: dict[str, float] = defaultdict(float)
    rows: list[dict] = []
    began = time.perf_counter()
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss, read = loss_of(next(batches))
        both.zero_grad(set_to_none=True)
        (loss / rt.world_size).backward()
        runtime.sum_gradients(parameters, rt)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in groups:
            factor = runtime.cosine_with_warmup(step - 1, steps, 50, floor=0.02)
            group["lr"] = group["initial_lr"] * factor
        for optimizer in optimizers:
            optimizer.step()
        read["loss"] = loss.item()
        for name, value in read.items():
            sums[name] += value / 50
        if rt.is_main and step % 50 == 0:
            minutes = (time.perf_counter() - began) / 60
            row = {"step": step, "minutes": minutes, **sums}
            rows.append(row)
            files.append_lines(done.parent / "metrics.jsonl", [row])
            draw_curves(rows, PANELS, done.parent / "curves.png", done.parent.name)
            said = [f"{name} {value:.4g}" for name, value in row.items()]
            print("  ".join(said), flush=True)
            sums.clear()
    if rt.is_main:
        temporary = done.with_suffix(".tmp")
        save_model(both, str(temporary))
        temporary.replace(done)
    runtime.barrier(rt)


def adamw(lr: float, parameters) -> torch.optim.Optimizer:
    groups = [{"params": list(parameters), "initial_lr": lr}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)


def main(argv: list[str] | None = None) -> None:
    a = runtime.parse_config(Config, argv, __doc__)
    rt = runtime.setup()
    if a.examine:
        print(examine.table(a.examine))
        return
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(a.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    heads = Heads(model.config.text_config.hidden_size)
    both = nn.ModuleDict({"model": model, "heads": heads})
    header = processor.prompt_ids("", [16])
    end = header.index(processor.image_token_id) + 17  # 16 image tokens and <|vision_end|>
    loss_of = partial(losses, model, heads, header=header[:end])
    if rt.is_main:
        print(
            f"{vlm.count_parameters(model)}; {len(processor.tokenizer)} tokens in the vocabulary"
        )

    # 1. vision
    share = a.batch // rt.world_size
    seeing = [*model.model.visual.parameters(), *heads.parameters()]
    lessons = Batches(processor, "vision", 2 * share, [a.seed, 1, rt.rank])
    vision, whole = out / "1-vision.safetensors", out / "2-whole.safetensors"
    optimizers = [adamw(a.lr, seeing)]
    train(vision, a.vision_steps, lessons, optimizers, both, loss_of, rt)
    if not whole.exists():
        examples = Batches(processor, "vision", 64, [a.seed, 3])
        same_size(model, heads, next(iter(examples)))

    # 2. whole: Muon for the language model's matrices (looking up a thing by its shape or colour
    # came within 150 steps, where AdamW had not got there in 450), AdamW for the rest
    language = model.model.language_model
    matrices = [p for p in language.layers.parameters() if p.ndim == 2]
    chosen = set(matrices)
    rest = [p for p in language.parameters() if p not in chosen]
    muon = [{"params": matrices, "initial_lr": 0.02}]
    optimizers = [torch.optim.Muon(muon, lr=0.02, weight_decay=0.02)]
    optimizers.append(adamw(2 * a.lr, rest))
    optimizers.append(adamw(a.lr / 4, seeing))
    lessons = Batches(processor, "whole", share, [a.seed, 2, rt.rank])
    train(whole, a.steps, lessons, optimizers, both, loss_of, rt)
    if rt.is_main:
        model.half().save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
        print("written:", out / "model")
    runtime.teardown(rt)


if __name__ == "__main__":
    main()
