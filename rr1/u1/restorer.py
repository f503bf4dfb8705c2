"""Robust-U1's self-recovery at a small scale: a velocity network v(z_t, z_c, t) that turns noise into the clean picture, given the
damaged one.

    python -m rr1.u1.restorer                                           # the drawn world's splits with recovered pictures -> runs/recovered
    python -m rr1.u1.restorer --model runs/recover/model --data test.jsonl --images test_images --out recovered

writes a data set for stage III: each line's `image` is [damaged, recovered], and its question starts with <image><image>.

    pictures  (N, 3, H, W), values in [0, 1]          z  the same in [-1, 1], or latents of an autoencoder (N, C, h, w)
"""
from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from rr1 import data, runtime, tiny
from rr1.u1 import flow
from rr1.u1.pairs import resize
from rr1.files import to_json, write_bytes, write_text
from rr1.runtime import opt

SHIFT = 10.0                         # of a recovery's times: what the damage was is decided near t = 1, so most steps are made there


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; the time scales and shifts what comes between them."""

    def __init__(self, width: int, time: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width, affine=False)
        self.conv_1, self.conv_2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(time, 2 * width)
        nn.init.zeros_(self.conv_2.weight), nn.init.zeros_(self.conv_2.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[..., None, None].chunk(2, 1)
        h = self.norm_2(self.conv_1(F.silu(self.norm_1(x)))) * (1 + scale) + shift
        return x + self.conv_2(F.silu(h))


class Attention(nn.Module):
    """Every place looks at every other one: blocks that changed places are far apart."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).flatten(4).transpose(-1, -2).unbind(1)   # (N, heads, h w, size)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape))


class Restorer(nn.Module):
    """A U-Net behind space-to-depth: at 32 x 32 its places are 16 x 16, 8 x 8 and 4 x 4. It does not write the velocity itself but, for
    each number of z, a mean m and a deviation s of z_0, and gives the velocity that is exact for z_0 ~ N(m, s^2):

        v = E[eps - z_0 | z_t] = d (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2) - m,    d = z_t - (1 - t) m

    m is z_c under a colour map of its place (of each 4 x 4 pixels, blended between them), plus a correction of each number. It starts as z_c
    and s as 0.03, so there remain to be learnt where the damaged picture can be trusted and what to put elsewhere; both see z_t.

    channels  of z: 3 for pixels               widths  of the three scales
    side      of the pictures that it was trained on, a multiple of 8; others work too
    vae       "" for pixels, or a folder of a diffusers AutoencoderKL whose latents it works in
    """

    def __init__(self, channels: int = 3, widths: Sequence[int] = (32, 64, 112), side: int = 32, vae: str = ""):
        super().__init__()
        self.config = {"channels": channels, "widths": list(widths), "side": side, "vae": vae}
        (a, b, c), time = widths, 128
        self.time = nn.Sequential(nn.Linear(64, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.start = nn.Conv2d(12 * channels, a, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1), nn.Conv2d(b, c, 3, 2, 1)])
        self.blocks = nn.ModuleList([Block(width, time) for width in (b, c, c, b, a)])
        self.attention = Attention(c)
        self.up = nn.ModuleList([nn.Conv2d(c, 4 * b, 1), nn.Conv2d(b, 4 * a, 1)])
        self.end = nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, 8 * channels, 3, padding=1))
        self.colour = nn.Conv2d(b, channels * (channels + 1), 1)
        for last in (self.end[-1], self.colour):
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.to(memory_format=torch.channels_last)                                  # a fifth faster on a CPU

    def forward(self, z_t: Tensor, z_c: Tensor, t: Tensor) -> Tensor:
        """The velocity (N, C, H, W) at z_t and the times t (N,), given z_c."""
        u = t.view(-1, 1, 1, 1)
        angles = t[:, None] * torch.exp(torch.linspace(0, 5, 32, device=t.device))
        time = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        residual = (z_t - (1 - u) * z_c) / ((1 - u) ** 2 * 0.1**2 + u**2).sqrt()
        full = F.pixel_unshuffle(torch.cat([residual, z_c, z_t], 1), 2).contiguous(memory_format=torch.channels_last)
        x = self.start(full)                                                        # (N, a, H / 2, W / 2)
        y = self.blocks[0](self.down[0](F.silu(x)), time)                           # (N, b, H / 4, W / 4)
        h = self.attention(self.blocks[1](self.down[1](y), time))                   # (N, c, H / 8, W / 8)
        y = self.blocks[3](y + F.pixel_shuffle(self.up[0](self.blocks[2](h, time)), 2), time)
        x = self.blocks[4](x + F.pixel_shuffle(self.up[1](y), 2), time)
        shift, log_s = F.pixel_shuffle(self.end(x), 2).to(z_t.dtype).chunk(2, 1)
        colour = F.interpolate(self.colour(y), scale_factor=4, mode="bilinear").to(z_t.dtype).unflatten(1, (z_c.shape[1], -1))
        m = z_c + (colour[:, :, 1:] * z_c[:, None]).sum(2) + colour[:, :, 0] + 0.5 * shift
        s = (log_s + math.log(0.03)).clamp(math.log(0.005), 0).exp()
        return (z_t - (1 - u) * m) * (u - (1 - u) * s**2) / ((1 - u) ** 2 * s**2 + u**2) - m

    def save_pretrained(self, folder: str | Path) -> None:
        """config.json and model.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_bytes(Path(folder) / "model.safetensors", save({name: p.contiguous() for name, p in self.state_dict().items()}))
        write_text(Path(folder) / "config.json", to_json(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Restorer:
        try:
            config, weights = json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")
            model = cls(**config)
            model.load_state_dict(weights)
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise SystemExit(f"{folder}: not a restorer's folder, with config.json and model.safetensors as train_recover.py "
                             f"writes them: {error}") from error
        return model.to(dtype)


# ---------------------------------------------------------------- pictures in, pictures out

def autoencoder(name: str, config_only: bool = False):
    """A frozen AutoencoderKL of diffusers by folder or hub id, weights only as safetensors; or its configuration, a dict."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise SystemExit("a restorer in the latents of an autoencoder asks for diffusers: pip install diffusers, or leave --vae out for pixels") from error
    try:
        if config_only:
            return AutoencoderKL.load_config(name)
        return AutoencoderKL.from_pretrained(name, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name}: not the folder or hub id of an AutoencoderKL (--vae when the restorer was made): {error}") from error


