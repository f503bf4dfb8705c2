"""Robust-U1, stages I and II: a small flow model learns to recover the clean picture from the damaged one, by rectified flow
(--stage sft) and then by Flow-GRPO on a picture's reward (--stage grpo). The equations: rr1/u1/flow.py, docs/recover.md.

    sft    1. pairs of damaged and clean pictures, z_c and z_0     2. z_t = (1 - t) z_0 + t eps     3. |v - (eps - z_0)|^2
    grpo   1. roll out    G recoveries of each damaged picture by the SDE sampler, z_1 and all noise from the run's seed
           2. reward      R = 1.0 SSIM + 0.2 exp(-5 (1 - cos)) against the clean picture, whose features a frozen encoder compares
           3. advantage   A = (R - mean) / std within the group
           4. score       means of the same steps under the reference
           5. update      clipped ratio of the steps + beta KL, mu times

By default on the drawn world, whose pairs are drawn on first use:

    python train_recover.py                                             # laptop, about 4 minutes -> runs/recover/model
    python train_recover.py --stage grpo                                # a few minutes more, from the shipped weights -> runs/recover-grpo
    torchrun --nproc-per-node 2 train_recover.py --out runs/recover2    # two processes, the same batch shared out
    python train_recover.py --data photos --side 64 --out runs/photos   # 64 x 64 crops of clean photos, damaged as they are drawn

Differences from the paper: it fine-tunes one 7B model that both recovers and reasons; here the restorer is a network of its own, in
pixels, with no recovery prompt. Stage I trains the velocity; the paper prints the loss of eps (--loss eps), which is the
same times (1 - t)^2, with t uniform (--shift 1); here t begins near noise and ends uniform, as
trials suggested; the two have not been compared at equal time. The paper gives no number of steps, clip or KL weight.
"""
from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch

from rr1 import data, files, grpo, run_folder, runtime, tiny
from rr1.u1 import flow, image_rewards, recovery, restorer
from rr1.runtime import opt


@dataclass
class Config:
    stage: str = opt("sft", "rectified flow, or Flow-GRPO from --model", ["sft", "grpo"])
    model: str = opt("", "a restorer's folder to start from; empty: a new one for sft, the shipped one for grpo")
    data: str = opt("", "a folder of clean photos, or a file of records with clean_image; empty: the drawn world")
    images: str = opt("", "folder that a file's image paths are relative to; empty: the file's own")
    side: int | None = opt(None, "of the pictures, a multiple of 8 (in latents mostly of 64); default: that of --model, of a new restorer 32")
    vae: str = opt("", "folder of a diffusers AutoencoderKL: a new restorer works in its latents; empty: in pixels")
    out: str = opt("", "the run's folder; empty: runs/recover or runs/recover-grpo")
    steps: int | None = opt(None, "optimizer steps, or rollouts of grpo; default: see DEFAULTS in train_recover.py")
    batch: int | None = opt(None, "pictures a step, over all processes; groups of grpo")
    micro_batch: int = opt(32, "pictures of a forward and backward pass, in each process; of grpo, paths")
    lr: float | None = opt(None, "peak learning rate")
    warmup: int = opt(20, "steps of linear warm-up; a cosine down to a fiftieth follows")
    weight_decay: float = opt(0.01, "of AdamW, on matrices and kernels only")
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm")
    loss: str = opt("v", "sft: of the velocity, or of eps as the paper prints it", list(flow.LOSSES))
    times: str = opt("uniform", "sft: the law of t", list(flow.TIMES))
    shift: float = opt(30.0, "sft: t -> shift t / (1 + (shift - 1) t), towards noise; falls to 1, t uniform, by the last step; 1 as the paper has it")
    group_size: int = opt(8, "grpo: G, recoveries of each picture")
    sampling_steps: int = opt(10, "grpo: steps of the sampler")
    noise: float = opt(0.7, "grpo: a of sigma_t = a sqrt(t / (1 - t))")
    window: int = opt(4, "grpo: noise on this many steps in a row, drawn for each rollout; 0: on all")
    early: int = opt(5, "grpo: the window lies within the first this many")
    encoder: str = opt(tiny.BASE, "grpo: a Qwen2.5-VL, whose vision tower says what is alike, or a CLIP; folder or hub id")
    reward_weights: list[float] = opt([image_rewards.PIX, image_rewards.SEM], "grpo: of R_pix and R_sem (the published ones)")
    clip: float = opt(1e-3, "grpo: of the ratio, whose log-probabilities are averaged over dimensions")
    beta: float = opt(0.004, "grpo: weight of the KL to the reference")
    mu: int = opt(1, "grpo: optimizer steps on each rollout")
    seed: int = opt(0, "fixes the weights' start, the order of the pictures, their damage and all noise")
    save_every: int = opt(100, "steps between checkpoints, and between strips to look at")
    resume: bool = opt(False, "go on from the newest checkpoint in --out")
    tracker: str | None = opt(None, "report to this too", ["wandb", "tensorboard"])


