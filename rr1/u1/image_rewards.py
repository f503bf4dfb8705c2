"""Robust-U1: what a recovered picture is paid for, R = 1.0 R_pix + 0.2 R_sem (the published weights).

    pictures   (N, 3, H, W), values in [0, 1]; clamped here, when scored, and nowhere before
    encoder    any function pictures -> (N, features); one that stays frozen
"""
from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from rr1 import vlm

Encoder = Callable[[Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]
ALPHA, PIX, SEM = 5.0, 1.0, 0.2
TOWER_SIDE = 112                     # the tiny vision tower has seen pictures of this side


def ssim(pictures: Tensor, clean: Tensor) -> Tensor:
    """R_pix: the mean of l c s over all places where an 11 x 11 Gaussian window (sigma 1.5) lies whole inside the picture, and over
    channels; (N,). With C3 = C2 / 2, l c s = (2 mu mu' + C1) (2 cov + C2) / ((mu^2 + mu'^2 + C1) (var + var' + C2)).

    scikit-image's structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1) is the same: it
    pads by reflection and cuts the padded border of 5 pixels off again. In float64: variances are small differences.
    """
    if min(pictures.shape[-2:]) < 11 or pictures.shape != clean.shape:
        raise ValueError(f"SSIM of {tuple(pictures.shape)} and {tuple(clean.shape)}: expected two of one shape, of 11 x 11 pixels at least")
    x, y = (p.clamp(0, 1).double() for p in (pictures, clean))
    window = torch.exp(-torch.arange(-5, 6, dtype=x.dtype, device=x.device) ** 2 / (2 * 1.5**2))
    along = lambda n: F.pad(window / window.sum(), (0, n - 10)).repeat(n - 10)[:(n - 10) * n].view(n - 10, n)   # row i: the window from place i on
    rows, columns = along(x.shape[-2]), along(x.shape[-1])
    mean = lambda a: rows @ a @ columns.T
    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    C1, C2 = 0.01**2, 0.03**2
    values = (2 * mu_x * mu_y + C1) * (2 * cov + C2) / ((mu_x**2 + mu_y**2 + C1) * (var_x + var_y + C2))
    return values.mean((1, 2, 3)).float()


def psnr(pictures: Tensor, clean: Tensor) -> Tensor:
    """10 log10(1 / mean squared error), in dB; (N,). At most 100, which equal pictures get."""
    error = (pictures.clamp(0, 1) - clean.clamp(0, 1)).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


@torch.no_grad()
def r_sem(pictures: Tensor, clean: Tensor, encoder: Encoder, alpha: float = ALPHA) -> Tensor:
    """R_sem = exp(-alpha (1 - cos)), the cosine of the two pictures' features; (N,)."""
    features = encoder(torch.cat([pictures, clean]).clamp(0, 1)).float()
    return torch.exp(-alpha * (1 - F.cosine_similarity(*features.chunk(2))))


def load_lpips(net: str = "alex", device: torch.device | str = "cpu") -> Distance:
    """LPIPS (arXiv 1801.03924): how far apart two pictures look, by features of AlexNet; (N,), 0 for equal ones. Not among the rewards."""
    try:
        import lpips
    except ImportError as error:
        raise SystemExit("--lpips asks the package of that name: pip install lpips (it brings torchvision, and downloads AlexNet)") from error
    model = lpips.LPIPS(net=net, verbose=False).to(device).eval().requires_grad_(False)
    return lambda pictures, clean: model(*(2 * p.clamp(0, 1).to(device) - 1 for p in (pictures, clean))).flatten()


def scores(pictures: Tensor, clean: Tensor, encoder: Encoder) -> dict[str, Tensor]:
    """The terms of R, each (N,): pix and sem."""
    return {"pix": ssim(pictures, clean), "sem": r_sem(pictures, clean, encoder)}


def load_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """A frozen encoder by hub id or folder: a CLIP (its projected image features), or a Qwen2.5-VL such as `tiny.BASE` (its vision
    tower, mean over tokens)."""
    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise SystemExit(f"--encoder {name}: neither a checkpoint folder nor a model that can be downloaded: {error}") from error
    if kind not in ENCODERS:
        raise SystemExit(f"--encoder {name}: a model of type {kind!r}; there are encoders for {', '.join(ENCODERS)}")
    return ENCODERS[kind](name, device)


def tower_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """The vision tower of a Qwen2.5-VL. Pictures are resized to 112 x 112, cut into patches as its image processor does."""
    model, processor = vlm.load(name, device=device)
    vlm.freeze_vision(model)
    settings = processor.image_processor
    p, m, T = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (settings.image_mean, settings.image_std))
    n = TOWER_SIDE // p

    def encode(pictures: Tensor) -> Tensor:
        x = F.interpolate(pictures.to(device), (TOWER_SIDE, TOWER_SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        x = ((x - mean) / std).view(-1, 3, n // m, m, p, n // m, m, p)                               # (N, 3, row, m, p, column, m, p)
        patches = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :].expand(*[-1] * 6, T, -1, -1)    # (N, row, column, m, m, 3, T, p, p)
        grid = torch.tensor([[1, n, n]]).expand(len(x), -1)
        return torch.stack(vlm.encode_images(model, patches.reshape(len(x) * n * n, -1), grid)).mean(1)
    return torch.no_grad()(encode)


def clip_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """CLIP's image features, from a picture resized to the model's side (stretched where it is not square)."""
    from transformers import CLIPVisionModelWithProjection
    model = CLIPVisionModelWithProjection.from_pretrained(name, use_safetensors=True).to(device).eval().requires_grad_(False)
    side = model.config.image_size
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def encode(pictures: Tensor) -> Tensor:
        x = F.interpolate(pictures.to(device), (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return model(pixel_values=(x - mean) / std).image_embeds
    return torch.no_grad()(encode)


ENCODERS = {"qwen2_5_vl": tower_encoder, "clip": clip_encoder, "clip_vision_model": clip_encoder}