def for_pictures(side: int | None = None, vae: str = "", folder: str = "") -> Restorer:
    """A restorer of pictures side x side: a new one (default 32), in pixels or in an autoencoder's latents, or one from a folder (default: its
    own side). It is made of convolutions, so its weights fit any side; the coarsest scale's attention then sees more places than it was taught on."""
    model = Restorer.from_pretrained(folder) if folder else None
    side, vae = (side or model.config["side"], model.config["vae"]) if model else (side or 32, vae)
    channels, halvings = 3, 3
    if vae:
        config = autoencoder(vae, config_only=True)
        channels, halvings = config["latent_channels"], halvings + len(config["block_out_channels"]) - 1
    if side % 2**halvings:
        raise SystemExit(f"--side {side}: pictures are halved {halvings} times{', by the autoencoder too' if vae else ''}; give a multiple of {2**halvings}")
    model = model or Restorer(channels, side=side, vae=vae)
    model.config["side"] = side
    return model


def codec(model: Restorer):
    """(encode, decode) between pictures and z: 2 x - 1 and back, or through the model's autoencoder, which is loaded here."""
    if not model.config["vae"]:
        return (lambda pictures: 2 * pictures - 1), (lambda z: (z + 1) / 2)
    vae = autoencoder(model.config["vae"]).to(next(model.parameters()).device)
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    encode = lambda pictures: (vae.encode(2 * pictures - 1).latent_dist.mode() - shift) * scale
    return torch.no_grad()(encode), torch.no_grad()(lambda z: (vae.decode(z / scale + shift).sample + 1) / 2)


def noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(N, *shape) of standard normal numbers, each picture's from its own seed, so that no batch or process changes them."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)


@torch.no_grad()
def restore(model: Restorer, pictures: Tensor, steps: int = 40, seeds: Sequence[int] | None = None, batch: int = 64,
            shift: float = SHIFT) -> Tensor:
    """Damaged pictures -> recovered ones of the same shape, by Euler steps from noise at shifted times; not clamped. seeds: one a picture;
    default 0, 1, .."""
    device, out = next(model.parameters()).device, []
    encode, decode = codec(model)
    seeds = range(len(pictures)) if seeds is None else seeds
    for i in range(0, len(pictures), batch):
        z_c = encode(pictures[i:i + batch].to(device))
        z_1 = noise(seeds[i:i + batch], z_c.shape[1:], device)
        out.append(decode(flow.euler(lambda z, t: model(z, z_c, t), z_1, flow.time_grid(steps, shift))))
    return torch.cat(out)


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 RGB pictures of one size -> (N, 3, H, W), values in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 255


