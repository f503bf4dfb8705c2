"""Robust-U1's recovery at a small scale: a velocity network v(z_t, z_c, t) turns noise into the
clean picture, given the damaged one.

    pictures  (N, 3, H, W), values in [0, 1]; H and W multiples of 8
    z         the same in [-1, 1]: z_0 the clean picture, z_c the damaged one
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rr1.files import write_bytes, write_json
from rr1.u1 import flow

SHIFT = 10.0  # of a recovery's times: the damage is told apart near t = 1, so most steps are there
TIME = 128  # numbers that say what t is


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the picture's side, but for its stride."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)


def start_at_zero(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; the time scales and shifts what is between them."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(8, width)
        self.norm_2 = nn.GroupNorm(8, width, affine=False)
        self.conv_1 = conv(width, width)
        self.conv_2 = conv(width, width)
        self.time = nn.Linear(TIME, 2 * width)
        start_at_zero(self.conv_2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = self.time(time)[:, :, None, None]  # (N, 2 width, 1, 1)
        scale, shift = time.chunk(2, dim=1)
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.norm_2(h) * (1 + scale) + shift
        return x + self.conv_2(F.silu(h))


class Attention(nn.Module):
    """Every place looks at every other one: blocks that changed places are far apart."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = conv(width, 3 * width, size=1)
        self.out = conv(width, width, size=1)
        start_at_zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))  # (N, 3 width, h, w)
        qkv = qkv.unflatten(1, (3, self.heads, -1)).flatten(-2)
        qkv = qkv.transpose(-1, -2)  # (N, 3, heads, h w, width / heads)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(1))
        mixed = mixed.transpose(-1, -2).reshape(x.shape)
        return x + self.out(mixed)


