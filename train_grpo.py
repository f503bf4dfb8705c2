"""Reinforcement learning with GRPO on degradation-aware rewards: Eq. (6)-(12), Figure 2(B).

Each step, in the phases of the figure:
    1. roll out    encode each picture once, prefill each prompt once, sample G responses from it
    2. reward      R = r_deg + r_len                                           Eq. (6), (8), (9)
    3. advantage   A = (R - mean) / std within the group                       Eq. (10), (11)
    4. score       log-probabilities under the reference, over the same encoded picture
    5. update      clipped policy loss + beta KL, mu times                     Eq. (12)
    6. log         metrics.jsonl, curves.png, rollouts.jsonl to read

By default the tiny fine-tuned model learns from the other three quarters of the drawn world:

    torchrun train_grpo.py                        # laptop, under 8 minutes -> runs/grpo/model
    torchrun train_grpo.py --rewards deg len my_rewards.py:brevity --reward-weights 1 1 0.2 \\
        --out runs/brevity
    torchrun --nproc-per-node 8 train_grpo.py --model Jiaqi-hkust/Robust-R1-SFT \\
        --data train.jsonl --images train_images --lr 1e-6 --steps 469 --max-new-tokens 2048 \\
        --micro-batch 1 --gradient-checkpointing --shard --out runs/grpo-3b

Differences from the paper: it gives no clip, KL weight or number of updates; clip 0.2, beta 0.04,
G 8 and one update per rollout are those of the published run. With one update the old policy is the
current one: its log-probabilities are `logps.detach()`, no extra pass. See the README for Eq. (6),
which is read as a one-to-one matching.

Shapes: B prompts of a step in this process, G responses each, K rewards, n prompts in a
micro-batch, L tokens.
"""

import os

# before torch is imported: threads that wait must not spin, or other work stalls them
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rr1 import (
    data,
    grpo,
    records,
    rewards,
    rollout,
    run_folder,
    runtime,
    shard,
    tiny,
    training,
    vlm,
)
from rr1.advantages import ADVANTAGES, weighted_sum
from rr1.groups import Group, measure, sampler_gap, to_read, to_text
from rr1.runtime import opt


@dataclass
class Config(training.Options):
    # data
    part: str = opt(
        "rl", "the paper's 75 % for RL, its 25 % for SFT, or all", ["rl", "sft", "all"]
    )
    # method
    model: str = opt(
        tiny.SFT, "checkpoint folder or hub id to start from; the reference too"
    )
    prompts: int = opt(16, "groups a step, over all processes", low=1)
    group_size: int = opt(8, "G, responses to each prompt (8 in the published run)", low=2)
    temperature: float = opt(1.0, "of sampling and of scoring alike", low=0.01)
    rewards: list[str] = opt(
        ["deg", "len"], f"{', '.join(rewards.REWARDS)}, or file.py:function"
    )
    reward_weights: list[float] = opt(
        [], "one for each reward; empty: 1 each, Eq. (9)", low=-1e9
    )
    advantage: str = opt(
        "grpo", "from rewards to advantages; grpo: Eq. (10)", [*ADVANTAGES]
    )
    loss: str = opt(
        "grpo",
        "mean over responses (grpo), these as if all were longest (dr_grpo), or tokens (dapo)",
        grpo.LOSSES,
    )
    mask_truncated: bool = opt(False, "leave responses that were cut off out of the loss")
    clip: float = opt(
        0.2, "clip the ratio below 1 - this and above 1 + this (0.2 as published)"
    )
    clip_high: float | None = opt(
        None, "another clip above 1 (clip-higher); default: --clip"
    )
    beta: float = opt(
        0.04, "weight of the KL to the reference (0.04 as published); 0: none kept"
    )
    mu: int = opt(1, "optimizer steps on each rollout (1 in the published run)", low=1)
    # optimisation
    steps: int = opt(
        100, "rollouts; one epoch of the released data: 469 at --prompts 16", low=1
    )
    lr: float = opt(
        1e-4, "learning rate after warm-up (1e-6 in the published run of the 3B model)"
    )
    warmup: int = opt(5, "steps of linear warm-up; a cosine down to a tenth follows")
    weight_decay: float = opt(0.0, "of AdamW, on matrices only")
    # machine
    out: str = opt("runs/grpo", "the run's folder")
    seed: int = opt(
        0, "fixes the order of the records, what is sampled, all that is random"
    )
    save_every: int = opt(50, "steps between checkpoints; 0: only the last")


