"""Robust-U1, stages I and II: a small flow model learns to recover the clean picture from the
damaged one, by rectified flow (--stage sft) and then by Flow-GRPO (--stage grpo).

    sft    1. pairs        damaged and clean pictures, z_c and z_0
           2. noise        z_t = (1 - t) z_0 + t eps
           3. update       |v - (eps - z_0)|^2
    grpo   1. roll out     G recoveries of each damaged picture by the SDE sampler
           2. reward       R = 1.0 SSIM + 0.2 exp(-5 (1 - cos)) against the clean picture
           3. advantage    A = (R - mean) / std within the group
           4. score        the same steps under the reference
           5. update       clipped ratio of the steps + beta KL, mu times

By default on the drawn world, whose pairs are drawn on first use:

    python train_recover.py                                            # laptop -> runs/recover
    python train_recover.py --stage grpo                               # from the shipped weights
    torchrun --nproc-per-node 2 train_recover.py --out runs/recover2   # the same batch shared out
    python train_recover.py --data photos --side 64 --out runs/recover-photos  # crops of photos

Differences from the paper:
    1. It fine-tunes one 7B model that both recovers and reasons; here the restorer is a network of
       its own, in pixels, with no recovery prompt.
    2. Stage I trains the velocity; the paper prints the loss of eps (--loss eps), which is the same
       times (1 - t)^2, with t uniform (--shift 1 --at-noise 0). Here half of the times are 1, where
       the loss is a plain regression, and the others are near it: recoveries take few steps.
    3. The paper gives no number of sampling steps, clip or KL weight. Here the number of steps of a
       recovery is chosen at the end of a run, on pairs that were trained on.
The equations are in rr1/u1/flow.py and docs/learn/recover.md.
"""

import os

# before torch is imported: threads that wait must not spin, or other work stalls them
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rr1 import data, files, grpo, runtime, tiny
from rr1.run_folder import RunFolder
from rr1.runtime import opt
from rr1.u1 import flow, pairs, rewards
from rr1.u1.pairs import Photos, Scenes
from rr1.u1.report import choose_sampler, strip
from rr1.u1.restorer import SHIFT, Restorer, noise, recover


@dataclass
class Config:
    stage: str = opt("sft", "rectified flow, or Flow-GRPO from --model", ["sft", "grpo"])

    # data
    data: str = opt("", "folder of clean photos; empty: the drawn world")
    side: int | None = opt(
        None, "of the pictures, a multiple of 8; default: --model's, or 32", low=16
    )

    # model and method
    model: str = opt(
        "", "restorer to start from; empty: a new one, for grpo the shipped one"
    )
    loss: str = opt("v", "sft: of the velocity, or of eps as printed", list(flow.LOSSES))
    shift: float = opt(
        30.0, "sft: times t -> s t / (1 + (s - 1) t), towards noise", low=0.01
    )
    at_noise: float = opt(0.5, "sft: share of times that are 1: plain regression", high=1)
    group_size: int = opt(8, "grpo: G, recoveries of each picture", low=2)
    sampling_steps: int = opt(
        5,
        "grpo: steps of the sampler, at shifted times; all but the last carry noise",
        low=2,
    )
    noise: float = opt(0.7, "grpo: a of sigma_t = a sqrt(t / (1 - t))", low=0.01)
    shuffle: bool = opt(False, "grpo: advantages change places, as a control")
    encoder: str = opt(tiny.BASE, "of R_sem: a Qwen2.5-VL or a CLIP, folder or hub id")
    reward_weights: list[float] = opt(
        [rewards.PIX, rewards.SEM], "grpo: of R_pix and R_sem"
    )
    clip: float = opt(
        1e-3, "grpo: of the ratio, its log-probabilities averaged over dimensions"
    )
    beta: float = opt(0.004, "grpo: weight of the KL to the reference")
    mu: int = opt(1, "grpo: optimizer steps on each rollout", low=1)

    # optimisation
    steps: int | None = opt(
        None, "optimizer steps, grpo: rollouts; default: 2400, grpo 80", low=1
    )
    batch: int | None = opt(
        None, "pictures a step over all processes; default: 32, 8", low=1
    )
    lr: float | None = opt(None, "peak learning rate; default: 2.5e-3, grpo 1e-4")
    warmup: int = opt(20, "steps of linear warm-up; a cosine down follows")
    seed: int = opt(
        0, "of the weights' start, the order of pictures, their damage and all noise"
    )

    # machine
    out: str = opt("", "the run's folder; default: runs/recover, grpo runs/recover-grpo")
    save_every: int = opt(
        100, "steps between checkpoints, and between strips to look at", low=1
    )
    resume: bool = opt(False, "go on from the newest checkpoint in --out")
    tracker: str | None = opt(None, "report to this too", ["wandb", "tensorboard"])