DEFAULTS = {"sft": {"out": "runs/recover", "steps": 2400, "batch": 32, "lr": 2.5e-3},
            "grpo": {"out": "runs/recover-grpo", "steps": 80, "batch": 8, "lr": 1e-4, "model": tiny.RESTORER}}
PANELS = {"sft": ["loss: loss", "gradient norm: grad_norm", "learning rate: lr", "seconds: seconds"],
          "grpo": ["reward (mean, spread within a group): reward reward_std", "reward terms: reward/*", "KL to the reference: kl",
                   "shares: zero_std clip_low clip_high", "gradient norm: grad_norm", "loss: loss", "seconds: seconds/*"]}


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    for name, value in DEFAULTS[config.stage].items():
        if getattr(config, name) in ("", None):
            setattr(config, name, value)
    rt = runtime.setup(config.seed)
    if config.batch % rt.world_size:
        raise SystemExit(f"--batch {config.batch} cannot be shared out evenly to {rt.world_size} processes: give a multiple of {rt.world_size}")
    if config.model and config.vae:
        raise SystemExit("--vae: the restorer of --model works where it was made to; give one of the two")
    torch.manual_seed(config.seed)                                                  # the same weights on all processes
    with runtime.main_first(rt):
        model = restorer.for_pictures(config.side, config.vae, config.model)
    config.side = model.config["side"]
    run = run_folder.RunFolder(config, rt, PANELS[config.stage], free={"save_every", "tracker"}, tracker=config.tracker)
    model = model.to(rt.device)
    {"sft": fine_tune, "grpo": reinforce}[config.stage](config, rt, run, model)
    run.finish(model, None)
    runtime.teardown(rt)


def load(config: Config, rt: runtime.Runtime, source, step: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """This process's share of a step's pictures: a seed for each, damaged, clean."""
    places = range(rt.rank, config.batch, rt.world_size)
    indices = data.batch_indices(len(source), config.batch, step, config.seed)
    seeds = [data.seed_for(config.seed, step, place) for place in places]
    return seeds, *recovery.load_pairs(source, [indices[place] for place in places], seeds)


def end_step(config: Config, rt: runtime.Runtime, run: run_folder.RunFolder, step: int, stop: bool, model, optimizer, shown) -> None:
    """Now and then a checkpoint and, of the same eight pictures, a strip: damaged, recovered, clean."""
    if rt.is_main and (step % config.save_every == 0 or step == config.steps):
        damaged, clean = shown
        files.write_bytes(run.out / "strip.png", recovery.strip(damaged, restorer.restore(model, damaged, 10).cpu(), clean))
    run.end_step(step, stop, model, None, optimizer)


# ---------------------------------------------------------------- stage I

def fine_tune(config: Config, rt: runtime.Runtime, run: run_folder.RunFolder, model: restorer.Restorer) -> None:
    with runtime.main_first(rt):
        source = recovery.load_source(config.data, config.images, model.config["side"])
    optimizer = runtime.build_optimizer(model, config.lr, config.weight_decay)
    first = (run.load(model, optimizer) or {"step": 0})["step"]
    encode, _ = restorer.codec(model)
    shown = recovery.held_out(source, 8)
    if rt.is_main:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(source)} pictures")

    with runtime.Interrupt(rt) as interrupt:
        for step, (seeds, damaged, clean) in data.prefetch(lambda step: load(config, rt, source, step), range(first, config.steps)):
            start = time.perf_counter()
            rate = config.lr * runtime.cosine_with_warmup(step, config.steps, config.warmup, floor=0.02)
            for group in optimizer.param_groups:
                group["lr"] = rate
            z_c, z_0 = encode(damaged.to(rt.device)), encode(clean.to(rt.device))
            eps, shift = restorer.noise(seeds, z_0.shape[1:], rt.device), config.shift ** (1 - step / config.steps)
            t = torch.cat([flow.sample_t(1, torch.Generator().manual_seed(seed + 1), config.times, shift) for seed in seeds]).to(rt.device)
            total = 0.0
            for i in range(0, len(seeds), config.micro_batch):
                c = slice(i, i + config.micro_batch)
                with rt.autocast():
                    v = model(flow.interpolate(z_0[c], eps[c], t[c]), z_c[c], t[c])
                loss = flow.LOSSES[config.loss](v.float(), z_0[c], eps[c], t[c]).sum() / config.batch
                loss.backward()
                total += loss.item()
            norm = apply(config, rt, model, optimizer)
            seconds = time.perf_counter() - start
            total = runtime.sum_over_ranks({"loss": total}, rt)["loss"]
            run.log(step + 1, {"loss": total, "grad_norm": norm, "lr": rate, "seconds": seconds},
                    f"step {step + 1:4d}/{config.steps}  loss {total:.4f}  grad {norm:.2f}  lr {rate:.1e}  {config.batch / seconds:.0f} pictures/s")
            end_step(config, rt, run, step + 1, interrupt.requested, model, optimizer, shown)


def apply(config: Config, rt: runtime.Runtime, model, optimizer) -> float:
    """One optimizer step with the gradients of all processes; returns their norm."""
    runtime.sum_gradients(model.parameters(), rt)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


