"""Build the tiny Qwen2.5-VL from nothing: tokenizer, vision tower, language model.

    torchrun --nproc-per-node 2 -m rr1.tiny.pretrain          # 2 cores; 1.3 to 1.5 s a step; writes runs/tiny-base/model

1. vision   the vision tower alone learns to say what is drawn at each visual token and how the picture is damaged. Without this
            the language model stays on text statistics for a long time; with it grounding starts at once.
2. whole    everything learns captions, open and choice questions on clean and damaged pictures. One picture carries many
            questions: they branch off one image prefix (`rr1.vlm.group_logps`), so the picture is read once. The read-outs of
            phase 1 stay on as a small extra loss, so that the features that fine-tuning will find frozen still tell the damage.
            Beside it the language model reads the sentences of chains, without pictures, as any language model has read English.

Each phase ends with its weights in --out; a run that is started again skips the phases that are done.
"""
from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from degrade import DEGRADATIONS, degrade, sample_degradations
from rr1 import data, runtime, vlm
from rr1.chain import build_question
from rr1.rollout import sample_group
from rr1.runtime import opt
from rr1.tiny import world
from rr1.tiny.model import build_model, build_processor
from rr1.vlm import Prompt, encode_images, group_logps, make_prompt

TYPES = list(DEGRADATIONS)


class Batches(IterableDataset):
    """Endless batches, made in a worker process. `phase` says what is in them."""

    def __init__(self, processor, phase: str, batch: int, seed: list[int]):
        self.processor, self.phase, self.batch, self.seed = processor, phase, batch, seed

    def __iter__(self):
        cv2.setNumThreads(1), torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            yield self.pictures(rng)

    def pictures(self, rng: np.random.Generator) -> dict:
        """Pictures with what is drawn, how they are damaged and, in the last phase, branches of (tokens, where the answer starts)."""
        images, branches = [], []
        cells = np.zeros((self.batch, 4, 4, 2), np.int64)        # shape and colour at each visual token, 0 = nothing there
        middles = np.stack(np.meshgrid(*2 * [14 + 28 * np.arange(4)]), -1)       # (4, 4, 2): x, y of the tokens' middles
        grounds = np.zeros(self.batch, np.int64)
        damage = np.zeros((self.batch, 2, len(TYPES)), np.float32)    # present?, intensity
        for b in range(self.batch):
            scene = world.sample_scene(rng)
            spots = world.arrange(scene, rng)
            image = world.draw(scene, rng, spots=spots)
            if rng.random() < 0.75:
                applied = sample_degradations(rng, low=1, high=2)
                image = degrade(image, applied, seed=int(rng.integers(2**31)))
                for d in applied:
                    damage[b, :, TYPES.index(d.type)] = 1, d.intensity
            for thing, (center, radius) in zip(scene.things, spots):
                covered = np.hypot(*(middles - center).transpose(2, 0, 1)) < radius + 6
                cells[b, covered] = 1 + world.SHAPES.index(thing.shape), 1 + list(world.COLORS).index(thing.color)
            grounds[b] = world.GROUNDS.index(scene.ground)
            images.append(image)
            if self.phase == "whole":
                branches.append(self.branches(scene, rng))
        pixel_values, grid = self.processor.pixels(images)
        return dict(lines=[self.line(rng) for _ in range(self.batch)] if self.phase == "whole" else [], pixel_values=pixel_values, grid=grid, cells=torch.from_numpy(cells), grounds=torch.from_numpy(grounds),
                    damage=torch.from_numpy(damage), branches=branches)

    def line(self, rng: np.random.Generator) -> list[int]:
        """The sentences of a chain, without tags and without a picture: the language that fine-tuning will put in order."""
        scene = world.sample_scene(rng)
        asked = world.questions(scene)
        chain = world.true_chain(scene, asked[rng.integers(len(asked))], sample_degradations(rng, low=1, high=2), None)
        damage = ", ".join(f"{kind}({s:.2f})" for kind, s in chain.degradations)
        return self.processor.response_ids("\n".join([damage, chain.influence, chain.reasoning, chain.conclusion]))

    def branches(self, scene: world.Scene, rng: np.random.Generator) -> list[tuple[list[int], int]]:
        """A caption, four open and three choice questions, each a turn that follows the picture. Choices are answered by text."""
        *asked, describe = world.questions(scene)
        turns = [(describe.text, describe.answer)]
        for k, i in enumerate(rng.permutation(2 * len(asked))[:7]):
            question = asked[i % len(asked)]
            turns.append((build_question(question.text, world.choices(question, rng) if k >= 4 else None), question.answer))
        tails = []
        for text, answer in turns:
            prompt = self.processor.prompt_ids(text, [1])
            tail = prompt[prompt.index(self.processor.image_token_id) + 2:]      # what follows <|vision_end|>
            tails.append((tail + self.processor.response_ids(answer), len(tail)))
        return tails


