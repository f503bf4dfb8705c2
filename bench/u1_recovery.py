"""Robust-U1's recovery in figures: does Flow-GRPO help, and more than the same time of more fine-tuning? The table of docs/recover.md.

    python bench/u1_recovery.py                                       # 3 seeds -> runs/recovery/report.md
    python bench/u1_recovery.py --seeds 0 --n 64 --grpo="--steps 20"  # a quick look

For each seed: Flow-GRPO as train_recover.py does it by default (grpo-SEED), and the control: the same restorer trained on by stage I
for as many steps as fit into the seconds that Flow-GRPO's steps took (control-SEED; a few steps are timed first: probe-SEED). Then
all recover the same held-out damaged scenes from the same noise. PSNR, SSIM and R_sem are what they are trained on, or near it; the
judge is not: a small convolutional network that never saw a damaged or a recovered picture says for each quarter of the picture which
shape and which colour is there (or none), and counts where both are right. Differences are paired by picture, with 95 % bootstrap
intervals. Run it again after an interruption: what is finished stays, what was begun goes on.
"""
from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runs import seconds, train
from rr1 import data, files, records, runtime, tiny
from rr1.u1 import image_rewards, recovery, restorer
from rr1.evaluation.statistics import Estimate, bootstrap, paired_difference
from rr1.runtime import opt
from rr1.tiny import world
from rr1.evaluation.statistics import interval, markdown

CONTROL_LR = 6e-4                    # 0.3 of the default run's: this is a second round, from the first one's end
PROBE_STEPS, WARM = 12, 2            # of the timing; the first steps are slower
MEASURES = {m: recovery.TITLES[m] for m in ("psnr", "ssim", "r_sem")} | {"reward": "R", "read": "read right"}


@dataclass
class Config:
    model: str = opt(tiny.RESTORER, "the restorer after stage I that both start from")
    seeds: list[int] = opt([0, 1, 2], "one Flow-GRPO run and one control each")
    grpo: str = opt("", 'more options for train_recover.py --stage grpo, as --grpo="--lr 1e-5"')
    n: int = opt(512, "held-out damaged scenes")
    steps: int = opt(40, "Euler steps of a recovery")
    reader_steps: int = opt(800, "training steps of the judge, about a minute")
    jobs: int = opt(1, "processes at a time; they share the cores")
    out: str = opt("runs/recovery", "folder for all runs, scores and the report")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    out, seeds = Path(config.out), config.seeds
    out.mkdir(parents=True, exist_ok=True)
    runtime.seed_everything(0)

    # 1. train: Flow-GRPO, then the control for as long
    model = restorer.Restorer.from_pretrained(config.model)
    recovery.load_source("", "", model.config["side"])                              # drawn once, before several runs ask for it
    grpo = ["train_recover.py", "--stage", "grpo", "--model", config.model, *shlex.split(config.grpo)]
    sft = ["train_recover.py", "--model", config.model, "--lr", CONTROL_LR]
    train(config, {f"grpo-{s}": [*grpo, "--seed", s] for s in seeds})
    train(config, {f"probe-{s}": [*sft, "--seed", s, "--steps", PROBE_STEPS] for s in seeds})
    train(config, {f"control-{s}": [*sft, "--seed", s, "--steps", control_steps(out, s)] for s in seeds})

    # 2. recover the held-out scenes, and score
    damaged, clean, scenes = held_out(config.n, model.config["side"])
    encoder, judge = image_rewards.load_encoder(tiny.BASE), trained_reader(out, model.config["side"], config.reader_steps)
    rows = {"damaged": damaged, "clean": clean, "stage I, equidistant": config.model, "stage I": config.model} | {
        f"{kind}-{s}": str(out / f"{kind}-{s}" / "model") for kind in ("grpo", "control") for s in seeds}
    scores = {name: scored(out, name, shown, damaged, clean, scenes, encoder, judge, config) for name, shown in rows.items()}

    # 3. compare
    took = {name: sum(seconds(out / name)) for name in rows if (out / name).is_dir()}
    result, text = report(scores, seeds, took)
    files.write_text(out / "report.json", files.to_json(result, indent=1) + "\n")
    files.write_text(out / "report.md", text + "\n")
    print(f"\n{text}\n\nwritten: {out}/report.md, report.json")