# ---------------------------------------------------------------- stage II

def reinforce(config: Config, rt: runtime.Runtime, run: run_folder.RunFolder, model: restorer.Restorer) -> None:
    G, N, grid = config.group_size, config.batch * config.group_size, flow.time_grid(config.sampling_steps)
    with runtime.main_first(rt):
        source = recovery.load_source(config.data, config.images, model.config["side"])
    encoder = image_rewards.load_encoder(config.encoder, rt.device)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = runtime.build_optimizer(model, config.lr, config.weight_decay)
    first = (run.load(model, optimizer) or {"step": 0})["step"]
    encode, decode = restorer.codec(model)
    shown = recovery.held_out(source, 8)

    def velocity(network, z_c):
        def v(z, t):
            with rt.autocast():
                return network(z, z_c, t)
        return v

    with runtime.Interrupt(rt) as interrupt:
        for step, (seeds, damaged, clean) in data.prefetch(lambda step: load(config, rt, source, step), range(first, config.steps)):
            clock = [time.perf_counter()]
            ks = flow.noisy_steps(config.sampling_steps, config.window, config.early, torch.Generator().manual_seed(data.seed_for(config.seed, step)))

            # 1. roll out: G paths from each damaged picture
            z_c = encode(damaged.to(rt.device)).repeat_interleave(G, 0)             # (n, C, h, w), this process's n paths
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            fresh = lambda: torch.cat([torch.randn(G, *z_c.shape[1:], generator=g) for g in generators]).to(rt.device)
            path = flow.sample_sde(velocity(model, z_c), fresh(), grid, ks, fresh, config.noise)
            clock.append(time.perf_counter())

            # 2. reward
            target = clean.to(rt.device).repeat_interleave(G, 0)
            terms = image_rewards.scores(decode(path.end), target, encoder)         # each (n,)
            R = sum(weight * values for weight, values in zip(config.reward_weights, terms.values())).view(-1, G)

            # 3. advantage
            A = grpo.group_advantages(R).flatten()

            # 4. score under the reference
            chunks = [slice(i, i + config.micro_batch) for i in range(0, len(z_c), config.micro_batch)]
            parts = [flow.Path(path.ks, path.x[:, c], path.x_next[:, c], path.logp[c], path.end[c]) for c in chunks]
            with torch.no_grad():
                references = [flow.path_steps(velocity(reference, z_c[c]), part, grid, config.noise) for c, part in zip(chunks, parts)]
            clock.append(time.perf_counter())

            # 5. update
            rate = config.lr * runtime.cosine_with_warmup(step, config.steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums: dict[str, float] = {}
            old = [None] * len(chunks)
            for update in range(config.mu):
                for j, (c, part, reference_steps) in enumerate(zip(chunks, parts, references)):
                    steps = flow.path_steps(velocity(model, z_c[c]), part, grid, config.noise)
                    logp = torch.stack([flow.log_prob(x, *step) for x, step in zip(part.x_next, steps)], 1)
                    kls = torch.stack([flow.kl(mean, other, std) for (mean, std), (other, _) in zip(steps, reference_steps)], 1)
                    if update == 0:
                        old[j] = logp.detach()                                      # the policy that sampled is still this one
                    loss, statistics = flow.flow_grpo_loss(logp, old[j], A[c], kls, clip=config.clip, beta=config.beta, n_sequences=N)
                    loss.backward()
                    for name, value in {"loss": loss, **statistics}.items():
                        sums[name] = sums.get(name, 0.0) + value.item() / config.mu
                norm = apply(config, rt, model, optimizer)
            clock.append(time.perf_counter())

            # 6. log: sums over all processes, then means
            sums |= {f"reward/{name}": values.sum() for name, values in terms.items()}
            sums |= {"reward": R.sum(), "reward_std": R.std(1, correction=0).sum() * G, "zero_std": (R.std(1, correction=0) < 1e-6).sum() * G}
            totals = runtime.sum_over_ranks(sums, rt)
            per_step = {name: totals[name] / totals["tokens"] for name in ("ratio", "clip_low", "clip_high", "kl")}
            per_path = {name: totals[name] / N for name in ("reward", "reward/pix", "reward/sem", "reward_std", "zero_std")}
            seconds = dict(zip(("seconds/rollout", "seconds/score", "seconds/update"), (b - a for a, b in zip(clock, clock[1:]))))
            run.log(step + 1, per_path | per_step | {"loss": totals["loss"], "grad_norm": norm, "lr": rate, **seconds},
                    f"step {step + 1:4d}/{config.steps}  reward {per_path['reward']:.4f} (pix {per_path['reward/pix']:.4f} sem {per_path['reward/sem']:.4f})"
                    f"  std {per_path['reward_std']:.4f}  kl {per_step['kl']:.2e}  grad {norm:.1e}  {sum(seconds.values()):.1f} s")
            end_step(config, rt, run, step + 1, interrupt.requested, model, optimizer, shown)


if __name__ == "__main__":
    main()
