"""Build the tiny Qwen2.5-VL from nothing: tokenizer, vision tower, language model.

    torchrun --nproc-per-node 2 -m rr1.tiny.pretrain      # 2 cores; writes runs/tiny-base/model

1. vision   the vision tower alone learns to say what is drawn at each visual token, on clean and
            mildly damaged pictures, and how a picture is damaged, on all. Without this the language
            model stays on text statistics for a long time; with it grounding starts at once.
2. whole    everything learns captions and questions of one to three steps, answered at once and
            step by step, on clean pictures. A picture's conversations branch off one image prefix
            (`rr1.vlm.group_logps`), so it is read once. The read-outs of phase 1 stay on as a small
            extra loss, so that the features that fine-tuning will find frozen still tell the
            damage. Beside it the language model reads the sentences of chains, without pictures,
            as any language model has read English.
3. notes    as 2, but half of the pictures have other colours than the true ones, and a note before
            the question says so ("grey hides white"). With notes from the start looking a thing up
            had not been learnt after 300 steps (.36 of the one-step answers; .68 without).

Each phase ends with its weights in --out; a run that is started again skips what is done.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path

import torch
import torch.nn.functional as F
from numpy.random import default_rng
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from rr1 import files, runtime
from rr1.runtime import opt
from rr1.tiny import scenes, world
from rr1.tiny.lessons import Batches
from rr1.tiny.model import build_model, build_processor
from rr1.vlm import Processor, Prompt, encode_images, group_logps, make_prompt

SIZE = 0.3  # of features and embeddings


class Heads(nn.Module):
    """Linear read-outs of the merged features: the shape and colour at each token and where it
    is, the ground, the damage. Where it is matters: M-RoPE turns neighbouring columns too
    little for the language model to tell them apart by that."""

    def __init__(self, hidden: int):
        super().__init__()
        sizes = {
            "shape": 1 + len(scenes.SHAPES),
            "color": 1 + len(scenes.COLORS),
            "place": 16,
            "ground": len(scenes.GROUNDS),
            "present": len(world.TYPES),
            "intensity": len(world.TYPES),
        }
        heads = {name: nn.Linear(hidden, size) for name, size in sizes.items()}
        self.read = nn.ModuleDict(heads)

    def forward(self, features: Tensor, batch: dict) -> tuple[Tensor, dict[str, float]]:
        """features (B, 16, H) -> loss, shares read right. A target of -100 is not read."""
        whole = features.mean(1)  # (B, H)
        shape, color = batch["cells"].flatten(0, 2).unbind(-1)  # (16 B,) each
        targets = {
            "shape": shape,
            "color": color,
            "place": torch.arange(16).repeat(len(features)),
        }
        # (16 B, classes) each
        cells = {name: self.read[name](features).flatten(0, 1) for name in targets}
        ground, present, intensity = (
            self.read[name](whole) for name in ("ground", "present", "intensity")
        )
        is_there, s = batch["damage"].unbind(1)  # (B, types) each
        error = ((intensity - s).abs() * is_there).sum() / is_there.sum().clamp(min=1)
        loss = 0.5 * F.cross_entropy(ground, batch["grounds"]) + 2 * error
        loss = loss + 4 * F.binary_cross_entropy_with_logits(present, is_there)
        for name, weight in {"shape": 2, "color": 2, "place": 0.5}.items():
            loss = loss + weight * F.cross_entropy(cells[name], targets[name])
        found, filled = present > 0, shape > 0
        hits = {
            name: (cells[name].argmax(-1) == targets[name])[filled].float().mean()
            for name in cells
        }
        named = (found.sum() + is_there.sum()).clamp(min=1)
        hits["damage_f1"] = 2 * (found * is_there).sum() / named
        hits["intensity_error"] = error
        return loss, {name: value.item() for name, value in hits.items()}


def text_loss(model, lines: list[list[int]]) -> Tensor:
    """Mean token loss of text without a picture."""
    nothing = torch.zeros(0, model.config.text_config.hidden_size)
    start = torch.zeros(3, 1, dtype=torch.long)
    prompts = [Prompt(torch.tensor(ids[:1]), start, nothing) for ids in lines]
    logps, mask, _ = group_logps(model, prompts, [[ids[1:]] for ids in lines])
    return -(logps * mask).sum() / mask.sum()


def language_loss(
    model, batch: dict, prompts: list[Prompt]
) -> tuple[Tensor, dict[str, float]]:
    """Mean over the turns of the answer's mean token loss; the share of answers, by kind, whose
    every token is likelier than not."""
    losses, right = [], defaultdict(list)
    # short and long conversations apart: less padding
    for part in (slice(0, -1), slice(-1, None)):
        talks = [parts[part] for parts in batch["conversations"]]
        wanted = [[ids for ids, _ in parts] for parts in talks]
        logps, _, _ = group_logps(model, prompts, wanted)  # (N, L)
        for row, (_, answers) in enumerate(talk for parts in talks for talk in parts):
            for kind, start, end in answers:
                losses.append(-logps[row, start:end].mean())
                right[kind].append(bool((logps[row, start:end] > log(0.5)).all()))
    shares = {kind: sum(r) / len(r) for kind, r in sorted(right.items())}
    return torch.stack(losses).mean(), shares


@torch.no_grad()
def same_size(model, heads: Heads, batch: dict) -> None:
    """Scale the features, by the merger's last layer, and the embeddings to a root mean square
    of SIZE; the read-outs of the features stay what they were."""
    features = torch.cat(encode_images(model, batch["pixel_values"], batch["grid"]))
    factor = SIZE / features.square().mean().sqrt()
    last = model.model.visual.merger.mlp[-1]
    last.weight.mul_(factor)
    last.bias.mul_(factor)
    for head in heads.read.values():
        head.weight.div_(factor)
    embeddings = model.get_input_embeddings().weight
    embeddings.mul_(SIZE / embeddings.square().mean().sqrt())


@dataclass
class Config:
    out: str = opt("runs/tiny-base", "folder; the checkpoint is its subfolder model/")
    vision_steps: int = opt(1800, "steps of the vision phase")
    steps: int = opt(560, "steps of the whole phase")
    notes: int = opt(400, "steps of the phase with notes, from 0.6 of the rate")
    batch: int = opt(32, "pictures that are talked about a step, over all processes")
    lr: float = opt(1.5e-3, "peak learning rate")
    seed: int = opt(0, "fixes the weights' start and the data")


def losses(
    model, heads: Heads, batch: dict, header: list[int]
) -> tuple[Tensor, dict[str, float]]:
    """The batch's loss and what was right. `header`: the ids before and of a picture."""
    features = encode_images(model, batch["pixel_values"], batch["grid"])
    loss, read = heads(torch.stack(features).float(), batch)
    talks = len(batch["conversations"])
    if talks:
        first = make_prompt(model, header, batch["grid"][:1], features[:1])
        prompts = [Prompt(first.ids, first.positions, f) for f in features[:talks]]
        answers, kinds = language_loss(model, batch, prompts)
        text = text_loss(model, batch["lines"])
        loss = answers + 0.3 * text + 0.2 * loss
        read |= kinds | {"text_loss": text.item()}
    return loss, read


