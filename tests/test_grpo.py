"""Eq. 10-12: advantages, clipped loss and KL, against numbers by hand and a literal writing."""

import math
from pathlib import Path

import pytest
import torch
from test_house import count

import rr1.grpo
from rr1.advantages import ADVANTAGES
from rr1.grpo import LOSSES, group_advantages, kl_to_reference, policy_loss

f64 = torch.float64
N, L = 6, 5


def batch(seed=0):
    """Random float64 inputs of ragged lengths; ratios fall below, inside and above the clip."""
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(N, L, generator=g, dtype=f64)
    logp_old = logp + 0.5 * torch.randn(N, L, generator=g, dtype=f64)
    logp_ref = logp + 0.5 * torch.randn(N, L, generator=g, dtype=f64)
    advantages = torch.randn(N, generator=g, dtype=f64)
    mask = torch.arange(L) < torch.tensor([5, 3, 1, 4, 5, 2])[:, None]
    return logp.requires_grad_(), logp_old, logp_ref, advantages, mask


def loss_and_gradient(logp, *args, **kwargs):
    leaf = logp.detach().clone().requires_grad_()
    loss, statistics = policy_loss(leaf, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], statistics


# ---------------------------------------------------------------- Eq. 10-11


def test_advantages_by_hand():
    # mean 2.5 and 3; population variance 1.25 and 4 (the sample's would be 5/3 and 16/3)
    rewards = torch.tensor([[1.0, 2, 3, 4], [1, 5, 1, 5]], dtype=f64)
    expected = torch.tensor([[-1.5, -0.5, 0.5, 1.5], [-2, 2, -2, 2]], dtype=f64)
    sigma = torch.tensor([[math.sqrt(1.25)], [2.0]], dtype=f64)
    torch.testing.assert_close(group_advantages(rewards, eps=0.0), expected / sigma)
    torch.testing.assert_close(group_advantages(rewards), expected / (sigma + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, scale_by_std=False), expected)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.1, -1.7, 3e6])
def test_equal_rewards_give_exactly_0(scale, value):
    for dtype in (torch.float32, f64):
        assert group_advantages(torch.full((2, 8), value, dtype=dtype), scale).eq(0).all()


def test_a_group_of_one_gives_0():
    assert group_advantages(torch.tensor([[1.3], [-2.0]])).eq(0).all()


def test_groups_do_not_mix_and_a_constant_changes_nothing():
    rewards = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=f64)
    whole = group_advantages(rewards)
    torch.testing.assert_close(
        whole, torch.cat([group_advantages(row[None]) for row in rewards])
    )
    torch.testing.assert_close(whole, group_advantages(rewards + 5))
    torch.testing.assert_close(whole.mean(dim=1), torch.zeros(3, dtype=f64))
    with pytest.raises(ValueError, match=r"\(8,\)"):
        group_advantages(rewards[0])


