"""Robust-U1: what a recovered picture earns, R = 1.0 R_pix + 0.2 R_sem (the published weights).

pictures   (N, 3, H, W), values in [0, 1]; clamped here, when scored, and nowhere before
encoder    any function pictures -> (N, features); it stays frozen
"""

from typing import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModelWithProjection

from rr1 import vlm
from rr1.u1.restorer import to_uint8

Encoder = Callable[[Tensor], Tensor]
ALPHA = 5.0
PIX, SEM = 1.0, 0.2  # weights of R_pix and R_sem
TOWER_SIDE = 112  # the tiny vision tower has seen pictures of this side


def ssim(pictures: Tensor, clean: Tensor) -> Tensor:
    """R_pix: the mean of l c s over places and channels; (N,).

    l = (2 mu mu' + C1) / (mu^2 + mu'^2 + C1), and with C3 = C2 / 2
    c s = (2 cov + C2) / (var + var' + C2),
    within an 11 x 11 Gaussian window (sigma 1.5), wherever that lies inside the picture.
    scikit-image's structural_similarity(gaussian_weights=True, sigma=1.5, data_range=1,
    use_sample_covariance=False) is the same. In float64: variances are small differences.
    ValueError for pictures of two shapes, or smaller than the window.
    """
    if min(pictures.shape[-2:]) < 11 or pictures.shape != clean.shape:
        raise ValueError(
            f"SSIM of {tuple(pictures.shape)} and {tuple(clean.shape)}: "
            "expected two of one shape, of 11 x 11 pixels at least"
        )
    x = pictures.clamp(0, 1).double()
    y = clean.clamp(0, 1).double()
    places = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    window = torch.exp(-(places**2) / (2 * 1.5**2))  # (11,)
    window = window / window.sum()

    def local_mean(a: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 3, H - 10, W - 10)
        along_rows = a.unfold(-1, 11, 1) @ window
        return along_rows.unfold(-2, 11, 1) @ window

    mu_x, mu_y = local_mean(x), local_mean(y)
    var_x = local_mean(x * x) - mu_x**2
    var_y = local_mean(y * y) - mu_y**2
    cov = local_mean(x * y) - mu_x * mu_y
    C1, C2 = 0.01**2, 0.03**2
    luminance = (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1)
    contrast_structure = (2 * cov + C2) / (var_x + var_y + C2)
    return (luminance * contrast_structure).mean((1, 2, 3)).float()


def psnr(pictures: Tensor, clean: Tensor) -> Tensor:
    """10 log10(1 / mean squared error), in dB; (N,). At most 100, which equal pictures get."""
    error = pictures.clamp(0, 1) - clean.clamp(0, 1)
    squared = (error**2).mean((1, 2, 3))
    return -10 * squared.clamp(min=1e-10).log10()


@torch.no_grad()
def r_sem(
    pictures: Tensor,
    clean: Tensor,
    encoder: Encoder,
    alpha: float = ALPHA,
) -> Tensor:
    """R_sem = exp(-alpha (1 - cos)), the cosine of the two pictures' features; (N,)."""
    features = encoder(torch.cat([pictures, clean]).clamp(0, 1)).float()  # (2 N, features)
    cosine = F.cosine_similarity(*features.chunk(2))
    return torch.exp(-alpha * (1 - cosine))


def terms(pictures: Tensor, clean: Tensor, encoder: Encoder) -> dict[str, Tensor]:
    """The terms of R, each (N,): pix and sem."""
    return {"pix": ssim(pictures, clean), "sem": r_sem(pictures, clean, encoder)}


# ---------------------------------------------------------------- encoders


def load_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """A frozen encoder by hub id or folder; SystemExit where there is none.

    A CLIP gives its projected image features, a Qwen2.5-VL the mean over its vision tower's tokens.
    """
    try:
        is_qwen = AutoConfig.from_pretrained(name).model_type == "qwen2_5_vl"
        return tower_encoder(name, device) if is_qwen else clip_encoder(name, device)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--encoder {name}: neither a folder nor a hub id of a Qwen2.5-VL or a CLIP: {error}"
        ) from error


def tower_encoder(name: str, device: torch.device | str) -> Encoder:
    """The vision tower of a Qwen2.5-VL, which sees every picture at 112 x 112."""
    model, processor = vlm.load(name, device=device)
    vlm.freeze_vision(model)

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        images = [Image.fromarray(picture) for picture in to_uint8(pictures)]
        images = [image.resize((TOWER_SIDE, TOWER_SIDE), Image.BICUBIC) for image in images]
        # N of (tokens, width)
        features = vlm.encode_images(model, *processor.pixels(images))
        return torch.stack(features).mean(1)

    return encode


def clip_encoder(name: str, device: torch.device | str) -> Encoder:
    """The image features of a CLIP."""
    model = CLIPVisionModelWithProjection.from_pretrained(name, use_safetensors=True)
    model = model.to(device).eval()
    processor = AutoImageProcessor.from_pretrained(name)

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        pixels = processor(list(to_uint8(pictures)), return_tensors="pt").to(device)
        return model(**pixels).image_embeds

    return encode
