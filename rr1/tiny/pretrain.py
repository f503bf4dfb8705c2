"""Build the tiny Qwen2.5-VL from nothing: tokenizer, vision tower, language model.

    python -m rr1.tiny.pretrain --out runs/tiny-base          # about 80 minutes on one core; writes runs/tiny-base/model

Phase 1 trains the vision tower alone to say what is drawn in each quarter and how the picture is damaged: without it the
language model stays on text statistics for a long time; with it grounding starts at once.
Phase 2 trains the whole model on captions, open and choice questions, on clean and damaged pictures. One picture carries many
questions: they branch off one image prefix (`rr1.vlm.group_logps`), so the picture is read once. The phase-1 heads stay on
as a small extra loss, so that the features that fine-tuning will find frozen still tell the damage.
"""
from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from degrade import DEGRADATIONS, degrade, sample_degradations
from rr1.chain import build_question
from rr1.tiny import world
from rr1.tiny.model import build_model, build_processor
from rr1.vlm import Prompt, encode_images, group_logps, make_prompt

TYPES = list(DEGRADATIONS)
LOOKUP = "which number is {}?"       # a choice question about the text alone: it teaches to point at a choice


class Batches(IterableDataset):
    """Endless batches of pictures with, for each, what is drawn, how it is damaged, and branches of (tokens, loss starts)."""

    def __init__(self, processor, batch: int, seed: int, text: bool):
        self.processor, self.batch, self.seed, self.text = processor, batch, seed, text

    def __iter__(self):
        cv2.setNumThreads(1), torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            yield self.make(rng)

    def make(self, rng: np.random.Generator) -> dict:
        images, branches = [], []
        cells = np.zeros((self.batch, 4, 2), np.int64)           # shape and colour in each quarter, 0 = nothing there
        grounds = np.zeros(self.batch, np.int64)
        damage = np.zeros((self.batch, 2, len(TYPES)), np.float32)    # present?, intensity
        for b in range(self.batch):
            scene = world.sample_scene(rng)
            image = world.draw(scene, rng)
            if rng.random() < 0.75:
                applied = sample_degradations(rng, low=1, high=2)
                image = degrade(image, applied, seed=int(rng.integers(2**31)))
                for d in applied:
                    damage[b, :, TYPES.index(d.type)] = 1, d.intensity
            for thing in scene.things:
                cells[b, world.PLACES.index(thing.place)] = (1 + world.SHAPES.index(thing.shape), 1 + list(world.COLORS).index(thing.color))
            grounds[b] = world.GROUNDS.index(scene.ground)
            images.append(image)
            if self.text:
                branches.append(self.branches(scene, rng))
        pixel_values, grid = self.processor.pixels(images)
        return dict(pixel_values=pixel_values, grid=grid, cells=torch.from_numpy(cells), grounds=torch.from_numpy(grounds),
                    damage=torch.from_numpy(damage), branches=branches)

    def branches(self, scene: world.Scene, rng: np.random.Generator) -> list[tuple[list[int], int]]:
        """A caption, two open questions, four choice questions and a look-up, each a turn that follows the picture."""
        *asked, describe = world.questions(scene)
        turns = [(describe.text, describe.answer)]
        for question in (asked[i] for i in rng.permutation(len(asked))[:2]):
            turns.append((build_question(question.text), question.answer))
        for question in (asked[i] for i in rng.permutation(len(asked))[:4]):
            options = world.choices(question, rng)
            turns.append((build_question(question.text, options), str(options.index(question.answer))))
        wanted = options[rng.integers(4)]
        turns.append((build_question(LOOKUP.format(wanted), options), str(options.index(wanted))))
        tails = []
        for text, answer in turns:
            prompt = self.processor.prompt_ids(text, [1])
            tail = prompt[prompt.index(self.processor.image_token_id) + 2:]      # what follows <|vision_end|>
            tails.append((tail + self.processor.response_ids(answer), len(tail)))
        return tails


class Heads(nn.Module):
    """Linear read-outs of the merged features: each quarter's shape and colour, the ground, the damage."""

    def __init__(self, hidden: int):
        super().__init__()
        self.shape, self.color = nn.Linear(hidden, 1 + len(world.SHAPES)), nn.Linear(hidden, 1 + len(world.COLORS))
        self.ground, self.present, self.intensity = nn.Linear(hidden, len(world.GROUNDS)), nn.Linear(hidden, len(TYPES)), nn.Linear(hidden, len(TYPES))

    def forward(self, features: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """features (B, 16, H) -> loss, shares read right."""
        quarters = features.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)          # (B, 4, H): 2 x 2 tokens each
        whole = features.mean(1)
        shape, color, ground = self.shape(quarters), self.color(quarters), self.ground(whole)
        present, intensity = self.present(whole), self.intensity(whole)
        true_shape, true_color = batch["cells"].unbind(-1)
        is_there, s = batch["damage"].unbind(1)
        loss = (F.cross_entropy(shape.flatten(0, 1), true_shape.flatten()) + F.cross_entropy(color.flatten(0, 1), true_color.flatten())
                + 0.5 * F.cross_entropy(ground, batch["grounds"]) + 4 * F.binary_cross_entropy_with_logits(present, is_there)
                + 2 * ((intensity - s).abs() * is_there).sum() / is_there.sum().clamp(min=1))
        filled = true_shape > 0
        found = present > 0
        read = {"shape": (shape.argmax(-1) == true_shape)[filled].float().mean(), "color": (color.argmax(-1) == true_color)[filled].float().mean(),
                "ground": (ground.argmax(-1) == batch["grounds"]).float().mean(),
                "damage_f1": 2 * (found * is_there).sum() / (found.sum() + is_there.sum()).clamp(min=1),
                "intensity_error": ((intensity - s).abs() * is_there).sum() / is_there.sum().clamp(min=1)}
        return loss, {k: v.item() for k, v in read.items()}