DEFAULTS = {
    "sft": {"out": "runs/recover", "steps": 2400, "batch": 32, "lr": 2.5e-3},
    "grpo": {
        "out": "runs/recover-grpo",
        "steps": 80,
        "batch": 8,
        "lr": 1e-4,
        "model": tiny.RESTORER,
    },
}
WEIGHT_DECAY = 0.01  # of AdamW, on matrices and kernels only
MAX_GRAD_NORM = 1.0
SAID = ("loss", "reward", "reward/pix", "reward/sem", "reward_std", "kl", "grad_norm", "lr")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    for name, value in DEFAULTS[config.stage].items():
        if getattr(config, name) in ("", None):
            setattr(config, name, value)
    rt = runtime.setup(config.seed)
    runtime.check_even(rt, "--batch", config.batch)
    if len(config.reward_weights) != 2:
        raise SystemExit("--reward-weights: give two numbers, of R_pix and of R_sem")
    torch.manual_seed(config.seed)  # the same weights on all processes
    model = Restorer.from_pretrained(config.model) if config.model else Restorer()
    config.side = config.side or model.config["side"]
    if config.side % 8:
        raise SystemExit(
            f"--side {config.side}: pictures are halved 3 times; give a multiple of 8"
        )
    model.config["side"] = config.side
    with runtime.main_first(rt):
        source = pairs.load_source(config.data, config.side)
    shown = pairs.held_out(source, 8)  # damaged, clean
    encoder = rewards.load_encoder(config.encoder, rt.device)
    run = RunFolder(config, rt, free={"save_every", "tracker"})

    model = model.to(rt.device)
    optimizer = runtime.build_optimizer(model, config.lr, WEIGHT_DECAY)
    if config.stage == "sft":
        take_step = partial(fine_tune, config, rt, model, optimizer)
    else:
        reference = copy.deepcopy(model).requires_grad_(False)
        take_step = partial(reinforce, config, rt, model, optimizer, reference, encoder)
    first = run.load(model, optimizer)

    load = partial(load_pairs, config, rt, source)
    with runtime.Interrupt(rt) as interrupt, run.kept(model, None, optimizer):
        for step, batch in data.prefetch(load, range(first, config.steps)):
            metrics = take_step(step, *batch)
            step += 1
            said = [f"{name} {metrics[name]:.4g}" for name in SAID if name in metrics]
            run.log(step, metrics, f"step {step:4d}/{config.steps}  {'  '.join(said)}")
            if rt.is_main and run.is_due(step):
                damaged, clean = shown
                picture = strip(damaged, recover(model, damaged).cpu(), clean)
                files.write_bytes(run.out / "strip.png", picture)
            run.end_step(step, interrupt.requested, model, None, optimizer)
    if rt.is_main:
        choose_sampler(model, source, encoder)
        print(f"chosen on pairs to train on: {model.config}")
    run.finish(model, None)
    runtime.teardown(rt)


def load_pairs(
    config: Config, rt: runtime.Runtime, source: Scenes | Photos, step: int
) -> tuple[list[int], Tensor, Tensor]:
    """This process's share of a step: n seeds, damaged and clean pictures (n, 3, side, side)."""
    places = range(rt.rank, config.batch, rt.world_size)
    indices = data.batch_indices(len(source), config.batch, step, config.seed)
    seeds = [data.seed_for(config.seed, step, place) for place in places]
    return seeds, *pairs.load_pairs(source, [indices[place] for place in places], seeds)


def velocity_of(network: Restorer, z_c: Tensor, rt: runtime.Runtime) -> flow.Velocity:
    """The network's velocity as a function of z_t and t, given the damaged pictures z_c."""

    def velocity(z_t: Tensor, t: Tensor) -> Tensor:
        with rt.autocast():
            return network(z_t, z_c, t)

    return velocity