class Heads(nn.Module):
    """Linear read-outs of the merged features: the shape and colour at each token, the ground, the damage."""

    def __init__(self, hidden: int):
        super().__init__()
        self.shape, self.color = nn.Linear(hidden, 1 + len(world.SHAPES)), nn.Linear(hidden, 1 + len(world.COLORS))
        self.ground, self.present, self.intensity = nn.Linear(hidden, len(world.GROUNDS)), nn.Linear(hidden, len(TYPES)), nn.Linear(hidden, len(TYPES))

    def forward(self, features: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """features (B, 16, H) -> loss, shares read right."""
        whole = features.mean(1)
        shape, color, ground = self.shape(features), self.color(features), self.ground(whole)
        present, intensity = self.present(whole), self.intensity(whole)
        true_shape, true_color = batch["cells"].flatten(1, 2).unbind(-1)                    # (B, 16) each
        is_there, s = batch["damage"].unbind(1)
        loss = (2 * F.cross_entropy(shape.flatten(0, 1), true_shape.flatten()) + 2 * F.cross_entropy(color.flatten(0, 1), true_color.flatten())
                + 0.5 * F.cross_entropy(ground, batch["grounds"]) + 4 * F.binary_cross_entropy_with_logits(present, is_there)
                + 2 * ((intensity - s).abs() * is_there).sum() / is_there.sum().clamp(min=1))
        filled = true_shape > 0
        found = present > 0
        read = {"shape": (shape.argmax(-1) == true_shape)[filled].float().mean(), "color": (color.argmax(-1) == true_color)[filled].float().mean(),
                "ground": (ground.argmax(-1) == batch["grounds"]).float().mean(),
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
    """Mean over branches of the answer's mean token loss. A picture's eight branches go in two rows: attention over short
    rows is cheaper than the prefix that is computed twice."""
    prompts = [Prompt(prefix.ids, prefix.positions, f) for f in features for _ in range(2)]
    halves = [half for group in batch["branches"] for half in (group[:4], group[4:])]
    logps, mask, _ = group_logps(model, prompts, [[ids for ids, _ in half] for half in halves])
    starts = torch.tensor([start for half in halves for _, start in half])
    answer = mask * (torch.arange(mask.shape[1]) >= starts[:, None])
    losses = -(logps * answer).sum(1) / answer.sum(1)
    exact = ((logps.exp() > 0.5) | (answer == 0)).all(1).float().view(len(features), -1).mean(0)    # each token likelier than the rest
    kinds = {"caption": exact[0], "open": exact[1:5].mean(), "choice": exact[5:].mean()}
    return losses.mean(), {k: v.item() for k, v in kinds.items()}


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
    groups = {"read from the features": ("shape", "color", "ground", "damage_f1"), "intensity error": ("intensity_error",),
              "answers likelier than not": ("caption", "open", "choice")}
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
    steps: int = opt(1000, "steps of the whole phase")
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