def language_loss(model, batch: dict, features: list[torch.Tensor], prefix: Prompt) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean over branches of the answer's mean token loss; every branch follows its picture's shared prefix."""
    prompts = [Prompt(prefix.ids, prefix.positions, f) for f in features]
    logps, mask, _ = group_logps(model, prompts, [[ids for ids, _ in group] for group in batch["branches"]])
    starts = torch.tensor([start for group in batch["branches"] for _, start in group])
    answer = mask * (torch.arange(mask.shape[1]) >= starts[:, None])
    losses = -(logps * answer).sum(1) / answer.sum(1)
    exact = ((logps.exp() > 0.5) | (answer == 0)).all(1).float().view(len(prompts), -1).mean(0)    # each token likelier than the rest
    kinds = {"caption": exact[0], "open": exact[1:3].mean(), "choice": exact[3:7].mean(), "lookup": exact[7]}
    return losses.mean(), {k: v.item() for k, v in kinds.items()}


def plot(log: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    groups = {"read from the features": ("shape", "color", "ground", "damage_f1"), "intensity error": ("intensity_error",),
              "answers likelier than not": ("caption", "open", "choice", "lookup")}
    for axis, (title, names) in zip(axes, groups.items()):
        for name in names:
            points = [(r["minutes"], r[name]) for r in log if name in r]
            if points:
                axis.plot(*zip(*points), label=name)
        axis.set(title=title, xlabel="minutes"), axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path.with_suffix(".tmp.png"), dpi=110)
    plt.close(figure)
    os.replace(path.with_suffix(".tmp.png"), path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain the tiny Qwen2.5-VL from nothing.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="runs/tiny-base", help="the run's folder; the checkpoint is its subfolder model/")
    parser.add_argument("--vision-minutes", type=float, default=18, help="phase 1: time for the vision tower alone")
    parser.add_argument("--minutes", type=float, default=55, help="phase 2: time for the whole model")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step in phase 1; phase 2 takes half")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision", default=None, help="skip phase 1: continue from this checkpoint folder's vision tower and heads")
    a = parser.parse_args(argv)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(a.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    heads = Heads(model.config.text_config.hidden_size)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens in the vocabulary")
    log, began = [], time.perf_counter()
    ids = processor.prompt_ids("", [16])
    ids = ids[:ids.index(processor.image_token_id) + 17]          # header, 16 image tokens, <|vision_end|>

    def phase(text: bool, minutes: float, batch: int, groups: list[dict]) -> None:
        loader = iter(DataLoader(Batches(processor, batch, a.seed + text, text), batch_size=None, num_workers=1, prefetch_factor=4))
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
        peaks = [g["lr"] for g in groups]
        start, step, sums = time.perf_counter(), 0, {}
        while (share := (time.perf_counter() - start) / (60 * minutes)) < 1:
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * min(1, (step + 1) / 200) * (0.02 + 0.98 * (1 + np.cos(np.pi * share)) / 2)
            data = next(loader)
            with torch.autocast("cpu", torch.bfloat16):
                features = encode_images(model, data["pixel_values"], data["grid"])
                loss, read = heads(torch.stack(features).float(), data)
                if text:
                    prefix = make_prompt(model, ids, data["grid"][:1], features[:1])
                    answer_loss, kinds = language_loss(model, data, features, prefix)
                    loss, read = answer_loss + 0.1 * loss, read | kinds
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
            optimizer.step()
            step += 1
            for name, value in {"loss": loss.item(), **read}.items():
                sums[name] = sums.get(name, 0) + value
            if step % 50 == 0:
                row = {"phase": 1 + text, "step": step, "minutes": round((time.perf_counter() - began) / 60, 2)}
                row |= {name: round(total / 50, 4) for name, total in sums.items()}
                sums = {}
                log.append(row)
                with open(out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                plot(log, out / "curves.png")

    vision, rest = list(model.model.visual.parameters()), [p for n, p in model.named_parameters() if ".visual." not in n]
    if a.vision:
        from safetensors.torch import load_file
        model.model.visual.load_state_dict(load_file(Path(a.vision) / "visual.safetensors"))
        heads.load_state_dict(load_file(Path(a.vision) / "heads.safetensors"))
    else:
        phase(False, a.vision_minutes, a.batch, [{"params": [*vision, *heads.parameters()], "lr": a.lr}])
        from safetensors.torch import save_file
        save_file({k: v.contiguous() for k, v in model.model.visual.state_dict().items()}, out / "visual.safetensors")
        save_file(heads.state_dict(), out / "heads.safetensors")
    phase(True, a.minutes, a.batch // 2, [{"params": rest, "lr": a.lr}, {"params": [*vision, *heads.parameters()], "lr": a.lr / 4}])
    model.half().save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    print("written:", out / "model")


if __name__ == "__main__":
    main()