def control_steps(out: Path, seed: int) -> int:
    """Steps of stage I that take as long as the Flow-GRPO run's steps did."""
    return max(1, round(sum(seconds(out / f"grpo-{seed}")) / statistics.median(seconds(out / f"probe-{seed}")[WARM:])))


def held_out(n: int, side: int) -> tuple[Tensor, Tensor, list[world.Scene]]:
    """The first n scenes of the test split that are damaged."""
    source, pairs, scenes, index = tiny.pairs(side, seed=1), [], [], 0
    while len(pairs) < n:
        if world.sample(index, 1).record["degradations"]:
            pairs.append(source.pair(index))
            scenes.append(world.sample_scene(np.random.default_rng([1, index])))            # as world.sample draws it
        index += 1
    damaged, clean = zip(*pairs)
    return recovery.to_tensor(damaged), recovery.to_tensor(clean), scenes


# ---------------------------------------------------------------- the judge

def labels(scenes: list[world.Scene]) -> tuple[Tensor, Tensor]:
    """Shape and colour in each quarter, (N, 4) each; the last class is none."""
    shape, color = (torch.full((len(scenes), 4), len(names)) for names in (world.SHAPES, world.COLORS))
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            place = world.PLACES.index(thing.place)
            shape[i, place], color[i, place] = world.SHAPES.index(thing.shape), list(world.COLORS).index(thing.color)
    return shape, color


class Reader(nn.Module):
    """Pictures (N, 3, side, side) -> logits of shape (N, 7, 2, 2) and of colour (N, 7, 2, 2), for the four quarters."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for wide in (24, 48, 96):
            layers += [nn.Conv2d(width, wide, 3, 2, 1), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, wide, 3, 1, 1), nn.BatchNorm2d(wide), nn.ReLU()]
            width = wide
        self.body, self.pool = nn.Sequential(*layers), nn.AdaptiveMaxPool2d(2)
        self.shape, self.color = (nn.Conv2d(width, len(names) + 1, 1) for names in (world.SHAPES, world.COLORS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        h = self.pool(self.body(2 * pictures.clamp(0, 1) - 1))
        return self.shape(h), self.color(h)


def trained_reader(out: Path, side: int, steps: int, batch: int = 32) -> Reader:
    """A reader taught on clean scenes that are in no data set; kept in out/reader.safetensors."""
    from safetensors.torch import load_file, save
    reader, path = Reader(), out / "reader.safetensors"
    if path.exists():
        reader.load_state_dict(load_file(path))
        return reader.eval()

    def load(step: int) -> tuple[Tensor, list[world.Scene]]:
        rng, scenes, images = np.random.default_rng([7, step]), [], []
        for _ in range(batch):
            scenes.append(world.sample_scene(rng))
            images.append(records.resize(world.draw(scenes[-1], rng), side, side))
        return recovery.to_tensor(images), scenes

    optimizer = runtime.build_optimizer(reader, 3e-3, 0.01)
    for step, (images, scenes) in data.prefetch(load, range(steps)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * runtime.cosine_with_warmup(step, steps, 20, floor=0.02)
        loss = sum(nn.functional.cross_entropy(logits.flatten(2), truth) for logits, truth in zip(reader(images), labels(scenes)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"reader: step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    files.write_bytes(path, save(reader.state_dict()))
    return reader.eval()


@torch.no_grad()
def read_right(judge: Reader, pictures: Tensor, scenes: list[world.Scene]) -> np.ndarray:
    """Of each picture the share of its things whose shape and colour are both read right in their quarter, (N,)."""
    shape, color = (torch.cat([judge(part)[k] for part in pictures.split(64)]).argmax(1).flatten(1) for k in (0, 1))
    true_shape, true_color = labels(scenes)
    there = true_shape < len(world.SHAPES)
    return (((shape == true_shape) & (color == true_color) & there).sum(1) / there.sum(1)).numpy()


# ---------------------------------------------------------------- scoring and comparing

def scored(out: Path, name: str, shown: Tensor | str, damaged: Tensor, clean: Tensor, scenes, encoder, judge, config: Config) -> dict[str, np.ndarray]:
    """Each measure of each picture, kept in out/NAME.npz: of pictures as they are, or of what a restorer's folder makes of the damaged."""
    path = out / f"{name}.npz"
    if path.exists() and len(found := dict(np.load(path))["psnr"]) == len(damaged):
        return dict(np.load(path))
    if isinstance(shown, str):
        print(f"{name}: recovers {len(damaged)} pictures", flush=True)
        shift = 1.0 if "equidistant" in name else restorer.SHIFT
        shown = recovery.recover(restorer.Restorer.from_pretrained(shown).eval(), damaged, config.steps, shift=shift)
        files.write_bytes(out / f"{name}.png", recovery.strip(damaged[:12], shown[:12], clean[:12]))
    found = recovery.measure(shown, clean, encoder)
    found |= {"reward": image_rewards.PIX * found["ssim"] + image_rewards.SEM * found["r_sem"], "read": read_right(judge, shown, scenes)}
    np.savez(path.with_suffix(".tmp.npz"), **found)
    path.with_suffix(".tmp.npz").replace(path)
    return found


