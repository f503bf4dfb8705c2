"""Reinforcement learning with GRPO on degradation-aware rewards: Eq. (6)-(12), Figure 2(B).

Each step, in the phases of the figure:
    1. roll out    each picture is encoded once, each prompt prefilled once, G responses branch off it
    2. reward      R = r_deg + r_len                                Eq. (6), (8), (9)
    3. advantage   A = (R - mean) / std within the group            Eq. (10), (11)
    4. score       log-probabilities under the reference, over the same encoded picture
    5. update      clipped policy loss + beta KL, mu times          Eq. (12)
    6. log         metrics.jsonl, curves.png, rollouts.jsonl to read

By default the tiny fine-tuned model learns from the other three quarters of the drawn world:

    torchrun train_grpo.py                                                    # laptop, under 8 minutes -> runs/grpo/model
    torchrun train_grpo.py --rewards deg len my_rewards.py:brevity --reward-weights 1 1 0.2 --out runs/brevity
    torchrun --nproc-per-node 8 train_grpo.py --model Jiaqi-hkust/Robust-R1-SFT --data train.jsonl --images train_images \\
        --lr 1e-6 --steps 469 --max-new-tokens 2048 --micro-batch 1 --gradient-checkpointing --shard --out runs/grpo-3b

Differences from the paper: it gives no clip, KL weight or number of updates; clip 0.2, beta 0.04, G 8 and one update per rollout
are those of the published run. With one update the old policy is the current one: its log-probabilities are `logps.detach()`,
no extra pass. See the README for Eq. (6), which is read as a one-to-one matching.
"""
from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch

from rr1 import data, grpo, rewards, rollout, run_folder, runtime, shard, tiny, vlm
from rr1.runtime import opt


@dataclass
class Config:
    model: str = opt(tiny.SFT, "checkpoint folder or hub id to start from; it is the reference too")
    data: str = opt("", "file of JSON lines; empty: the drawn world, written on first use")
    images: str = opt("", "folder that image paths are relative to; empty: the data file's own")
    part: str = opt("rl", "which share of the data: the paper's 75 percent for RL, its 25 for fine-tuning, or all", ["rl", "sft", "all"])
    skip_bad: bool = opt(False, "leave out records that cannot be used, with a list in --out; otherwise one stops the run")
    workers: int = opt(0, "processes that read pictures ahead, in each process; 0: a thread does it")
    max_image_tokens: int = opt(0, "a record whose pictures take more tokens is bad: it would need too much memory; 0: any number")
    min_pixels: int = opt(0, "smaller pictures are enlarged to this many pixels; 0: the checkpoint's own")
    max_pixels: int = opt(0, "larger pictures are made smaller, to this many pixels at most; 0: the checkpoint's own")
    out: str = opt("runs/grpo", "the run's folder")
    steps: int = opt(100, "rollouts; each is followed by --mu optimizer steps (one epoch of the released data: 469 at --prompts 16)")
    prompts: int = opt(16, "groups a step, over all processes")
    group_size: int = opt(8, "G, responses to each prompt (8 in the published run)")
    rewards: list[str] = opt(["deg", "len"], f"any of {', '.join(rewards.REWARDS)}, or file.py:function")
    reward_weights: list[float] = opt([], "one for each reward; empty: 1 each, as in Eq. (9)")
    lr: float = opt(1e-4, "learning rate after warm-up (1e-6 in the published run of the 3B model)")
    warmup: int = opt(5, "steps of linear warm-up; a cosine down to a tenth follows")
    weight_decay: float = opt(0.0, "of AdamW, on matrices only")
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm")
    beta: float = opt(0.04, "weight of the KL to the reference (0.04 in the published run); 0: no reference is kept")
    clip: float = opt(0.2, "the ratio is clipped below 1 - this, and above 1 + this (0.2 in the published run)")
    clip_high: float | None = opt(None, "another clip above 1 (clip-higher); default: the same as --clip")
    mu: int = opt(1, "optimizer steps on each rollout (1 in the published run)")
    loss: str = opt("grpo", "what the loss is averaged over: responses, as if all had --max-new-tokens, or tokens", list(grpo.LOSSES))
    scale_by_std: bool = opt(True, "divide by the group's standard deviation, Eq. (10)")
    temperature: float = opt(1.0, "of sampling and of scoring alike")
    top_p: float = opt(1.0, "sample from the smallest set of tokens with this mass")
    top_k: int = opt(0, "sample from this many likeliest tokens; 0: from all")
    max_new_tokens: int = opt(128, "longest response (2048 in the published run)")
    mask_truncated: bool = opt(False, "leave responses that were cut off out of the loss")
    micro_batch: int = opt(8, "groups a forward and backward pass, in each process")
    gradient_checkpointing: bool = opt(False, "compute activations again in the backward pass: slower, much less memory")
    capture: bool = opt(False, "on a GPU: decoding steps are replayed as a CUDA graph; fewer launches, the same tokens up to rounding")
    flex: bool = opt(False, "on a GPU: packed rows are scored by FlexAttention")
    shard: bool = opt(False, "parameters, gradients and optimizer state are spread over the processes: see docs/gpus.md")
    seed: int = opt(0, "fixes the order of the records, what is sampled and everything else random")
    save_every: int = opt(50, "steps between checkpoints")
    resume: bool = opt(False, "go on from the newest checkpoint in --out")
    tracker: str | None = opt(None, "report to this too", ["wandb", "tensorboard"])