# one group of four: rewards of two kinds, whose sums are 1, 3, 3, 5
TERMS = torch.tensor(
    [[[1.0, 0.0], [1.0, 2.0], [2.0, 1.0], [2.0, 3.0]]], dtype=f64
)  # (1, 4, 2)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("grpo", [-math.sqrt(2), 0, 0, math.sqrt(2)]),
        ("dr_grpo", [-2, 0, 0, 2]),
        ("rloo", [1 - 11 / 3, 3 - 3, 3 - 3, 5 - 7 / 3]),
        (
            "gdpo",
            [
                -1 - 3 / math.sqrt(5),
                -1 + 1 / math.sqrt(5),
                1 - 1 / math.sqrt(5),
                1 + 3 / math.sqrt(5),
            ],
        ),
        ("maxrl", [1 / 3 - 1, 0, 0, 5 / 3 - 1]),
        ("best", [0, 0, 0, 1]),
    ],
)
def test_other_advantages(name, expected):
    found = ADVANTAGES[name](TERMS, torch.ones(2, dtype=f64))
    torch.testing.assert_close(
        found, torch.tensor([expected], dtype=f64), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", ADVANTAGES)
def test_weights_act_by_every_rule(name):
    first, second = torch.eye(2, dtype=f64)
    one = ADVANTAGES[name](TERMS, first)
    assert torch.equal(one, ADVANTAGES[name](TERMS[..., :1], torch.ones(1, dtype=f64)))
    assert not torch.equal(one, ADVANTAGES[name](TERMS, second))


def test_gdpo_weighs_what_is_normalised():
    a, b = (group_advantages(reward) for reward in TERMS.unbind(-1))
    found = ADVANTAGES["gdpo"](TERMS, torch.tensor([3.0, 0.5], dtype=f64))
    torch.testing.assert_close(found, 3 * a + b / 2)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_equal_rewards_has_no_advantage_by_any_rule(name):
    for value in (0.0, 1.0):
        equal = torch.full((2, 4, 3), value, dtype=f64)
        assert (ADVANTAGES[name](equal, torch.tensor([0.1, 0.7, 3.0])) == 0).all()


def test_maxrl_weighs_a_rare_success_by_one_over_its_share():
    rare = torch.tensor([[[1.0], [0.0], [0.0], [0.0]]])
    found = ADVANTAGES["maxrl"](rare, torch.ones(1))
    assert found.tolist() == [[3.0, -1.0, -1.0, -1.0]]


# ---------------------------------------------------------------- KL


def test_k3_by_hand():
    logp = torch.tensor([[0.5, 0.5, 0.25]], dtype=f64).log()
    logp_ref = torch.tensor([[0.5, 0.25, 0.5]], dtype=f64).log()
    expected = torch.tensor([[0, 0.5 + math.log(2) - 1, 2 - math.log(2) - 1]], dtype=f64)
    torch.testing.assert_close(kl_to_reference(logp, logp_ref), expected)


def test_k3_is_never_negative_and_0_where_equal():
    logp, _, logp_ref, *_ = batch()
    assert (kl_to_reference(logp, logp_ref) > 0).all()
    assert kl_to_reference(logp, logp.detach().clone()).eq(0).all()


def test_k3_averages_to_the_true_kl_under_the_policy():
    p, q = (
        torch.tensor([0.5, 0.3, 0.2], dtype=f64),
        torch.tensor([0.2, 0.2, 0.6], dtype=f64),
    )
    torch.testing.assert_close(
        (p * kl_to_reference(p.log(), q.log())).sum(), (p * (p / q).log()).sum()
    )


def test_the_gradient_of_the_kl_term_contains_the_reference():
    logp, logp_old, logp_ref, advantages, mask = batch()
    args = (logp, logp_old, advantages, mask)
    _, here, _ = loss_and_gradient(*args, logp_ref=logp_ref, beta=0.1)
    _, moved, _ = loss_and_gradient(*args, logp_ref=logp_ref + 0.3, beta=0.1)
    assert ((here - moved).abs() > 1e-4)[mask].all()
    _, without, _ = loss_and_gradient(*args)
    lengths = mask.sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        here - without, 0.1 * (1 - (logp_ref - logp).exp()) * mask / lengths / N
    )


def test_the_reference_only_informs_where_beta_is_0():
    logp, logp_old, logp_ref, advantages, mask = batch()
    plain = loss_and_gradient(logp, logp_old, advantages, mask)
    watched = loss_and_gradient(logp, logp_old, advantages, mask, logp_ref=logp_ref)
    assert torch.equal(plain[0], watched[0]) and torch.equal(plain[1], watched[1])
    torch.testing.assert_close(
        watched[2]["kl"], kl_to_reference(logp, logp_ref)[mask].sum().detach()
    )
    assert "kl" not in plain[2]


# ---------------------------------------------------------------- the clip