class Restorer(nn.Module):
    """A U-Net behind space-to-depth: at 32 x 32 its places are 16 x 16, 8 x 8 and 4 x 4.

    It does not write the velocity itself. For each number of z it gives a mean m and a deviation s
    of z_0, and from them the velocity that is exact for z_0 ~ N(m, s^2):

        v = E[eps - z_0 | z_t] = d (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2) - m
        d = z_t - (1 - t) m

    m is z_c under a colour map of its place (of each 4 x 4 pixels, blended between them), plus a
    correction of each number. m starts as z_c and s as 0.03. What remains to be learnt is where the
    damaged picture can be trusted and what to put elsewhere; both depend on z_t.

    widths      of the three scales
    side        of the pictures that it was trained on, a multiple of 8; others work too
    steps, recoveries, gate   what `recover` does unless it is told otherwise
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 112),
        side: int = 32,
        steps: int = 1,
        recoveries: int = 4,
        gate: float = 0.0,
    ):
        super().__init__()
        self.config = {
            "widths": list(widths),
            "side": side,
            "steps": steps,
            "recoveries": recoveries,
            "gate": gate,
        }
        a, b, c = widths
        self.time = nn.Sequential(
            nn.Linear(64, TIME),
            nn.SiLU(),
            nn.Linear(TIME, TIME),
            nn.SiLU(),
        )
        self.start = conv(36, a)  # from 3 pictures of 3 colours, 2 x 2 pixels each
        down = [conv(a, b, stride=2), conv(b, c, stride=2)]
        self.down = nn.ModuleList(down)
        self.blocks = nn.ModuleList([Block(width) for width in (b, c, c, b, a)])
        self.attention = Attention(c)
        up = [conv(c, 4 * b, size=1), conv(b, 4 * a, size=1)]
        self.up = nn.ModuleList(up)
        self.end = nn.Sequential(
            nn.GroupNorm(8, a),
            nn.SiLU(),
            conv(a, 24),
        )
        # 3 x 4: to each colour from 1, red, green and blue
        self.colour = conv(b, 12, size=1)
        start_at_zero(self.end[-1])
        start_at_zero(self.colour)

    def forward(self, z_t: Tensor, z_c: Tensor, t: Tensor) -> Tensor:
        """The velocity (N, 3, H, W) at z_t and the times t (N,), given z_c."""
        m, s = self.mean_and_deviation(z_t, z_c, t)
        t = flow.beside(t, z_t)
        d = z_t - (1 - t) * m
        variance = (1 - t) ** 2 * s**2 + t**2  # of z_t
        slope = (t - (1 - t) * s**2) / variance
        return slope * d - m

    def mean_and_deviation(
        self,
        z_t: Tensor,
        z_c: Tensor,
        t: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """m and s, (N, 3, H, W) each."""
        frequencies = torch.linspace(0, 5, 32, device=t.device).exp()
        angles = t[:, None] * frequencies  # (N, 32)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (N, 64)
        time = self.time(waves)  # (N, TIME)

        t = flow.beside(t, z_t)
        variance = (1 - t) ** 2 * 0.1**2 + t**2
        residual = (z_t - (1 - t) * z_c) / variance.sqrt()
        pictures = torch.cat([residual, z_c, z_t], dim=1)
        x = F.pixel_unshuffle(pictures, 2)  # (N, 36, H / 2, W / 2)
        x = x.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        x = self.start(x)  # (N, a, H / 2, W / 2)
        y = self.down[0](F.silu(x))  # (N, b, H / 4, W / 4)
        y = self.blocks[0](y, time)
        h = self.down[1](y)  # (N, c, H / 8, W / 8)
        h = self.attention(self.blocks[1](h, time))
        h = self.blocks[2](h, time)
        up = F.pixel_shuffle(self.up[0](h), 2)
        y = self.blocks[3](y + up, time)
        up = F.pixel_shuffle(self.up[1](y), 2)
        x = self.blocks[4](x + up, time)

        end = F.pixel_shuffle(self.end(x), 2).to(z_t.dtype)  # (N, 6, H, W)
        correction, log_s = end.chunk(2, dim=1)
        colour = F.interpolate(self.colour(y), scale_factor=4, mode="bilinear")
        colour = colour.to(z_t.dtype).unflatten(1, (3, 4))  # (N, 3, 4, H, W)
        offset, gains = colour.split([1, 3], dim=2)
        mapped = offset.squeeze(2) + (gains * z_c[:, None]).sum(2)
        m = z_c + mapped + 0.5 * correction
        log_s = log_s + math.log(0.03)
        log_s = log_s.clamp(math.log(0.005), 0)
        return m, log_s.exp()

    def save_pretrained(self, folder: str | Path) -> None:
        """config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "model.safetensors", save(self.state_dict()))
        write_json(folder / "config.json", self.config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32
    ) -> Restorer:
        """What `save_pretrained` wrote; SystemExit for any other folder."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            model = cls(**config)
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise SystemExit(
                f"{folder}: not a restorer's folder, with config.json and model.safetensors as "
                f"train_recover.py writes them: {error}"
            ) from error
        return model.to(dtype)


# ---------------------------------------------------------------- pictures in, pictures out


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(N, *shape) of standard normal numbers, each picture's from its own seed.

    So neither the batch nor the number of processes changes them.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


@torch.no_grad()
def recover(
    model: Restorer,
    damaged: Tensor,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    recoveries: int | None = None,
    gate: float | None = None,
    batch: int = 64,
) -> Tensor:
    """Damaged pictures (N, 3, H, W) -> recovered ones, not clamped.

    Each is the mean of several recoveries, by Euler steps from noise at shifted times. Where it is
    nearer to the damaged picture than `gate` (root mean square), the damaged one stays. What is not
    given is as the model's config has it. seeds: one a picture; default 0, 1, ..
    """
    device = next(model.parameters()).device
    seeds = seeds or range(len(damaged))
    steps = model.config["steps"] if steps is None else steps
    K = model.config["recoveries"] if recoveries is None else recoveries
    gate = model.config["gate"] if gate is None else gate
    grid = flow.time_grid(steps, SHIFT)
    recovered = []
    for start in range(0, len(damaged), batch):
        part = slice(start, start + batch)
        given = damaged[part].to(device)  # (n, 3, H, W)
        z_c = 2 * given - 1
        z_1 = noise(seeds[part], (K, *z_c.shape[1:])).to(device)  # (n, K, 3, H, W)
        z_0 = torch.zeros_like(z_c)
        for k in range(K):
            z_0 += flow.euler(lambda z, t: model(z, z_c, t), z_1[:, k], grid) / K
        pictures = (z_0 + 1) / 2
        stays = distance(pictures, given) < gate  # (n,)
        recovered.append(torch.where(stays[:, None, None, None], given, pictures))
    return torch.cat(recovered)


def distance(pictures: Tensor, damaged: Tensor) -> Tensor:
    """Root mean square of the change, (N,)."""
    return (pictures.clamp(0, 1) - damaged).square().mean((1, 2, 3)).sqrt()


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 RGB pictures of one size -> (N, 3, H, W), values in [0, 1]."""
    pictures = torch.from_numpy(np.stack(images))  # (N, H, W, 3)
    return pictures.permute(0, 3, 1, 2).contiguous().float() / 255


def to_uint8(pictures: Tensor) -> np.ndarray:
    """Undo `to_tensor`, (N, H, W, 3); what lies outside [0, 1] is clamped."""
    levels = (pictures.detach().clamp(0, 1) * 255).round().byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()