PANELS = {
    "reward (mean, spread within a group)": ["reward", "reward_std"],
    "reward terms": ["reward/*"],
    "KL to the reference": ["kl"],
    "entropy (nats a token)": ["entropy"],
    "length (tokens)": ["length"],
    "shares": ["zero_std", "truncated", "clip_low", "clip_high"],
    "gradient norm": ["grad_norm"],
    "loss": ["loss"],
    "seconds": ["seconds/*"],
    **training.PANELS,
}


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    formula = load_rewards(config)
    rt = runtime.setup(config.seed)
    runtime.check_even(rt, "--prompts", config.prompts)
    run = run_folder.RunFolder(config, rt, PANELS, training.FREE)
    found = training.load_records(config, rt)
    policy, processor = training.load_model(config, rt)
    check = partial(check_record, config, processor, policy)
    found = data.usable(found, check, rt, run.out if config.skip_bad else None)
    reference = None
    if config.beta:
        visual = policy.model.visual  # frozen, so one tower serves both
        reference = copy.deepcopy(policy, {id(visual): visual}).requires_grad_(False)
    if config.shard:
        for model in filter(None, (policy, reference)):
            shard.shard(model, rt)
    optimizer, first = training.begin(config, run, policy, found)
    score = partial(log_probabilities, config, rt, processor)

    look = partial(training.held_out, config, rt, policy, processor, formula)
    if config.eval_every and not first:
        run.log(0, look(0), "now the training")

    load = partial(load_step, config, rt, processor, policy, found)
    batches = data.prefetch(load, range(first, config.steps), config.workers)
    with runtime.Interrupt(rt) as interrupt, run.kept(policy, processor, optimizer):
        for step, (chosen, seeds, batch) in batches:
            means, timer = runtime.Means(), runtime.Timer()

            # 1. roll out
            policy.eval()
            with rt.autocast(), shard.gathered(policy):
                prompts = data.encode(policy, batch)
                sampled = rollout.sample_group(
                    policy,
                    prompts,
                    config.group_size,
                    seeds,
                    end_id=processor.end_id,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    banned=processor.banned_ids,
                )
            timer.lap("rollout")

            # 2. reward
            groups = []
            for record, prompt, rollouts in zip(chosen, prompts, sampled, strict=True):
                responses = [to_text(r, processor) for r in rollouts]
                groups.append(Group(record, prompt, rollouts, responses))
            for group in groups:
                for y in group.responses:
                    R, terms = rewards.composite(
                        y, group.record, formula, config.reward_weights
                    )
                    group.rewards.append(R)
                    group.terms.append(terms)
            terms, weights = earned(groups, config)  # (B, G, K), (K,)

            # 3. advantage
            A = ADVANTAGES[config.advantage](terms, weights)  # (B, G)
            for group, advantages in zip(groups, A.float().to(rt.device)):
                group.advantages = advantages

            # 4. score under the reference
            size = config.micro_batch
            parts = [groups[i : i + size] for i in range(0, len(groups), size)]
            with torch.no_grad():
                # (n G, L) each
                reference_logps = [score(reference, part)[0] for part in parts]
            timer.lap("score")

            # 5. update
            rate = config.lr * runtime.cosine_with_warmup(step, config.steps, config.warmup)
            norm = update(
                config, rt, policy, optimizer, rate, score, parts, reference_logps, means
            )
            timer.lap("update")

            # 6. log
            measure(means, groups, weighted_sum(terms, weights))
            metrics = means.over_ranks(rt) | look(step + 1) | timer.seconds
            metrics |= {"grad_norm": norm, "lr": rate}
            tokens = metrics.pop("tokens") * config.prompts * config.group_size
            metrics["tokens_per_second"] = tokens / metrics["seconds/rollout"]
            run.log(step + 1, metrics, line(step + 1, config, metrics, timer))
            run.dump(step + 1, to_read(groups[:2]))
            run.end_step(step + 1, interrupt.requested, policy, processor, optimizer)
    run.finish(policy, processor)
    runtime.teardown(rt)


def load_rewards(config: Config) -> dict[str, rewards.Reward]:
    if len(config.reward_weights) not in (0, len(config.rewards)):
        raise SystemExit("--reward-weights: give one for each of --rewards, or none")
    try:
        return rewards.load_rewards(config.rewards)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"--rewards: {error}") from None


def check_record(config: Config, processor, policy, record: dict) -> None:
    """DataError where a record cannot be used; with --skip-bad its pictures are looked at, too."""
    records.check_truth(record, config.rewards)
    if config.skip_bad:
        load_prompts(config, processor, policy, [record])