@pytest.mark.parametrize("A, ratio, flows", [
    (+1.0, 0.5, True),   # good and already rarer than it was: bring it back
    (+1.0, 1.0, True),
    (+1.0, 1.5, False),  # good and already 1.2 times as likely: enough
    (-1.0, 0.5, False),  # bad and already pushed down: enough
    (-1.0, 1.0, True),
    (-1.0, 1.5, True),   # bad and yet more likely than it was: push
])  # fmt: skip
@pytest.mark.parametrize("loss", LOSSES)
def test_truth_table_of_the_clip(loss, A, ratio, flows):
    logp = torch.tensor([[-1.0]], dtype=f64)
    value, gradient, statistics = loss_and_gradient(
        logp,
        logp - math.log(ratio),
        torch.tensor([A], dtype=f64),
        torch.ones(1, 1),
        loss=loss,
    )
    torch.testing.assert_close(gradient.item(), -A * ratio if flows else 0.0)
    torch.testing.assert_close(
        value.item(), -A * ratio if flows else -A * (1.2 if A > 0 else 0.8)
    )
    assert (statistics["clip_low"], statistics["clip_high"]) == (
        not flows and A < 0,
        not flows and A > 0,
    )


@pytest.mark.parametrize("ratio, flows", [(1.19, True), (1.25, True), (1.29, False)])
def test_clip_higher(ratio, flows):
    logp = torch.tensor([[-1.0]], dtype=f64)
    args = (logp, logp - math.log(ratio), torch.ones(1, dtype=f64), torch.ones(1, 1))
    assert (loss_and_gradient(*args, clip_high=0.28)[1].item() != 0) == flows
    assert (loss_and_gradient(*args)[1].item() != 0) == (ratio < 1.2)
    down = (logp, logp - math.log(0.75), -torch.ones(1, dtype=f64), torch.ones(1, 1))
    assert (
        loss_and_gradient(*down, clip_high=0.28)[1].item() == 0
    )  # below 1, clip alone decides


# ---------------------------------------------------------------- the literal writing


def literal(logp, logp_old, logp_ref, advantages, mask, low, high, beta, loss, max_length):
    """Eq. 12 token by token on Python floats, its gradient by hand."""
    lengths = [sum(row) for row in mask]
    total, gradient = 0.0, [[0.0] * L for _ in range(N)]
    for n in range(N):
        for t in range(L):
            if not mask[n][t]:
                continue
            A, ratio = advantages[n], math.exp(logp[n][t] - logp_old[n][t])
            if A > 0 and ratio > 1 + high:
                objective, slope = A * (1 + high), 0.0
            elif A < 0 and ratio < 1 - low:
                objective, slope = A * (1 - low), 0.0
            else:
                objective, slope = A * ratio, A * ratio  # d ratio / d logp = ratio
            q = logp_ref[n][t] - logp[n][t]
            objective -= beta * (math.exp(q) - q - 1)
            slope -= beta * (1 - math.exp(q))
            weight = {
                "grpo": 1 / (lengths[n] * N),
                "dr_grpo": 1 / (N * max_length),
                "dapo": 1 / sum(lengths),
            }[loss]
            total -= weight * objective
            gradient[n][t] = -weight * slope
    return total, gradient


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "low, high, beta",
    [(0.2, 0.2, 0.0), (0.2, 0.28, 0.04), (0.1, 0.5, 1.0), (0.2, 0.2, 0.04)],
)
def test_equals_the_literal_writing(loss, low, high, beta):
    for seed in range(5):
        logp, logp_old, logp_ref, advantages, mask = batch(seed)
        tables = [x.tolist() for x in (logp, logp_old, logp_ref, advantages, mask)]
        expected_loss, expected_gradient = literal(*tables, low, high, beta, loss, 9)
        value, gradient, statistics = loss_and_gradient(
            logp, logp_old, advantages, mask, clip=low, clip_high=high if high != low else None,
            logp_ref=logp_ref, beta=beta, loss=loss, max_length=9,
        )  # fmt: skip
        torch.testing.assert_close(value.item(), expected_loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            gradient, torch.tensor(expected_gradient, dtype=f64), rtol=1e-12, atol=1e-12
        )
        if seed == 0:
            assert (
                statistics["clip_low"] > 0 and statistics["clip_high"] > 0
            )  # the batch does reach the clip


# ---------------------------------------------------------------- at the first update


