"""Robust-U1, stages I and II: rectified flow, and Flow-GRPO (arXiv 2505.05470) on its sampler.

t = 0 is the clean picture, t = 1 noise. Tensors in, tensors out.

    N pictures of D numbers      z_0, eps, z_t, v (N, ..), times t (N,)
    velocity(x, t)               any function of (N, ..) and (N,) that gives (N, ..)
    grid (steps + 1,)            a sampler's times, from 1 down to 0, so dt < 0
    ks                           numbers of the S steps that carry noise

The arithmetic of a step is done in float32 or better.
"""

import math
from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor

from rr1.grpo import policy_loss

Velocity = Callable[[Tensor, Tensor], Tensor]

# ---------------------------------------------------------------- stage I: rectified flow


def beside(t: Tensor, x: Tensor) -> Tensor:
    """Times (N,) as (N, 1, ..), to multiply x (N, ..)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def mean_over_dimensions(x: Tensor) -> Tensor:
    """(N, ..) -> (N,)."""
    return x.flatten(1).mean(1)


def interpolate(z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t eps."""
    t = beside(t, z_0)
    return (1 - t) * z_0 + t * eps


def v_loss(v: Tensor, z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """|v - (eps - z_0)|^2, averaged over dimensions; (N,). eps - z_0 is d z_t / dt."""
    return mean_over_dimensions((v - (eps - z_0)) ** 2)


def eps_loss(v: Tensor, z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The loss that the paper prints, |eps_hat - eps|^2 with eps_hat = z_t + (1 - t) v; (N,).

    It is (1 - t)^2 times `v_loss`.
    """
    z_t = interpolate(z_0, eps, t)
    eps_hat = z_t + (1 - beside(t, v)) * v  # (N, ..)
    return mean_over_dimensions((eps_hat - eps) ** 2)


LOSSES = {"v": v_loss, "eps": eps_loss}


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times moved towards noise by a shift above 1: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_t(
    generator: torch.Generator,
    shift: float = 1.0,
    at_noise: float = 0.0,
) -> Tensor:
    """A time (1,) to train at: uniform, then shifted; with probability `at_noise` it is 1.

    At t = 1 nothing of z_0 is in z_t, and the best velocity is eps - E[z_0 | z_c]: the loss is a
    plain regression of the clean picture.
    """
    t = shifted(torch.rand(1, generator=generator), shift)
    is_noise = torch.rand(1, generator=generator) < at_noise
    return torch.where(is_noise, 1.0, t)


# ---------------------------------------------------------------- samplers


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """The times (steps + 1,) of a sampler, float64: equidistant with shift 1."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def velocity_at(velocity: Velocity, x: Tensor, t: Tensor) -> Tensor:
    """The velocity (N, ..) of all N pictures at one time."""
    return velocity(x, t.to(x).expand(len(x)))


def euler_step(x: Tensor, v: Tensor, grid: Tensor, k: int) -> Tensor:
    """x + v dt, from grid[k] to grid[k + 1]."""
    dt = float(grid[k + 1] - grid[k])
    return x + v.to(x.dtype) * dt


@torch.no_grad()
def euler(velocity: Velocity, x: Tensor, grid: Tensor) -> Tensor:
    """The ODE dx = v dt, from noise x = z_1 down to a picture: x <- x + v dt."""
    for k in range(len(grid) - 1):
        x = euler_step(x, velocity_at(velocity, x, grid[k]), grid, k)
    return x


def score(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(x) = -(x + (1 - t) v) / t."""
    t = beside(t, x)
    return -(x + (1 - t) * v) / t


def sigma_t(grid: Tensor, k: int, a: float = 0.7) -> float:
    """sigma_t = a sqrt(t / (1 - t)) at t = grid[k].

    At t = 1 the second time of the grid stands in the denominator.
    """
    t = float(grid[k])
    below_one = t if t < 1 else float(grid[1])
    return a * math.sqrt(t / (1 - below_one))


def sde_step(
    x: Tensor,
    v: Tensor,
    grid: Tensor,
    k: int,
    a: float = 0.7,
) -> tuple[Tensor, float]:
    """A step of dx = (v - sigma^2 score / 2) dt + sigma dw, the SDE with the ODE's marginals.

    mean = x + (v - sigma^2 score / 2) dt, (N, ..), and std = sigma sqrt(-dt). With the score
    written out, mean = x (1 + sigma^2 dt / (2 t)) + v (1 + sigma^2 (1 - t) / (2 t)) dt.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, v = x.to(dtype), v.to(dtype)
    dt = float(grid[k + 1] - grid[k])
    sigma = sigma_t(grid, k, a)
    pull = score(x, v, grid[k].to(x))
    drift = v - sigma**2 / 2 * pull
    return x + drift * dt, sigma * math.sqrt(-dt)


def log_prob(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x_next; mean, std^2), averaged over the D dimensions as published code does; (N,).

    The sum is D times as large, so a ratio of these is the D-th root of the true one: with D = 3072
    a clip of 0.2 never acts (published settings: 1e-3 to 1e-5).
    """
    constant = math.log(std) + 0.5 * math.log(2 * math.pi)
    logps = -((x_next - mean) ** 2) / (2 * std**2) - constant  # (N, ..)
    return mean_over_dimensions(logps)


def kl(mean: Tensor, mean_ref: Tensor, std: float) -> Tensor:
    """KL of two Gaussians, |mean - mean_ref|^2 / (2 std^2), averaged like `log_prob`; (N,).

    std^2 is sigma^2 |dt|. Published code leaves |dt| out: its weight of 0.04 is 0.004 here at 10
    equidistant steps.
    """
    return mean_over_dimensions((mean - mean_ref) ** 2 / (2 * std**2))


# ---------------------------------------------------------------- stage II: Flow-GRPO


@dataclass
class Trajectory:
    """N sampled paths from noise to a picture, recorded at their S noisy steps."""

    ks: list[int]  # which steps of the sampler these are
    x: Tensor  # (S, N, ..) before the step
    x_next: Tensor  # (S, N, ..) after it
    logp: Tensor  # (N, S) when it was sampled
    end: Tensor  # (N, ..) the picture


@torch.no_grad()
def sample_sde(
    velocity: Velocity,
    x: Tensor,
    grid: Tensor,
    ks: Sequence[int],
    noise: Callable[[], Tensor],
    a: float = 0.7,
) -> Trajectory:
    """From z_1 = x: an SDE step where k is in `ks`, with noise() ~ N(0, 1) like x.

    Else it is an Euler step, which has no log-probability and is not recorded.
    """
    before, after, logps = [], [], []
    for k in range(len(grid) - 1):
        v = velocity_at(velocity, x, grid[k])  # (N, ..)
        if k in ks:
            mean, std = sde_step(x, v, grid, k, a)
            x_next = mean + std * noise()
            before.append(x)
            after.append(x_next)
            logps.append(log_prob(x_next, mean, std))  # (N,)
        else:
            x_next = euler_step(x, v, grid, k)
        x = x_next
    return Trajectory(
        ks=list(ks),
        x=torch.stack(before),
        x_next=torch.stack(after),
        logp=torch.stack(logps, dim=1),
        end=x,
    )


Steps = list[tuple[Tensor, float]]  # (mean (N, ..), std) of each of S noisy steps


def replay(velocity: Velocity, path: Trajectory, grid: Tensor, a: float = 0.7) -> Steps:
    """Where a policy, or the reference, would have gone from each recorded x."""
    steps = []
    for k, x in zip(path.ks, path.x):
        v = velocity_at(velocity, x, grid[k])  # (N, ..)
        steps.append(sde_step(x, v, grid, k, a))
    return steps


def step_logps(path: Trajectory, steps: Steps) -> Tensor:
    """`log_prob` of what was sampled, at each step; (N, S)."""
    logps = [log_prob(x_next, *step) for x_next, step in zip(path.x_next, steps)]
    return torch.stack(logps, dim=1)


def step_kls(steps: Steps, reference: Steps) -> Tensor:
    """`kl` at each step; (N, S)."""
    pairs = zip(steps, reference)
    kls = [kl(mean, mean_ref, std) for (mean, std), (mean_ref, _) in pairs]
    return torch.stack(kls, dim=1)


def flow_grpo_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    kls: Tensor,
    *,
    clip: float,
    beta: float,
    n_sequences: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 12 with a path's S steps in place of tokens, and the exact KL.

    logp, logp_old, kls (N, S), advantages (N,) -> (loss, statistics of `rr1.grpo.policy_loss`, and
    the sum of kls). n_sequences: paths of the whole optimizer step; default: of this call.
    """
    everywhere = torch.ones_like(logp)
    loss, statistics = policy_loss(
        logp, logp_old, advantages, everywhere, clip=clip, n_sequences=n_sequences
    )
    penalty = kls.mean(1).sum() / (n_sequences or len(kls))
    return loss + beta * penalty, statistics | {"kl": kls.sum().detach()}