def report(scores: dict[str, dict[str, np.ndarray]], seeds: list[int], took: dict[str, float]) -> tuple[dict, str]:
    """All estimates, and the table as Markdown."""
    plain = lambda e: f"{e.value:.2f}" if e.value >= 10 else f"{e.value:.3f}"
    less = lambda a, b: {m: paired_difference((scores[a][m], None), (scores[b][m], None)) for m in MEASURES}
    now = {name: {m: bootstrap(found[m]) for m in MEASURES} for name, found in scores.items()}
    gain = {name: less(name, "damaged" if name.startswith("stage I") else "stage I") for name in scores if name not in ("damaged", "clean")}
    duel = {str(s): less(f"grpo-{s}", f"control-{s}") for s in seeds}

    def line(title: str, name: str) -> list[str]:
        change = gain.get(name, {})
        cells = [plain(now[name][m]) + (f" ({interval(change[m]._asdict())})" if m in change else "") for m in MEASURES]
        return [title, *cells, f"{took[name]:.0f}" if name in took else ""]

    lines = [line("damaged", "damaged"), *(line(f"{name} (less damaged)", name) for name in ("stage I", "stage I, equidistant"))]
    lines += [line(f"{title}, seed {s}", f"{kind}-{s}") for kind, title in (("grpo", "stage II"), ("control", "more stage I")) for s in seeds]
    lines += [[f"stage II less more stage I, seed {s}", *(interval(duel[str(s)][m]._asdict()) for m in MEASURES), ""] for s in seeds]
    lines += [line("clean", "clean")]
    n = next(iter(now["damaged"].values())).n
    table = markdown(["", *MEASURES.values(), "seconds"], lines)
    text = (f"{n} held-out damaged scenes. In brackets: the difference to stage I with its 95 % interval, paired by picture; **bold** where that is\n"
            f"clear of 0. R = SSIM + 0.2 R_sem is the reward of stage II. Read right: things whose shape and colour a reader of clean pictures names.\n\n{table}")
    thirds, parts = recovery.by_damage(scores["damaged"], scores["stage I"], {m: MEASURES[m] for m in ("psnr", "ssim", "read")})
    text += f"\n\nStage I, by how damaged the pictures are:\n\n{parts}"
    as_dicts = lambda tree: {k: v._asdict() if isinstance(v, Estimate) else as_dicts(v) for k, v in tree.items()}
    return {"n": n, "now": as_dicts(now), "gain": as_dicts(gain), "stage_2_less_control": as_dicts(duel), "by_damage": thirds, "training_seconds": took}, text


if __name__ == "__main__":
    main()
