"""Build the tiny Qwen2.5-VL from nothing: tokenizer, vision tower, language model.

    torchrun --nproc-per-node 2 -m rr1.tiny.pretrain          # 2 cores, 1.9 s a step; writes runs/tiny-base/model

1. vision   the vision tower alone learns to say what is drawn at each visual token and how the picture is damaged. Without this
            the language model stays on text statistics for a long time; with it grounding starts at once.
2. whole    everything learns captions, open and choice questions, some answered after saying what is there, and how pictures are
            damaged, on clean and damaged ones. A picture's conversations branch off one image prefix (`rr1.vlm.group_logps`), so it
            is read once. The read-outs of phase 1 stay on as a small extra loss, so that the features that fine-tuning will find
            frozen still tell the damage. Beside it the language model reads the sentences of chains, without pictures, as any
            language model has read English.

Each phase ends with its weights in --out; a run that is started again skips the phases that are done.
"""
from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from degrade import degrade, sample_degradations
from rr1 import data, runtime, vlm
from rr1.chain import build_question
from rr1.rollout import sample_group
from rr1.runtime import opt
from rr1.tiny import world
from rr1.tiny.lessons import TYPES, Batches
from rr1.tiny.model import build_model, build_processor
from rr1.vlm import Prompt, encode_images, group_logps, make_prompt

KINDS = ("caption", "damage", "open", "choice", "explained")     # of turns