def train(
    done: Path, steps: int, lessons: Batches, optimizers: list, both, loss_of, rt
) -> None:
    """One phase; `both` model and heads are saved to, or read from, the file `done`."""
    if done.exists():
        load_model(both, done)
        return
    # spawned: a forked worker would keep a copy of all that this process has in memory
    loader = iter(
        DataLoader(lessons, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    sums: dict[str, float] = defaultdict(float)
    for step in tqdm(range(1, steps + 1), done.stem, disable=not rt.is_main):
        with torch.autocast("cpu", torch.bfloat16):
            loss, read = loss_of(next(loader))
        both.zero_grad(set_to_none=True)
        (loss / rt.world_size).backward()
        runtime.sum_gradients(parameters, rt)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in groups:
            factor = runtime.cosine_with_warmup(step, steps, 50, floor=0.02)
            group["lr"] = group["initial_lr"] * factor
        for optimizer in optimizers:
            optimizer.step()
        for name, value in {"loss": loss.item(), **read}.items():
            sums[name] += value / 50
        if rt.is_main and step % 50 == 0:
            row = {"phase": done.stem, "step": step, **sums}
            files.append_lines(done.parent / "metrics.jsonl", [row])
            sums.clear()
    if rt.is_main:
        temporary = done.with_suffix(".tmp")
        save_model(both, str(temporary))
        temporary.replace(done)


def adamw(lr: float, parameters) -> torch.optim.Optimizer:
    groups = [{"params": list(parameters), "initial_lr": lr}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)


def main(argv: list[str] | None = None) -> None:
    a = runtime.parse_config(Config, argv, __doc__)
    rt = runtime.setup()
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(a.seed)
    # the tokenizer is made once: its ids follow from the world's text
    with runtime.main_first(rt):
        if not (out / "model").exists():
            build_processor().save_pretrained(out / "model")
    processor = Processor.from_pretrained(str(out / "model"))
    model = build_model(processor.tokenizer)
    heads = Heads(model.config.text_config.hidden_size)
    both = nn.ModuleDict({"model": model, "heads": heads})
    header = processor.prompt_ids("", [16])
    end = header.index(processor.image_token_id) + 17  # 16 image tokens and <|vision_end|>
    loss_of = partial(losses, model, heads, header=header[:end])

    # 1. vision
    share = a.batch // rt.world_size
    seeing = [*model.model.visual.parameters(), *heads.parameters()]
    lessons = Batches(processor, share, share, [a.seed, 1, rt.rank], talk=False)
    train(
        out / "1-vision.safetensors",
        a.vision_steps,
        lessons,
        [adamw(a.lr, seeing)],
        both,
        loss_of,
        rt,
    )
    # by the same pictures in every process
    same_size(model, heads, lessons.batch(default_rng(a.seed)))

    # 2. whole: Muon for the language model's matrices (looking up a thing by its shape or colour
    # came within 150 steps, where AdamW had not got there in 450), AdamW for the rest
    language = model.model.language_model
    matrices = [p for p in language.layers.parameters() if p.ndim == 2]
    rest = [p for p in language.parameters() if not any(p is m for m in matrices)]
    phases = (2, "whole", a.steps, 1, 0.0), (3, "notes", a.notes, 0.6, 0.5)
    for number, name, steps, rate, notes in phases:
        muon = [{"params": matrices, "initial_lr": 0.02 * rate}]
        optimizers = [torch.optim.Muon(muon, lr=0.02, weight_decay=0.02)]
        optimizers += [adamw(2 * a.lr * rate, rest), adamw(a.lr / 4 * rate, seeing)]
        lessons = Batches(
            processor,
            share,
            share // 2,
            [a.seed, number, rt.rank],
            talk=True,
            notes=notes,
        )
        train(
            out / f"{number}-{name}.safetensors",
            steps,
            lessons,
            optimizers,
            both,
            loss_of,
            rt,
        )
    if rt.is_main:
        model.half().save_pretrained(out / "model")
        print("written:", out / "model")
    runtime.teardown(rt)


if __name__ == "__main__":
    main()
