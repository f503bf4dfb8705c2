"""Robust-U1, stages I and II: rectified flow, and Flow-GRPO (arXiv 2505.05470) on its sampler. Tensors in, tensors out.

t = 0 is the clean picture, t = 1 noise. N pictures of D numbers: z_0, eps, z_t, v (N, ..), times t (N,); S noisy steps. `velocity(x, t)`
is any function; `grid` (steps + 1,) a sampler's times from 1 down to 0, so dt < 0. A step's arithmetic is float32 or better."""
from __future__ import annotations

import math
from collections import namedtuple
from typing import Callable, Sequence

import torch
from torch import Tensor

from rr1.grpo import policy_loss

Velocity = Callable[[Tensor, Tensor], Tensor]
_beside = lambda t, x: t.view(-1, *[1] * (x.ndim - 1)) if t.ndim else t             # times (N,) as (N, 1, ..)


def interpolate(z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t eps."""
    return (1 - _beside(t, z_0)) * z_0 + _beside(t, z_0) * eps


def velocity_target(z_0: Tensor, eps: Tensor) -> Tensor:
    """v = d z_t / dt = eps - z_0."""
    return eps - z_0


def v_loss(v: Tensor, z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """|v - (eps - z_0)|^2, averaged over dimensions; (N,)."""
    return (v - velocity_target(z_0, eps)).square().flatten(1).mean(1)


def eps_loss(v: Tensor, z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The loss that the paper prints, |eps - eps_hat|^2 with eps_hat = z_t + (1 - t) v; (N,). It is (1 - t)^2 times `v_loss`."""
    return (interpolate(z_0, eps, t) + (1 - _beside(t, v)) * v - eps).square().flatten(1).mean(1)


shifted = lambda t, shift: shift * t / (1 + (shift - 1) * t)                        # times moved towards noise (shift > 1)
time_grid = lambda steps, shift=1.0: shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)     # equidistant with shift 1
LOSSES, TIMES = {"v": v_loss, "eps": eps_loss}, ("uniform", "logit_normal")


def sample_t(n: int, generator: torch.Generator | None = None, kind: str = "uniform", shift: float = 1.0) -> Tensor:
    """Times (n,) to train at, moved towards noise by a shift above 1."""
    t = torch.rand(n, generator=generator) if kind == "uniform" else torch.randn(n, generator=generator).sigmoid()
    return shifted(t, shift)


@torch.no_grad()
def euler(velocity: Velocity, x: Tensor, grid: Tensor) -> Tensor:
    """The ODE dx = v dt from noise x = z_1 down to a picture: x <- x + v dt."""
    for t, t_next in zip(grid, grid[1:]):
        x = x + velocity(x, t.to(x).expand(len(x))).to(x.dtype) * float(t_next - t)
    return x


def score(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(x) = -(x + (1 - t) v) / t."""
    return -(x + (1 - _beside(t, x)) * v) / _beside(t, x)


def sigma_t(grid: Tensor, k: int, a: float = 0.7) -> float:
    """sigma_t = a sqrt(t / (1 - t)) at t = grid[k]; at t = 1 the second grid point's t stands in the denominator."""
    t = float(grid[k])
    return a * math.sqrt(t / (1 - (t if t < 1 else float(grid[1]))))


def sde_step(x: Tensor, v: Tensor, grid: Tensor, k: int, a: float = 0.7) -> tuple[Tensor, float]:
    """dx = (v - sigma^2 score / 2) dt + sigma dw, the SDE with the ODE's marginals, from grid[k] to grid[k + 1]:
    mean = x (1 + sigma^2 dt / (2 t)) + v (1 + sigma^2 (1 - t) / (2 t)) dt, (N, ..), and std = sigma sqrt(-dt)."""
    t, dt, sigma = float(grid[k]), float(grid[k + 1] - grid[k]), sigma_t(grid, k, a)
    x, v = (y.to(torch.promote_types(x.dtype, torch.float32)) for y in (x, v))
    return x * (1 + sigma**2 * dt / (2 * t)) + v * ((1 + sigma**2 * (1 - t) / (2 * t)) * dt), sigma * math.sqrt(-dt)


def log_prob(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x_next; mean, std^2), averaged over the D dimensions as published code does; (N,). The sum is D times as large, so a ratio
    of these is the D-th root of the true one: with D = 3072 a clip of 0.2 never acts (published settings: 1e-3 to 1e-5)."""
    return (-(x_next - mean).square() / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def kl(mean: Tensor, mean_ref: Tensor, std: float) -> Tensor:
    """KL of Gaussians of one std, exactly: |mean - mean_ref|^2 / (2 sigma^2 |dt|), averaged over dimensions like `log_prob`; (N,).
    Published code leaves |dt| out: its weight of 0.04 is 0.004 here at 10 steps."""
    return ((mean - mean_ref).square() / (2 * std**2)).flatten(1).mean(1)


# N sampled paths, at their S noisy steps `ks`: x and x_next (S, N, ..) before and after, logp (N, S) when sampled; end (N, ..)
Path = namedtuple("Path", "ks x x_next logp end")


@torch.no_grad()
def sample_sde(velocity: Velocity, x: Tensor, grid: Tensor, ks: Sequence[int], noise: Callable[[], Tensor], a: float = 0.7) -> Path:
    """From z_1 = x: an SDE step where k is in `ks`, with noise() ~ N(0, 1) like x, else an Euler step, which has no log-probability."""
    rows = []
    for k in range(len(grid) - 1):
        v, before = velocity(x, grid[k].to(x).expand(len(x))), x
        if k not in ks:
            x = x + v.to(x.dtype) * float(grid[k + 1] - grid[k])
            continue
        mean, std = sde_step(x, v, grid, k, a)
        x = mean + std * noise()
        rows.append((before, x, log_prob(x, mean, std)))
    return Path(list(ks), *(torch.stack(c, d) for c, d in zip(zip(*rows), (0, 0, 1))), x)


def path_steps(velocity: Velocity, path: Path, grid: Tensor, a: float = 0.7) -> list[tuple[Tensor, float]]:
    """(mean, std) of each recorded step under a velocity: of the policy that is trained with its gradient, or of the reference."""
    return [sde_step(x, velocity(x, grid[k].to(x).expand(len(x))), grid, k, a) for k, x in zip(path.ks, path.x)]


def flow_grpo_loss(logp: Tensor, logp_old: Tensor, advantages: Tensor, kls: Tensor, *, clip: float, beta: float,
                   n_sequences: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 12 with a path's S steps in place of tokens and the exact KL: logp, logp_old, kls (N, S), advantages (N,) -> (loss, statistics),
    as `rr1.grpo.policy_loss` has them, and kls summed. n_sequences: paths of the whole optimizer step; default: of this call."""
    loss, statistics = policy_loss(logp, logp_old, advantages, torch.ones_like(logp), clip=clip, n_sequences=n_sequences)
    return loss + beta * kls.mean(1).sum() / (n_sequences or len(kls)), statistics | {"kl": kls.sum().detach()}


def noisy_steps(steps: int, window: int, early: int, generator: torch.Generator) -> range:
    """Which of the sampler's steps carry noise: all of them with window 0, or `window` in a row, drawn from the first `early`."""
    if not window:
        return range(steps)
    if not 0 < window <= early <= steps:
        raise SystemExit(f"--window {window} --early {early}: a window of noisy steps must fit into the first --early of {steps} steps")
    first = int(torch.randint(early - window + 1, (), generator=generator))
    return range(first, first + window)