class Heads(nn.Module):
    """Linear read-outs of the merged features: the shape and colour at each token and where it is, the ground, the damage.

    Where it is matters: M-RoPE turns neighbouring columns too little for the language model to tell them apart by that."""

    def __init__(self, hidden: int):
        super().__init__()
        self.shape, self.color = nn.Linear(hidden, 1 + len(world.SHAPES)), nn.Linear(hidden, 1 + len(world.COLORS))
        self.place = nn.Linear(hidden, 16)
        self.ground, self.present, self.intensity = nn.Linear(hidden, len(world.GROUNDS)), nn.Linear(hidden, len(TYPES)), nn.Linear(hidden, len(TYPES))

    def forward(self, features: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """features (B, 16, H) -> loss, shares read right."""
        whole = features.mean(1)
        shape, color, place, ground = self.shape(features), self.color(features), self.place(features), self.ground(whole)
        true_place = torch.arange(16).expand(len(features), 16)
        present, intensity = self.present(whole), self.intensity(whole)
        true_shape, true_color = batch["cells"].flatten(1, 2).unbind(-1)                    # (B, 16) each
        is_there, s = batch["damage"].unbind(1)
        loss = (2 * F.cross_entropy(shape.flatten(0, 1), true_shape.flatten()) + 2 * F.cross_entropy(color.flatten(0, 1), true_color.flatten())
                + 0.5 * F.cross_entropy(place.flatten(0, 1), true_place.flatten()) + 0.5 * F.cross_entropy(ground, batch["grounds"])
                + 4 * F.binary_cross_entropy_with_logits(present, is_there)
                + 2 * ((intensity - s).abs() * is_there).sum() / is_there.sum().clamp(min=1))
        filled = true_shape > 0
        found = present > 0
        read = {"shape": (shape.argmax(-1) == true_shape)[filled].float().mean(), "color": (color.argmax(-1) == true_color)[filled].float().mean(),
                "place": (place.argmax(-1) == true_place).float().mean(), "ground": (ground.argmax(-1) == batch["grounds"]).float().mean(),
                "damage_f1": 2 * (found * is_there).sum() / (found.sum() + is_there.sum()).clamp(min=1),
                "intensity_error": ((intensity - s).abs() * is_there).sum() / is_there.sum().clamp(min=1)}
        return loss, {k: v.item() for k, v in read.items()}


def text_loss(model, lines: list[list[int]]) -> torch.Tensor:
    """Mean token loss of text without a picture."""
    nothing = torch.zeros(0, model.config.text_config.hidden_size)
    prompts = [Prompt(torch.tensor(ids[:1]), torch.zeros(3, 1, dtype=torch.long), nothing) for ids in lines]
    logps, mask, _ = group_logps(model, prompts, [[ids[1:]] for ids in lines])
    return -(logps * mask).sum() / mask.sum()


def language_loss(model, batch: dict, features: list[torch.Tensor], prefix: Prompt) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean over the turns of the answer's mean token loss; by kind, the share of answers whose every token is likelier than not."""
    prompts = [Prompt(prefix.ids, prefix.positions, f) for f in features]
    logps, mask, _ = group_logps(model, prompts, [[ids for ids, _, _ in talks] for talks in batch["conversations"]])
    kinds, owner = [], torch.full(mask.shape, -1)
    for row, (ids, turns, turn_of) in enumerate(talk for talks in batch["conversations"] for talk in talks):
        turn_of = torch.tensor(turn_of)
        owner[row, :len(ids)] = torch.where(turn_of < 0, -1, turn_of + len(kinds))
        kinds += turns
    logps, owner = logps[owner >= 0], owner[owner >= 0]
    total = lambda values: torch.zeros(len(kinds)).index_add(0, owner, values)       # (tokens,) -> (turns,)
    losses = -total(logps) / total(torch.ones_like(logps))
    wrong = total((logps.exp() <= 0.5).float())
    names = np.array(kinds)
    right = {k: (wrong[torch.from_numpy(names == k)] == 0).float().mean().item() for k in KINDS}
    return losses.mean(), right


@torch.no_grad()
def same_size(model, heads: Heads, batch: dict, size: float = 0.3) -> None:
    """Scale the features, by the merger's last layer, and the embeddings to a root mean square of `size`; the read-outs of the
    features stay what they were."""
    features = torch.cat(encode_images(model, batch["pixel_values"], batch["grid"]))
    factor = size / features.square().mean().sqrt()
    last = model.model.visual.merger.mlp[-1]
    last.weight.mul_(factor), last.bias.mul_(factor)
    for head in heads.children():
        head.weight.div_(factor)
    embeddings = model.get_input_embeddings().weight
    embeddings.mul_(size / embeddings.square().mean().sqrt())


def examine(model, processor, n: int = 512, seed: int = 10**6) -> dict[str, float]:
    """Share of right answers, greedy, on n held-out scenes: a caption, an open and a choice question on each, clean and damaged
    by one or two degradations."""
    rng = np.random.default_rng(seed)
    right: dict[str, list[bool]] = {}
    for _ in tqdm(range(0, n, 64), desc="examining"):
        texts, pictures, keys, answers = [], [], [], []
        for scene in (world.sample_scene(rng) for _ in range(64)):
            clean = world.draw(scene, rng)
            damaged = degrade(clean, sample_degradations(rng, low=1, high=2), seed=int(rng.integers(2**31)))
            *asked, describe = world.questions(scene)
            one, other = (asked[i] for i in rng.integers(len(asked), size=2))
            turns = {"caption": (describe.text, describe.answer), "open": (one.text, one.answer),
                     "choice": (build_question(other.text, world.choices(other, rng)), other.answer)}
            for look, picture in (("clean", clean), ("damaged", damaged)):
                for form, (text, answer) in turns.items():
                    texts.append(text), pictures.append(Image.fromarray(picture)), keys.append(f"{form}, {look}"), answers.append(answer)
        prompts = data.encode(model, data.collate(texts, pictures, processor))
        groups = sample_group(model, prompts, 1, [0] * len(texts), end_id=processor.end_id, max_new_tokens=40, temperature=0)
        for key, [response], answer in zip(keys, groups, answers):
            right.setdefault(key, []).append(processor.decode(response.ids) == answer)
    return {key: sum(found) / len(found) for key, found in right.items()}


def plot(log: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    groups = {"read from the features": ("shape", "color", "place", "ground", "damage_f1"), "intensity error": ("intensity_error",),
              "answers likelier than not": KINDS}
    for axis, (title, names) in zip(axes, groups.items()):
        for name in names:
            points = [(r["minutes"], r[name]) for r in log if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name)
        axis.set(title=title, xlabel="minutes"), axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path.with_suffix(".tmp.png"), dpi=110)
    plt.close(figure)
    os.replace(path.with_suffix(".tmp.png"), path)


@dataclass
class Config:
    out: str = opt("runs/tiny-base", "the run's folder; the checkpoint is its subfolder model/")
    vision_steps: int = opt(2800, "steps of the vision phase")
    steps: int = opt(900, "steps of the whole phase")
    batch: int = opt(32, "pictures a step, over all processes; the vision phase takes twice as many")
    lr: float = opt(1.5e-3, "peak learning rate")
    seed: int = opt(0, "fixes the weights' start and the data")
    examine: str = opt("", "train nothing: examine this checkpoint on 512 held-out scenes")


def main(argv: list[str] | None = None) -> None:
    a = runtime.parse_config(Config, argv, __doc__)
    rt = runtime.setup()
    if a.examine:
        model, processor = vlm.load(a.examine)
        print("\n".join(f"{key:18s}{share:.3f}" for key, share in examine(model.eval(), processor).items()))
        return
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(a.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    heads = Heads(model.config.text_config.hidden_size)
    both = nn.ModuleDict({"model": model, "heads": heads})
    visual = list(model.model.visual.parameters())
    ids = processor.prompt_ids("", [16])
    ids = ids[:ids.index(processor.image_token_id) + 17]          # header, 16 image tokens, <|vision_end|>
    log, began = [], time.perf_counter()
    if rt.is_main:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens in the vocabulary")

    def losses(phase: str, batch) -> tuple[torch.Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            features = encode_images(model, batch["pixel_values"], batch["grid"])
            loss, read = heads(torch.stack(features).float(), batch)
            if phase == "whole":
                prefix = make_prompt(model, ids, batch["grid"][:1], features[:1])
                answers, kinds = language_loss(model, batch, features, prefix)
                text = text_loss(model, batch["lines"])
                loss, read = answers + 0.3 * text + 0.2 * loss, read | kinds | {"text_loss": text.item()}
            return loss, read

    def train(number: int, phase: str, steps: int, batch: int, *optimizers: torch.optim.Optimizer) -> None:
        done = out / f"{number}-{phase}.safetensors"
        if done.exists():
            load_model(both, done)
            return
        seed = [a.seed, number, rt.rank]
        loader = iter(DataLoader(Batches(processor, phase, batch // rt.world_size, seed), batch_size=None, num_workers=1, prefetch_factor=4))
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: runtime.cosine_with_warmup(step, steps, 50, floor=0.02))
                     for optimizer in optimizers]
        sums: dict[str, float] = {}
        for step in range(1, steps + 1):
            loss, read = losses(phase, next(loader))
            both.zero_grad(set_to_none=True)
            (loss / rt.world_size).backward()
            runtime.sum_gradients(parameters, rt)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for each in (*optimizers, *schedules):
                each.step()
            for name, value in {"loss": loss.item(), **read}.items():
                sums[name] = sums.get(name, 0) + value
            if rt.is_main and step % 50 == 0:
                row = {"phase": phase, "step": step, "minutes": round((time.perf_counter() - began) / 60, 2)}
                row |= {name: round(total / 50, 4) for name, total in sums.items()}
                sums = {}
                log.append(row)
                with open(out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                plot(log, out / "curves.png")
        if rt.is_main:
            save_model(both, str(done) + ".tmp")
            os.replace(str(done) + ".tmp", done)
        runtime.barrier(rt)

    # Muon for the language model's matrices (looking up a thing by its shape or colour came within 150 steps, where AdamW
    # had not got there in 450), AdamW for the rest. Features and embeddings start at a like size, so that layers can change both.
    seeing = [*visual, *heads.parameters()]
    adamw = lambda lr, parameters: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    train(1, "vision", a.vision_steps, 2 * a.batch, adamw(a.lr, seeing))
    if not (out / "2-whole.safetensors").exists():
        same_size(model, heads, next(iter(Batches(processor, "vision", 64, [a.seed, 3]))))
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.model.language_model.parameters() if not any(p is m for m in matrices)]
    train(2, "whole", a.steps, a.batch, torch.optim.Muon(matrices, lr=0.02, weight_decay=0.02), adamw(2 * a.lr, rest), adamw(a.lr / 4, seeing))
    if rt.is_main:
        model.half().save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
        print("written:", out / "model")
    runtime.teardown(rt)


if __name__ == "__main__":
    main()
