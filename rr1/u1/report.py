"""How well damage was undone: PSNR, SSIM and R_sem of pictures that no step trained on.

    python -m rr1.u1.report --restorer runs/recover/model               # held-out scenes
    python -m rr1.u1.report --restorer runs/recover-photos/model --data photos  # crops of photos

writes report.txt and strip.png (damaged, recovered, clean). Undamaged pictures are left out: they
would count 100 dB each. Intervals are 95 %, by a bootstrap over pictures.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from rr1 import data, files, runtime, tiny
from rr1.evaluation.statistics import interval, markdown, paired_difference
from rr1.runtime import opt
from rr1.u1 import pairs, rewards
from rr1.u1.restorer import Restorer, distance, recover, to_uint8

TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "r_sem": "R_sem"}
STEPS = (1, 2, 3, 5, 10, 20)  # to choose from
THIRDS = ("most damaged third", "middle third", "least damaged third")
Scores = dict[str, np.ndarray]  # a measure of each picture, (N,)


@dataclass
class Config:
    restorer: str = opt(tiny.RESTORER, "a restorer's folder, as train_recover.py writes it")
    data: str = opt("", "folder of clean photos; empty: the drawn world's held-out scenes")
    limit: int = opt(256, "pictures, the undamaged ones counted", low=1)
    steps: int | None = opt(
        None, "Euler steps of a recovery; default: the model's own", low=1
    )
    encoder: str = opt(tiny.BASE, "of R_sem: a Qwen2.5-VL or a CLIP, folder or hub id")
    out: str = opt("runs/report-recovery", "folder of the report")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    device = runtime.setup().device
    model = Restorer.from_pretrained(config.restorer).to(device)
    side = model.config["side"]
    source = pairs.Scenes(side)
    if config.data:
        source = pairs.load_source(config.data, side)
    damaged, clean = pairs.held_out(source, config.limit)  # (N, 3, side, side) each
    changed = (damaged != clean).flatten(1).any(1)  # (N,)
    damaged, clean = damaged[changed], clean[changed]

    seeds = [data.seed_for(0, i) for i in range(len(damaged))]
    recovered = recover(model, damaged, seeds, config.steps).cpu()
    encoder = rewards.load_encoder(config.encoder, device)
    before = measure(damaged, clean, encoder)
    after = measure(recovered, clean, encoder)
    text = table({"damaged": before, "recovered": after}, "recovered")

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "report.txt", text + "\n")
    picture = strip(damaged[:10], recovered[:10], clean[:10])
    files.write_bytes(out / "strip.png", picture)
    print(f"{text}\n\nwritten: {out}/report.txt, strip.png")


def measure(
    pictures: Tensor,
    clean: Tensor,
    encoder: rewards.Encoder,
) -> Scores:
    """PSNR in dB, SSIM and R_sem of each picture."""
    r_sem = []
    for x, y in zip(pictures.split(64), clean.split(64)):  # an encoder takes memory
        r_sem.append(rewards.r_sem(x, y, encoder))
    scores = {
        "psnr": rewards.psnr(pictures, clean),
        "ssim": rewards.ssim(pictures, clean),
        "r_sem": torch.cat(r_sem),
    }
    return {name: values.cpu().numpy() for name, values in scores.items()}


def earned(scores: Scores) -> np.ndarray:
    """R of each picture, with the published weights."""
    return rewards.PIX * scores["ssim"] + rewards.SEM * scores["r_sem"]


def choose_sampler(model: Restorer, source, encoder: rewards.Encoder, n: int = 128) -> None:
    """Set the model's steps and gate to those that earn most on the first n pairs to train on."""
    indices = [i % len(source) for i in range(n)]
    damaged, clean = pairs.load_pairs(source, indices, range(n))  # (n, 3, side, side) each
    R_damaged = earned(measure(damaged, clean, encoder))  # (n,)
    R_recovered, change = np.full(n, -1.0), None
    for steps in STEPS:
        recovered = recover(model, damaged, steps=steps, gate=0.0).cpu()
        R = earned(measure(recovered, clean, encoder))
        if R.mean() > R_recovered.mean():
            R_recovered = R
            change = distance(recovered, damaged).numpy()
            model.config["steps"] = steps
    gates = [0.0, *map(float, np.sort(change))]
    means = [np.where(change < gate, R_damaged, R_recovered).mean() for gate in gates]
    model.config["gate"] = round(gates[int(np.argmax(means))], 4)


def strip(*rows: Tensor) -> bytes:
    """Rows of pictures (N, 3, H, W), one above the other, as a PNG; small ones are enlarged."""
    zoom = max(1, 64 // rows[0].shape[-1])
    lines = [np.hstack(to_uint8(row)) for row in rows]  # (H, N W, 3) each
    image = np.vstack(lines).repeat(zoom, axis=0).repeat(zoom, axis=1)
    return to_png(image)


def to_png(image: np.ndarray) -> bytes:
    """RGB uint8 (H, W, 3)."""
    _, png = cv2.imencode(".png", image[:, :, ::-1])
    return png.tobytes()


def table(scores: dict[str, Scores], first: str, titles: dict[str, str] = TITLES) -> str:
    """The rows' means, and in brackets paired differences: of the row `first` to the damaged
    pictures, of the others to `first`. Then the gain of `first` by how damaged they are."""
    rows = []
    for name, found in scores.items():
        cells = [f"{found[m].mean():.3f}" for m in titles]
        if name not in ("damaged", "clean"):
            before = scores["damaged" if name == first else first]
            cells = [f"{mean} ({gain})" for mean, gain in zip(cells, gains(before, found))]
        rows.append([name, *cells])
    damaged = scores["damaged"]
    return (
        f"{len(damaged['ssim'])} damaged pictures. In brackets: {first} less damaged, the others "
        f"less {first}; **bold** where that is clear of 0.\n\n"
        f"{markdown(['', *titles.values()], rows)}\n\n"
        f"{first}, by how damaged they are:\n\n{by_damage(damaged, scores[first], titles)}"
    )


def gains(before: Scores, after: Scores) -> list[str]:
    """How much more each measure is after than before, paired by picture."""
    return [interval(paired_difference(after[m], before[m])) for m in before]


def by_damage(
    before: Scores,
    after: Scores,
    titles: dict[str, str],
) -> str:
    """The gain in each third of the pictures by the SSIM of the damaged one."""
    rows = []
    order = np.argsort(before["ssim"], kind="stable")
    for name, third in zip(THIRDS, np.array_split(order, 3)):
        was = {m: values[third] for m, values in before.items()}
        now = {m: values[third] for m, values in after.items()}
        both = zip(was.values(), gains(was, now))
        cells = [f"{values.mean():.3f}, {gain}" for values, gain in both]
        rows.append([name, *cells])
    header = [f"{title}: damaged, gain" for title in titles.values()]
    return markdown(["", *header], rows)


if __name__ == "__main__":
    main()