PANELS = ["reward (mean, spread within a group): reward reward_std", "reward terms: reward/*", "KL to the reference: kl",
          "entropy (nats a token): entropy", "length (tokens): length", "shares: zero_std truncated clip_low clip_high",
          "gradient norm: grad_norm", "loss: loss", "seconds: seconds/*"]


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    B, G = config.prompts, config.group_size
    reward_functions = rewards.load_rewards(config.rewards)
    if config.reward_weights and len(config.reward_weights) != len(config.rewards):
        raise SystemExit(f"--reward-weights: {len(config.reward_weights)} for {len(config.rewards)} rewards; give one for each, or none")
    if config.temperature <= 0:
        raise SystemExit(f"--temperature {config.temperature}: a policy that learns must sample; give a number above 0")
    rt = runtime.setup(config.seed)
    runtime.needs_gpu(rt, capture=config.capture, flex=config.flex)
    if B % rt.world_size:
        raise SystemExit(f"--prompts {B} cannot be shared out evenly to {rt.world_size} processes: give a multiple of {rt.world_size}")
    run = run_folder.RunFolder(config, rt, PANELS, free={"save_every", "workers", "tracker", "shard", "capture", "flex"}, tracker=config.tracker)
    with runtime.main_first(rt):
        path = config.data or tiny.dataset("train")
    records = data.split(data.read(path, config.images, config.skip_bad), config.part)

    device = rt.device if not config.shard else "cpu" if rt.is_main else "meta"       # rank 0 alone reads what is to be sharded
    policy, processor = vlm.load(config.model, device=device, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    if config.skip_bad:
        records = data.leave_out_bad(records, processor, config.max_image_tokens, run.out, rt)
    vlm.freeze_vision(policy)
    reference = None
    if config.beta:
        visual = policy.model.visual                                                # frozen, so one tower serves both
        reference = copy.deepcopy(policy, {id(visual): visual}).requires_grad_(False)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    for model in filter(None, (policy, reference) if config.shard else ()):
        shard.shard(model, rt)
    optimizer = runtime.build_optimizer(policy, config.lr, config.weight_decay)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    first = (run.load(policy, optimizer) or {"step": 0})["step"]
    if rt.is_main:
        print(f"{vlm.count_parameters(policy)}; {len(records)} records from {path}")
    banned = processor.banned_ids
    sampling = dict(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, banned=banned,
                    end_id=processor.end_id, max_new_tokens=config.max_new_tokens, capture=config.capture)

    def load(step: int) -> tuple[list[dict], list[int], data.Batch]:
        places = range(rt.rank, B, rt.world_size)                                   # this process's share of the step's groups
        indices = data.batch_indices(len(records), B, step, config.seed)
        chosen = [records[indices[place]] for place in places]
        chosen = [r | {"length": len(processor.response_ids(r["response"])) - 1} for r in chosen]
        return chosen, [data.seed_for(config.seed, step, place) for place in places], data.load_batch(chosen, processor, config.max_image_tokens)

    def score(model, prompts, responses, **options):
        with rt.autocast():
            return shard.forward(model, vlm.group_logps, prompts, responses, config.temperature, banned, flex=config.flex, **options)

    with runtime.Interrupt(rt) as interrupt:
        for step, (chosen, seeds, batch) in data.prefetch(load, range(first, config.steps), config.workers):
            clock = [time.perf_counter()]

            # 1. roll out
            policy.eval()
            with rt.autocast():
                prompts = data.encode(policy, batch)
                rollouts = shard.gathered(policy, rollout.sample_group, prompts, G, seeds, **sampling)
            responses = [[r.ids for r in group] for group in rollouts]              # B lists of G token lists
            clock.append(time.perf_counter())

            # 2. reward
            written = [[rewards.Response(processor.decode(r.ids), len(r.ids) - (not r.truncated), r.truncated) for r in group]
                       for group in rollouts]
            scored = [[rewards.composite(y, record, reward_functions, config.reward_weights or None) for y in group]
                      for group, record in zip(written, chosen)]
            R = torch.tensor([[total for total, _ in group] for group in scored])   # (B, G)

            # 3. advantage
            A = grpo.group_advantages(R, config.scale_by_std).to(rt.device)         # (B, G)

            # 4. score under the reference, over the same encoded pictures
            chunks = [slice(i, i + config.micro_batch) for i in range(0, len(prompts), config.micro_batch)]
            reference_logps = [None] * len(chunks)
            if reference is not None:
                with torch.no_grad():
                    reference_logps = [score(reference, prompts[c], responses[c])[0] for c in chunks]
            clock.append(time.perf_counter())

            # 5. update
            policy.train()
            kept = [[not (r.truncated and config.mask_truncated) for r in group] for group in rollouts]
            kept_tokens = sum(len(r.ids) * k for group, ks in zip(rollouts, kept) for r, k in zip(group, ks))
            n_tokens = runtime.sum_over_ranks({"tokens": kept_tokens}, rt)["tokens"]
            rate = config.lr * runtime.cosine_with_warmup(step, config.steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            old_logps = [None] * len(chunks)
            sums: dict[str, float] = {}
            for update in range(config.mu):
                for k, c in enumerate(chunks):
                    logps, mask, entropy = score(policy, prompts[c], responses[c], with_entropy=True)
                    if update == 0:
                        old_logps[k] = logps.detach()                               # the policy that sampled is still this one
                    mask = mask * torch.tensor([flag for flags in kept[c] for flag in flags], device=rt.device)[:, None]
                    loss, statistics = grpo.policy_loss(
                        logps, old_logps[k], A[c].flatten(), mask, clip=config.clip, clip_high=config.clip_high,
                        logp_ref=reference_logps[k], beta=config.beta, loss=config.loss, n_sequences=B * G,
                        n_tokens=int(n_tokens), max_length=config.max_new_tokens)
                    loss.backward()
                    for name, value in {"loss": loss, "entropy": (entropy * mask).sum(), **statistics}.items():
                        sums[name] = sums.get(name, 0.0) + value.item() / config.mu
                runtime.sum_gradients(parameters, rt)
                norm = shard.whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, error_if_nonfinite=True))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            clock.append(time.perf_counter())

            # 6. log: sums over all processes, then means
            terms = {f"reward/{name}": sum(values[name] for group in scored for _, values in group) for name in reward_functions}
            flat = [y for group in written for y in group]
            sums |= terms | {"reward": R.sum(), "reward_std": R.std(1, correction=0).sum() * G,
                             "zero_std": (R.std(1, correction=0) < 1e-6).sum() * G, "length": sum(y.length for y in flat),
                             "truncated": sum(y.truncated for y in flat), "sampled": sum(len(ids) for group in responses for ids in group),
                             "well_formed": sum(rewards.REWARDS["format"](y, {}) for y in flat),
                             "token_ratio": sum(vlm.token_ratio(prompts[c], responses[c]) * len(prompts[c]) for c in chunks) * G}
            totals = runtime.sum_over_ranks(sums, rt)
            per_token = {name: totals[name] / max(totals["tokens"], 1) for name in ("ratio", "clip_low", "clip_high", "entropy", "kl") if name in totals}
            per_response = {name: totals[name] / (B * G) for name in ("reward", *terms, "reward_std", "zero_std", "length", "truncated", "well_formed",
                                                                      "token_ratio")}
            seconds = dict(zip(("seconds/rollout", "seconds/score", "seconds/update"), (b - a for a, b in zip(clock, clock[1:]))))
            metrics = per_response | per_token | {"loss": totals["loss"], "grad_norm": norm, "lr": rate, **seconds,
                                                  "tokens_per_second": totals["sampled"] / seconds["seconds/rollout"]}
            run.log(step + 1, metrics, f"step {step + 1:4d}/{config.steps}  reward {metrics['reward']:+.3f} ("
                    + " ".join(f"{name} {metrics['reward/' + name]:+.3f}" for name in reward_functions)
                    + f")  std {metrics['reward_std']:.2f}  kl {metrics.get('kl', 0):.4f}  length {metrics['length']:.0f}  "
                    f"grad {norm:.2f}  {sum(seconds.values()):.1f} s")
            run.dump([{"step": step + 1, "id": record["id"], "image": record["image"], "truth": record["response"], "response": y,
                       "reward": total, **values, "advantage": a, "truncated": y.truncated}
                      for record, group, pairs, advantages in list(zip(chosen, written, scored, A.tolist()))[:2]
                      for y, (total, values), a in zip(group, pairs, advantages)])
            run.end_step(step + 1, interrupt.requested, policy, processor, optimizer)
    run.finish(policy, processor)
    runtime.teardown(rt)


if __name__ == "__main__":
    main()