def to_uint8(pictures: Tensor) -> np.ndarray:
    """Undo `to_tensor`; what lies outside [0, 1] is clamped."""
    return (pictures.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------- the command

@dataclass
class Config:
    model: str = opt(tiny.RESTORER, "a restorer's folder, as train_recover.py writes it")
    data: list[str] = opt([], "files of records; none: the drawn world's train and test, drawn on first use")
    images: str = opt("", "folder that image paths are relative to; empty: each file's own")
    part: str = opt("all", "which share of the records: the 25 percent for fine-tuning, the 75 for RL, or all", ["all", "sft", "rl"])
    out: str = opt("runs/recovered", "folder of the new data set: for each file FILE.jsonl and FILE/ with its pictures")
    steps: int = opt(40, "Euler steps")
    batch: int = opt(64, "pictures at a time")
    seed: int = opt(0, "of the noise that recovery starts from")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    out, model = Path(config.out), Restorer.from_pretrained(config.model).to(runtime.setup().device).eval()
    settings = {name: value for name, value in asdict(config).items() if name not in ("batch", "data")}
    if (out / "config.json").exists() and json.loads((out / "config.json").read_text()) != settings:
        raise SystemExit(f"{out} was made with other options ({out}/config.json): give the same, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", to_json(settings, indent=2) + "\n")
    for path in map(Path, config.data or [tiny.dataset("train"), tiny.dataset("test")]):
        recover_file(model, data.split(data.read(path, config.images), config.part), out, path.stem, config)


def recover_file(model: Restorer, records: data.Records, out: Path, name: str, config: Config) -> None:
    """Write out/NAME.jsonl and its pictures. What a run that was cut off has recovered stays, and the rest follows."""
    if (out / f"{name}.jsonl").exists():
        return print(f"{out}/{name}.jsonl is there already")
    for kind in ("damaged", "recovered", "clean"):
        (out / name / kind).mkdir(parents=True, exist_ok=True)
    side, todo = model.config["side"], [i for i in range(len(records)) if not (out / name / "recovered" / f"{i:06d}.png").exists()]
    with tqdm(total=len(todo), desc=f"recovering {name}") as bar:
        for start in range(0, len(todo), config.batch):
            part = todo[start:start + config.batch]
            images = [np.asarray(data.open_image(records[i]["image"])) for i in part]
            pictures = restore(model, to_tensor([resize(image, side, side) for image in images]), config.steps,
                               [data.seed_for(config.seed, i) for i in part])
            for i, image, picture in zip(part, images, to_uint8(pictures)):
                whole = resize(picture, image.shape[1], image.shape[0])
                write_bytes(out / name / "recovered" / f"{i:06d}.png", cv2.imencode(".png", whole[..., ::-1])[1].tobytes())
            bar.update(len(part))
    lines = []
    for i, record in enumerate(records):
        row = {key: value for key, value in record.items() if key not in OURS}
        row |= {"image": [place(record["image"], out, f"{name}/damaged/{i:06d}"), f"{name}/recovered/{i:06d}.png"],
                "conversations": [{"from": "human", "value": "<image><image>" + record["question"]}, {"from": "gpt", "value": record["response"]}],
                "degradations": [d._asdict() for d in record["degradations"]]}
        if "clean_image" in record:
            row["clean_image"] = place(record["clean_image"], out, f"{name}/clean/{i:06d}")
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(out / f"{name}.jsonl", "".join(lines))
    print(f"written: {out}/{name}.jsonl, {len(lines)} records")


OURS = {"where", "number", "chain", "question", "response", "messages", "images"}    # what `data.read` adds, or is written anew


def place(source: str, out: Path, name: str) -> str:
    """A picture's path within `out`, where it is now too: as a link to the same file, or a copy on another disk."""
    name += Path(source).suffix
    if not (out / name).exists():
        try:
            os.link(os.path.realpath(source), out / name)
        except OSError:
            shutil.copyfile(source, out / (name + ".tmp"))
            os.replace(out / (name + ".tmp"), out / name)
    return name


if __name__ == "__main__":
    main()