def load_prompts(config: Config, processor, policy, chosen: list[dict]) -> data.Batch:
    batch = data.load_batch(chosen, processor, config.max_image_tokens)
    data.check_room(policy, chosen, batch, [config.max_new_tokens] * len(chosen))
    return batch


def earned(groups: list[Group], config: Config) -> tuple[Tensor, Tensor]:
    """(B, G, K): each response's K rewards; (K,): their weights."""
    values = [[list(terms.values()) for terms in group.terms] for group in groups]
    terms = torch.tensor(values, dtype=torch.float64)
    return terms, terms.new_tensor(config.reward_weights or [1.0] * terms.shape[-1])


def load_step(
    config, rt: runtime.Runtime, processor, policy, found: records.Records, step: int
):
    """This process's share of a step: records, a seed for each, pictures and questions."""
    indices = data.batch_indices(len(found), config.prompts, step, config.seed)
    chosen, seeds = [], []
    for place in range(rt.rank, config.prompts, rt.world_size):
        record = found[indices[place]]
        chosen.append(record | {"length": data.true_length(record, processor)})
        seeds.append(data.seed_for(config.seed, step, place))
    return chosen, seeds, load_prompts(config, processor, policy, chosen)


def log_probabilities(
    config, rt, processor, model, groups: list[Group], with_entropy=False
):
    """Log-probabilities of the groups' responses, mask, entropies: (n G, L) each.

    All are None without a model. The mask leaves out what --mask-truncated does.
    """
    if model is None:
        return None, None, None
    prompts = [group.prompt for group in groups]
    ids = [[r.ids for r in group.rollouts] for group in groups]
    with rt.autocast():
        logps, mask, entropy = shard.forward(
            model,
            vlm.group_logps,
            prompts,
            ids,
            config.temperature,
            processor.banned_ids,
            with_entropy,
        )
    if config.mask_truncated:
        whole = [not r.truncated for group in groups for r in group.rollouts]
        mask = mask * torch.tensor(whole, device=rt.device)[:, None]  # (n G, L)
    return logps, mask, entropy


def update(
    config, rt, policy, optimizer, rate, score, parts, reference_logps, means
) -> float:
    """mu optimizer steps on the groups, in parts; returns the norm of the last gradient."""
    rollouts = [r for part in parts for group in part for r in group.rollouts]
    kept = [len(r.ids) for r in rollouts if not (r.truncated and config.mask_truncated)]
    kept_tokens = runtime.sum_over_ranks({"tokens": sum(kept)}, rt)["tokens"]
    policy.train()
    old_logps: list[Tensor] = []
    for number in range(config.mu):
        for k, part in enumerate(parts):
            logps, mask, entropy = score(policy, part, with_entropy=True)  # (n G, L) each
            if number == 0:  # the policy that sampled is still this one
                old_logps.append(logps.detach())
                gap = sampler_gap(part, logps.detach()) * mask  # (n G, L)
                means.add("sampler_gap", gap, count=mask.sum())
                means.add_largest("sampler_gap_max", gap.max())
            loss, sums = grpo.policy_loss(
                logps,
                old_logps[k],
                torch.cat([group.advantages for group in part]),  # (n G,)
                mask,
                clip=config.clip,
                clip_high=config.clip_high,
                logp_ref=reference_logps[k],
                beta=config.beta,
                loss=config.loss,
                n_sequences=config.prompts * config.group_size,
                n_tokens=int(kept_tokens),
                max_length=config.max_new_tokens,
            )
            loss.backward()
            share = len(part) / config.prompts  # of the step's
            means.add("loss", loss, count=share)
            tokens = sums.pop("tokens")
            means.add("entropy", entropy * mask, count=tokens)
            for name, total in sums.items():
                means.add(name, total, count=tokens)
        norm = runtime.update(optimizer, rt, rate, config.max_grad_norm)
        if not math.isfinite(norm):
            break
    return norm


def line(step: int, config: Config, metrics: dict, timer: runtime.Timer) -> str:
    """A step in one line."""
    terms = " ".join(f"{name} {metrics['reward/' + name]:+.3f}" for name in config.rewards)
    seconds = sum(timer.seconds.values())
    return (
        f"step {step:4d}/{config.steps}  reward {metrics['reward']:+.3f} ({terms})  "
        f"std {metrics['reward_std']:.2f}  kl {metrics.get('kl', 0):.4f}  "
        f"length {metrics['length']:.0f}  grad {metrics['grad_norm']:.2f}  {seconds:.1f} s"
    )


if __name__ == "__main__":
    with records.one_line_errors():
        main()