def fine_tune(
    config: Config,
    rt: runtime.Runtime,
    model: Restorer,
    optimizer: torch.optim.Optimizer,
    step: int,
    seeds: list[int],
    damaged: Tensor,
    clean: Tensor,
) -> dict[str, float]:
    """A step of stage I; returns what is logged."""
    timer, means = runtime.Timer(), runtime.Means()

    # 1. pairs
    z_c = 2 * damaged.to(rt.device) - 1  # (n, 3, side, side)
    z_0 = 2 * clean.to(rt.device) - 1

    # 2. noise, at a time for each picture
    eps = noise(seeds, z_0.shape[1:]).to(rt.device)
    generators = [torch.Generator().manual_seed(seed + 1) for seed in seeds]
    times = [flow.sample_t(g, config.shift, config.at_noise) for g in generators]
    t = torch.cat(times).to(rt.device)  # (n,)
    z_t = flow.interpolate(z_0, eps, t)

    # 3. update
    v = velocity_of(model, z_c, rt)(z_t, t)
    losses = flow.LOSSES[config.loss](v.float(), z_0, eps, t)  # (n,)
    (losses.sum() / config.batch).backward()
    means.add("loss", losses)
    rate = config.lr * runtime.cosine_with_warmup(
        step, config.steps, config.warmup, floor=0.02
    )
    norm = runtime.update(optimizer, rt, rate, MAX_GRAD_NORM)
    timer.lap("update")
    return means.over_ranks(rt) | {"grad_norm": norm, "lr": rate} | timer.seconds


def reinforce(
    config: Config,
    rt: runtime.Runtime,
    model: Restorer,
    optimizer: torch.optim.Optimizer,
    reference: Restorer,
    encoder: rewards.Encoder,
    step: int,
    seeds: list[int],
    damaged: Tensor,
    clean: Tensor,
) -> dict[str, float]:
    """A step of stage II; returns what is logged."""
    timer, means = runtime.Timer(), runtime.Means()
    G, a = config.group_size, config.noise
    N = config.batch * G  # paths of this step, over all processes
    grid = flow.time_grid(config.sampling_steps, SHIFT)

    # 1. roll out: G paths from each damaged picture
    z_c = (2 * damaged.to(rt.device) - 1).repeat_interleave(G, 0)  # (n, 3, side, side)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def fresh() -> Tensor:
        groups = [torch.randn(G, *z_c.shape[1:], generator=g) for g in generators]
        return torch.cat(groups).to(rt.device)  # (n, 3, side, side)

    ks = range(config.sampling_steps - 1)  # noise on the last one would stay in the picture
    velocity = velocity_of(model, z_c, rt)
    path = flow.sample_sde(velocity, fresh(), grid, ks, fresh, a)
    timer.lap("rollout")

    # 2. reward
    target = clean.to(rt.device).repeat_interleave(G, 0)
    terms = rewards.terms((path.end + 1) / 2, target, encoder)  # (n,) each
    pix, sem = config.reward_weights
    R = (pix * terms["pix"] + sem * terms["sem"]).view(-1, G)
    spread = R.std(1, correction=0)  # (groups,)
    means.add("reward", R)
    means.add("reward_std", spread)
    means.add("zero_std", spread < 1e-6)
    for name, term in terms.items():
        means.add(f"reward/{name}", term)

    # 3. advantage
    A = grpo.group_advantages(R).flatten()  # (n,)
    if config.shuffle:
        A = A[torch.randperm(len(A), generator=generators[0])]

    # 4. score the same steps under the reference
    with torch.no_grad():
        reference_steps = flow.replay(velocity_of(reference, z_c, rt), path, grid, a)
    timer.lap("score")

    # 5. update
    rate = config.lr * runtime.cosine_with_warmup(step, config.steps, config.warmup)
    logp_old = None
    for _ in range(config.mu):
        steps = flow.replay(velocity, path, grid, a)
        logp = flow.step_logps(path, steps)  # (n, S)
        kls = flow.step_kls(steps, reference_steps)  # (n, S)
        if logp_old is None:
            logp_old = logp.detach()  # the policy that sampled is still this one
        loss, statistics = flow.flow_grpo_loss(
            logp, logp_old, A, kls, clip=config.clip, beta=config.beta, n_sequences=N
        )
        loss.backward()
        means.add("loss", loss.detach(), count=len(A) / N)
        for name in ("ratio", "clip_low", "clip_high", "kl"):
            means.add(name, statistics[name], count=statistics["tokens"])
        norm = runtime.update(optimizer, rt, rate, MAX_GRAD_NORM)
    timer.lap("update")
    return means.over_ranks(rt) | {"grad_norm": norm, "lr": rate} | timer.seconds


if __name__ == "__main__":
    main()
