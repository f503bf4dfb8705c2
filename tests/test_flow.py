"""Rectified flow and Flow-GRPO against closed forms; rewards against scikit-image, transformers."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.func import functional_call
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from rr1 import grpo, tiny, vlm
from rr1.tiny import world
from rr1.u1 import flow, rewards
from rr1.u1.restorer import to_tensor, to_uint8


def draw(*shape, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# ---------------------------------------------------------------- stage I


def test_the_printed_loss_is_the_velocitys_times_one_minus_t_squared():
    z_0, eps, v, t = (
        draw(5, 3, 4),
        draw(5, 3, 4, seed=1),
        draw(5, 3, 4, seed=2),
        torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64),
    )
    torch.testing.assert_close(
        flow.eps_loss(v, z_0, eps, t), (1 - t) ** 2 * flow.v_loss(v, z_0, eps, t)
    )
    assert torch.equal(
        flow.v_loss(eps - z_0, z_0, eps, t), torch.zeros(5, dtype=torch.float64)
    )
    assert torch.equal(flow.interpolate(z_0, eps, t)[0], z_0[0]) and torch.equal(
        flow.interpolate(z_0, eps, t)[4], eps[4]
    )


def test_times_are_uniform_and_a_shift_moves_them_to_noise():
    def times(*law):
        generator = torch.Generator().manual_seed(0)
        return torch.cat([flow.sample_t(generator, *law) for _ in range(20000)])

    t, shifted, with_ones = times(), times(3.0), times(3.0, 0.25)
    assert (0 <= t).all() and (t < 1).all()
    assert t.mean() == pytest.approx(1 / 2, abs=5e-3)
    assert t.var() == pytest.approx(1 / 12, abs=2e-3)
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))
    ones = with_ones == 1
    assert ones.float().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(with_ones[~ones], shifted[~ones])
    assert flow.time_grid(4, 3).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert flow.time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


STD = 0.3


def exact_velocity(x, t):
    """E[eps - z_0 | z_t = x] for z_0 ~ N(0, STD^2)."""
    t = t.view(-1, 1)
    return x * (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)


def test_score_is_the_gradient_of_the_log_density():
    x, t = draw(6, 1), torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    variance = ((1 - t) ** 2 * STD**2 + t**2).view(-1, 1)
    torch.testing.assert_close(flow.score(x, exact_velocity(x, t), t), -x / variance)


def end_std(sampler: str, steps: int) -> float:
    """Of the sampler's Gaussian, exactly.

    A step from x has the mean c x and adds a variance, so deviations follow without sampling.
    """
    grid, one, variance = flow.time_grid(steps), torch.ones(1, 1, dtype=torch.float64), 1.0
    for k in range(steps):
        v = exact_velocity(one, grid[k].expand(1))
        mean, std = (
            (one + v * (grid[k + 1] - grid[k]), 0.0)
            if sampler == "ode"
            else flow.sde_step(one, v, grid, k)
        )
        variance = variance * float(mean) ** 2 + std**2
    return math.sqrt(variance)


def test_ode_and_sde_end_at_the_right_deviation_as_steps_grow():
    """.300 +- .003 at 1000 steps; with 10 both are too narrow, the ODE at .247, the SDE at .282."""
    for sampler in ("ode", "sde"):
        ends = {steps: end_std(sampler, steps) for steps in (10, 40, 100, 1000)}
        errors = [abs(end - STD) for end in ends.values()]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.003
        assert ends[10] == pytest.approx({"ode": 0.247, "sde": 0.282}[sampler], abs=1e-3)


def test_the_samplers_take_the_steps_that_the_formulas_say():
    grid = flow.time_grid(40)
    x = draw(20000, 1)
    ode = flow.euler(exact_velocity, x, grid)
    torch.testing.assert_close(ode, x * float(ode[0] / x[0]))
    assert float(ode.std() / x.std()) == pytest.approx(end_std("ode", 40), rel=1e-6)
    generator = torch.Generator().manual_seed(1)
    path = flow.sample_sde(
        exact_velocity,
        x,
        grid,
        range(40),
        lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype),
    )
    assert float(path.end.std()) == pytest.approx(end_std("sde", 40), rel=0.02)
    assert flow.sample_sde(
        exact_velocity, x, grid, range(3, 5), lambda: torch.zeros_like(x)
    ).logp.shape == (20000, 2)


def test_sigma_at_pure_noise_takes_the_second_time_and_the_rest_its_own():
    grid = flow.time_grid(10)
    assert flow.sigma_t(grid, 0) == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)))
    assert flow.sigma_t(grid, 5) == pytest.approx(0.7) and flow.sigma_t(
        grid, 9, a=1.0
    ) == pytest.approx(math.sqrt(0.1 / 0.9))


def test_a_step_is_the_sde_with_the_score():
    """mean = x + (v - sigma^2 score / 2) dt."""
    grid, x, v = flow.time_grid(10), draw(4, 3), draw(4, 3, seed=1)
    for k in range(10):
        dt, t = float(grid[k + 1] - grid[k]), grid[k].expand(4)
        mean, std = flow.sde_step(x, v, grid, k)
        torch.testing.assert_close(
            mean, x + (v - flow.sigma_t(grid, k) ** 2 * flow.score(x, v, t) / 2) * dt
        )
        assert std == pytest.approx(flow.sigma_t(grid, k) * math.sqrt(0.1))


def test_a_step_of_a_half_precision_network_is_computed_in_float32():
    mean, _ = flow.sde_step(
        torch.ones(1, 2),
        torch.full((1, 2), 0.3, dtype=torch.bfloat16),
        flow.time_grid(10),
        3,
    )
    assert mean.dtype == torch.float32


# ---------------------------------------------------------------- stage II


def test_log_probability_and_kl_are_those_of_normal_distributions_per_dimension():
    x, mean, other, std = draw(3, 2, 5), draw(3, 2, 5, seed=1), draw(3, 2, 5, seed=2), 0.37
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    torch.testing.assert_close(
        flow.log_prob(x, mean, std), p.log_prob(x).flatten(1).mean(1)
    )
    torch.testing.assert_close(
        flow.kl(mean, other, std),
        torch.distributions.kl_divergence(p, q).flatten(1).mean(1),
    )
    assert (flow.kl(mean, mean, std) == 0).all()


class Small(torch.nn.Module):
    """A velocity with parameters: v = A x + b t."""

    def __init__(self):
        super().__init__()
        self.A, self.b = (
            torch.nn.Parameter(0.3 * draw(4, 4, seed=5)),
            torch.nn.Parameter(draw(4, seed=6)),
        )

    def forward(self, x, t):
        return x @ self.A + t[:, None] * self.b


def rollout(ks=range(1, 4)):
    grid, model = flow.time_grid(5), Small()
    generator = torch.Generator().manual_seed(3)
    path = flow.sample_sde(
        model,
        draw(8, 4, seed=4),
        grid,
        ks,
        lambda: torch.randn(8, 4, generator=generator, dtype=torch.float64),
    )
    return grid, model, path, grpo.group_advantages(draw(2, 4, seed=7)).flatten()


def terms_of(velocity, path, grid, reference):
    """Log-probabilities and KL of the sampled steps, (N, S) each."""
    steps = flow.replay(velocity, path, grid)
    return flow.step_logps(path, steps), flow.step_kls(
        steps, flow.replay(reference, path, grid)
    )


def loss_of(model, path, grid, A, reference, parameters=None, clip=1e-3, beta=0.5):
    def velocity(x, t):
        return functional_call(model, parameters or {}, (x, t))

    logp, kls = terms_of(velocity, path, grid, reference)
    return flow.flow_grpo_loss(logp, path.logp, A, kls, clip=clip, beta=beta)


def test_before_the_first_update_ratio_is_1_and_kl_0_and_the_loss_0():
    grid, model, path, A = rollout()
    loss, statistics = loss_of(model, path, grid, A, Small())
    assert (
        statistics["tokens"] == 8 * 3
        and statistics["ratio"] / 24 == pytest.approx(1, abs=1e-12)
        and statistics["kl"] == 0
    )
    assert (
        loss.item() == pytest.approx(0, abs=1e-9)
        and statistics["clip_low"] == statistics["clip_high"] == 0
    )


def test_noise_is_where_the_window_is_and_each_noisy_step_is_recorded_as_it_was():
    grid, model, path, _ = rollout(range(1, 4))
    assert (
        list(path.ks) == [1, 2, 3]
        and path.x.shape == path.x_next.shape == (3, 8, 4)
        and path.logp.shape == (8, 3)
    )
    assert torch.equal(path.x[1], path.x_next[0])
    torch.testing.assert_close(
        path.end, flow.euler(model, path.x_next[-1], grid[4:]).detach()
    )
    torch.testing.assert_close(
        path.x[0], flow.euler(model, draw(8, 4, seed=4), grid[:2]).detach()
    )


def test_gradient_of_the_whole_loss_against_finite_differences():
    """Away from the sampling policy, some steps clipped and some not, with the KL."""
    grid, model, path, A = rollout()
    reference = Small()
    with torch.no_grad():
        model.A += 0.02 * draw(4, 4, seed=8)
        reference.b += 0.3
    loss, statistics = loss_of(model, path, grid, A, reference, clip=0.01)
    assert (
        0 < statistics["clip_low"] + statistics["clip_high"] < 24 and statistics["kl"] > 0
    )
    loss.backward()
    at = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in at.items():
        for i in range(p.numel()):
            sides = []
            for h in (1e-6, -1e-6):
                moved = {
                    **at,
                    name: p.flatten()
                    .index_add(0, torch.tensor([i]), torch.tensor([h], dtype=p.dtype))
                    .view(p.shape),
                }
                sides.append(
                    loss_of(model, path, grid, A, reference, moved, clip=0.01)[0].item()
                )
            assert model.get_parameter(name).grad.flatten()[i].item() == pytest.approx(
                (sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-8
            )


def test_the_loss_of_parts_adds_up_to_that_of_the_whole():
    grid, model, path, A = rollout()
    reference = Small()
    with torch.no_grad():
        model.b += 0.1
    logp, kls = terms_of(model, path, grid, reference)
    whole, _ = flow.flow_grpo_loss(logp, path.logp, A, kls, clip=0.1, beta=0.3)
    halves = [
        flow.flow_grpo_loss(
            logp[c], path.logp[c], A[c], kls[c], clip=0.1, beta=0.3, n_sequences=8
        )[0]
        for c in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(halves), whole)


# ---------------------------------------------------------------- rewards


@pytest.fixture(scope="module")
def pictures():
    """Four damaged scenes and the clean ones, 112 x 112."""
    samples = [world.sample(i, 1) for i in range(4)]
    return to_tensor([s.image for s in samples]), to_tensor([s.clean for s in samples])


def test_ssim_is_scikit_images(pictures):
    damaged, clean = (p[..., :61, :] for p in pictures)  # not square
    expected = [
        structural_similarity(
            x.permute(1, 2, 0).double().numpy(),
            y.permute(1, 2, 0).double().numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=2,
        )
        for x, y in zip(damaged, clean)
    ]
    np.testing.assert_allclose(rewards.ssim(damaged, clean), expected, atol=1e-6)
    assert (rewards.ssim(clean, clean) == 1).all()
    assert torch.equal(
        rewards.ssim(clean * 3 - 1, clean), rewards.ssim((clean * 3 - 1).clamp(0, 1), clean)
    )
    with pytest.raises(ValueError, match="11 x 11"):
        rewards.ssim(clean[..., :10, :], clean[..., :10, :])


def test_psnr_of_a_known_error():
    clean = torch.full((2, 3, 16, 16), 0.5)
    assert (
        rewards.psnr(clean + 0.1, clean).tolist() == pytest.approx([20, 20], abs=1e-4)
        and rewards.psnr(clean, clean)[0] == 100
    )


def test_the_semantic_reward_of_known_features(pictures):
    """Features with the cosine 0.6; equal pictures earn 1."""
    damaged, clean = pictures

    def encoder(x):
        is_clean = [any(torch.equal(picture, c) for c in clean) for picture in x]
        return torch.tensor([[1.0, 0.0] if found else [0.6, 0.8] for found in is_clean])

    assert rewards.r_sem(damaged[2:3], clean[2:3], encoder).item() == pytest.approx(
        math.exp(-5 * 0.4), rel=1e-5
    )
    assert rewards.r_sem(clean, clean, encoder).tolist() == [1] * 4
    assert rewards.r_sem(
        damaged[2:3], clean[2:3], encoder, alpha=1.0
    ).item() == pytest.approx(math.exp(-0.4), rel=1e-5)


def test_the_tiny_tower_sees_what_the_image_processor_would_give_it(pictures):
    from PIL import Image

    model, processor = vlm.load(tiny.BASE)
    expected = vlm.encode_images(
        model, *processor.pixels([Image.fromarray(p) for p in to_uint8(pictures[0])])
    )
    encoder = rewards.load_encoder(tiny.BASE)
    torch.testing.assert_close(encoder(pictures[0]), torch.stack(expected).mean(1).detach())
    assert encoder(pictures[0][..., ::2, ::2]).shape == (4, 192), "other sizes are resized"


def test_clip_by_folder(pictures, tmp_path):
    """Its features are those of its own image processor's pixels."""
    folder = tmp_path / "clip"
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    clip = CLIPVisionModelWithProjection(config).eval()
    clip.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56)
    processor.save_pretrained(folder)
    encoder = rewards.load_encoder(str(folder))
    pixels = processor(list(to_uint8(pictures[1])), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (4, 3, 56, 56)
    with torch.no_grad():
        expected = clip(pixel_values=pixels).image_embeds
    torch.testing.assert_close(encoder(pictures[1]), expected)
    with pytest.raises(SystemExit, match="--encoder"):
        rewards.load_encoder(str(tmp_path / "nothing"))