@pytest.mark.parametrize("loss", LOSSES)
def test_at_ratio_1_the_loss_is_0_and_its_gradient_is_not(loss):
    logp, *_ = batch()
    advantages = group_advantages(
        torch.tensor([[1.0, 2, 3], [0, 0, 1]], dtype=f64)
    ).flatten()
    value, gradient, statistics = loss_and_gradient(
        logp, logp.detach(), advantages, torch.ones(N, L), loss=loss
    )
    assert abs(value) < 1e-15
    torch.testing.assert_close(
        gradient, -advantages[:, None].expand(N, L) / (N * L)
    )  # REINFORCE
    assert statistics["ratio"] == statistics["tokens"] == N * L
    assert statistics["clip_low"] == statistics["clip_high"] == 0


# ---------------------------------------------------------------- normalisers


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("split", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_the_split_into_micro_batches_changes_nothing(loss, split):
    logp, logp_old, logp_ref, advantages, mask = batch()
    options = dict(clip_high=0.28, beta=0.04, loss=loss, max_length=8)
    whole, gradient, sums = loss_and_gradient(
        logp, logp_old, advantages, mask, logp_ref=logp_ref, **options
    )
    total, gradients, added = 0.0, torch.zeros(N, L, dtype=f64), dict.fromkeys(sums, 0)
    start = 0
    for size in split:
        rows = slice(start, start + size)
        width = int(
            mask[rows].sum(dim=1).max()
        )  # each micro-batch is padded only as far as it must be
        part, part_gradient, statistics = loss_and_gradient(
            logp[rows, :width], logp_old[rows, :width], advantages[rows], mask[rows, :width],
            logp_ref=logp_ref[rows, :width], n_sequences=N, n_tokens=int(mask.sum()), **options,
        )  # fmt: skip
        total = total + part
        gradients[rows, :width] = part_gradient
        added = {name: added[name] + statistics[name] for name in sums}
        start += size
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, gradient, rtol=1e-12, atol=1e-12)
    for name in sums:
        torch.testing.assert_close(added[name], sums[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_defaults_are_those_of_the_call(loss):
    logp, logp_old, _, advantages, mask = batch()
    given = loss_and_gradient(
        logp,
        logp_old,
        advantages,
        mask,
        loss=loss,
        n_sequences=N,
        n_tokens=int(mask.sum()),
        max_length=L,
    )
    default = loss_and_gradient(logp, logp_old, advantages, mask, loss=loss)
    assert torch.equal(given[0], default[0]) and torch.equal(given[1], default[1])


def test_the_losses_weigh_tokens_as_they_say():
    # At ratio 1 the gradient is -A times a token's weight: lengths 1 and 3, longest possible 4.
    logp, advantages = torch.zeros(2, 3, dtype=f64), -torch.ones(2, dtype=f64)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    for loss, short, long in [
        ("grpo", 1 / 2, 1 / 6),
        ("dr_grpo", 1 / 8, 1 / 8),
        ("dapo", 1 / 4, 1 / 4),
    ]:
        _, gradient, _ = loss_and_gradient(
            logp, logp, advantages, mask, loss=loss, max_length=4
        )
        torch.testing.assert_close(
            gradient, torch.tensor([[short, 0, 0], [long] * 3], dtype=f64)
        )


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("filler", [-math.inf, math.nan, 1e9])
def test_what_stands_in_the_padding_does_not_matter(loss, filler):
    logp, logp_old, logp_ref, advantages, mask = batch()
    clean = loss_and_gradient(
        logp, logp_old, advantages, mask, logp_ref=logp_ref, beta=0.1, loss=loss
    )
    dirty = [x.detach().masked_fill(~mask, filler) for x in (logp, logp_old, logp_ref)]
    value, gradient, _ = loss_and_gradient(
        *dirty[:2], advantages, mask, logp_ref=dirty[2], beta=0.1, loss=loss
    )
    assert torch.equal(value, clean[0]) and torch.equal(gradient, clean[1])
    assert gradient[~mask].eq(0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalisers", [{}, {"n_sequences": 0, "n_tokens": 0}])
def test_a_response_masked_everywhere_is_not_nan(loss, normalisers):
    one = torch.full((1, L), -1.0, dtype=f64)
    value, gradient, statistics = loss_and_gradient(
        one, one - 0.1, torch.ones(1, dtype=f64), torch.zeros(1, L),
        logp_ref=one - 0.2, beta=0.1, loss=loss, **normalisers,
    )  # fmt: skip
    assert value == 0 and gradient.eq(0).all() and statistics["tokens"] == 0

    logp, logp_old, _, advantages, mask = batch()
    mask = mask & (torch.arange(N) != 1)[:, None]
    value, gradient, _ = loss_and_gradient(logp, logp_old, advantages, mask, loss=loss)
    assert value.isfinite() and gradient.isfinite().all() and gradient[1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type(dtype):
    logp, logp_old, _, advantages, mask = batch()
    expected = loss_and_gradient(logp, logp_old, advantages, mask)
    assert torch.equal(
        loss_and_gradient(logp, logp_old, advantages, mask.to(dtype))[1], expected[1]
    )


# ---------------------------------------------------------------- what float32 cannot hold


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("A", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("far", [100.0, -100.0, 5000.0, -5000.0])
def test_a_log_ratio_far_out_leaves_loss_and_gradient_finite(loss, A, far):
    logp = torch.tensor([[-1.0, -2.0]])
    moved = logp - torch.tensor([[far, 0.0]])
    for logp_old, logp_ref in ((moved, logp), (logp, moved)):
        value, gradient, statistics = loss_and_gradient(
            logp, logp_old, torch.tensor([A]), torch.ones(1, 2),
            logp_ref=logp_ref, beta=0.04, loss=loss,
        )  # fmt: skip
        assert value.isfinite() and gradient.isfinite().all()
        assert all(total.isfinite() for total in statistics.values())


def test_the_kl_term_still_pulls_where_the_reference_finds_a_token_all_but_impossible():
    logp = torch.tensor([[-1.0]], dtype=f64, requires_grad=True)
    kl = kl_to_reference(logp, logp.detach() - 500)
    assert (
        torch.autograd.grad(kl.sum(), logp)[0].item() == 1
    )  # downhill is less of that token
    assert kl.item() == pytest.approx(499)


def test_within_the_largest_exponent_nothing_is_clamped():
    for q in (-30.0, 0.3, 19.9):
        logp = torch.tensor([[-25.0]], dtype=f64, requires_grad=True)
        kl = kl_to_reference(logp, logp.detach() + q)
        assert kl.item() == pytest.approx(math.exp(q) - q - 1, rel=1e-12)
        gradient = torch.autograd.grad(kl.sum(), logp)[0].item()
        assert gradient == pytest.approx(1 - math.exp(q), rel=1e-12)


# ---------------------------------------------------------------- the interface


def test_only_logp_gets_a_gradient():
    logp, logp_old, logp_ref, advantages, mask = batch()
    others = [x.requires_grad_() for x in (logp_old, logp_ref, advantages)]
    loss, statistics = policy_loss(
        logp, logp_old, advantages, mask, logp_ref=logp_ref, beta=0.1
    )
    loss.backward()
    assert logp.grad is not None and all(x.grad is None for x in others)
    assert loss.shape == () and not any(
        value.requires_grad for value in statistics.values()
    )


def test_errors_say_what_came():
    logp, logp_old, _, advantages, mask = batch()
    with pytest.raises(ValueError, match="'ppo'; there are grpo, dr_grpo, dapo"):
        policy_loss(logp, logp_old, advantages, mask, loss="ppo")
    with pytest.raises(ValueError, match="beta is 0.1"):
        policy_loss(logp, logp_old, advantages, mask, beta=0.1)
    with pytest.raises(ValueError, match=r"\(6, 4\)"):
        policy_loss(logp, logp_old[:, :4], advantages, mask)
    with pytest.raises(ValueError, match=r"\(6, 5\)\]"):
        policy_loss(logp, logp_old, advantages[:, None].expand(N, L), mask)


def test_the_file_stays_short_and_pure():
    source = Path(rr1.grpo.__file__)
    tokens, lines = count(source)
    assert tokens <= 750 and lines <= 80
    lines = source.read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import", "from"))]
    assert imports == ["import torch", "from torch import Tensor"]
