"""Supervised fine-tuning on reasoning chains: Eq. (5), Figure 2(A).

    L_SFT = - E sum_n log P(w_n | w_<n, X_d, P)

The whole language model is trained, the vision tower and its merger are frozen, the loss counts the response's tokens, the
end-of-turn token included. By default the tiny base model learns from a quarter of the drawn world:

    python train_sft.py                                                       # laptop, 5 to 6 minutes -> runs/sft/model
    python train_sft.py --plain --out runs/plain                              # Table 3's "w/o Reasoning": answers without chains
    torchrun --nproc-per-node 2 train_sft.py --out runs/sft2                  # two processes, the same batch shared out
    torchrun --nproc-per-node 8 train_sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl --images train_images \\
        --lr 1e-5 --steps 117 --batch 64 --micro-batch 1 --gradient-checkpointing --shard --out runs/sft-3b

Differences from the paper: Eq. (5) sums over a sequence; here the sum is divided by the number of response tokens of the
whole batch, over all processes, so the step does not depend on how the batch is split.
"""
from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from rr1 import data, run_folder, runtime, shard, tiny, vlm
from rr1.runtime import opt


@dataclass
class Config:
    model: str = opt(tiny.BASE, "checkpoint folder or hub id to start from")
    data: str = opt("", "file of JSON lines; empty: the drawn world, written on first use")
    images: str = opt("", "folder that image paths are relative to; empty: the data file's own")
    plain: bool = opt(False, "no chains: the question alone is asked, and answered by the answer alone (Table 3, w/o Reasoning)")
    part: str = opt("sft", "which share of the data: the paper's 25 percent for fine-tuning, its 75 for RL, or all", ["sft", "rl", "all"])
    skip_bad: bool = opt(False, "leave out records that cannot be used, with a list in --out; otherwise one stops the run")
    workers: int = opt(0, "processes that read pictures ahead, in each process; 0: a thread does it")
    max_image_tokens: int = opt(0, "a record whose pictures take more tokens is bad: it would need too much memory; 0: any number")
    min_pixels: int = opt(0, "smaller pictures are enlarged to this many pixels; 0: the checkpoint's own")
    max_pixels: int = opt(0, "larger pictures are made smaller, to this many pixels at most; 0: the checkpoint's own")
    out: str = opt("runs/sft", "the run's folder")
    steps: int = opt(425, "optimizer steps; the default is the tiny model's (three epochs of the released data: 117 at --batch 64)")
    batch: int = opt(32, "records a step, over all processes")
    micro_batch: int = opt(8, "records a forward and backward pass, in each process")
    lr: float = opt(2e-3, "peak learning rate (1e-5 is usual for the 3B model)")
    warmup: int = opt(20, "steps of linear warm-up; a cosine down to a tenth follows")
    weight_decay: float = opt(0.01, "of AdamW, on matrices only")
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm")
    gradient_checkpointing: bool = opt(False, "compute activations again in the backward pass: slower, much less memory")
    shard: bool = opt(False, "parameters, gradients and optimizer state are spread over the processes: see docs/gpus.md")
    seed: int = opt(0, "fixes the order of the records and everything random")
    save_every: int = opt(100, "steps between checkpoints")
    resume: bool = opt(False, "go on from the newest checkpoint in --out")
    tracker: str | None = opt(None, "report to this too", ["wandb", "tensorboard"])


def sft_loss(logps: torch.Tensor, mask: torch.Tensor, n_tokens: float) -> torch.Tensor:
    """Eq. (5): - sum_n log P(w_n | w_<n, X_d, P) over the responses' tokens, per token of the whole batch.

    logps, mask (N, L); n_tokens counts the response tokens of the optimizer step, over all processes and micro-batches, so that
    the losses of the micro-batches add up to the loss of the whole.
    """
    return -(logps * mask).sum() / n_tokens


PANELS = ["loss: loss", "gradient norm: grad_norm", "learning rate: lr", "tokens per second: tokens_per_second"]


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    rt = runtime.setup(config.seed)
    if config.batch < rt.world_size:
        raise SystemExit(f"--batch {config.batch} leaves some of the {rt.world_size} processes without a record: give at least {rt.world_size}")
    if config.shard and config.batch % rt.world_size:                               # all must make as many passes
        raise SystemExit(f"--batch {config.batch} cannot be shared out evenly to {rt.world_size} processes, as --shard needs: "
                         f"give a multiple of {rt.world_size}")
    run = run_folder.RunFolder(config, rt, PANELS, free={"save_every", "workers", "tracker", "shard"}, tracker=config.tracker)
    with runtime.main_first(rt):
        path = config.data or tiny.dataset("train")
    records = data.split(data.read(path, config.images, config.skip_bad), config.part)

    device = rt.device if not config.shard else "cpu" if rt.is_main else "meta"       # rank 0 alone reads what is to be sharded
    model, processor = vlm.load(config.model, device=device, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    if config.skip_bad:
        records = data.leave_out_bad(records, processor, config.max_image_tokens, run.out, rt, config.plain)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    vlm.freeze_vision(model)
    if config.shard:
        shard.shard(model, rt)
    optimizer = runtime.build_optimizer(model, config.lr, config.weight_decay)
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = (run.load(model, optimizer) or {"step": 0})["step"]
    if rt.is_main:
        print(f"{vlm.count_parameters(model)}; {len(records)} records from {path}")

    def load(step: int) -> tuple[data.Batch, list[list[int]]]:
        share = data.batch_indices(len(records), config.batch, step, config.seed)[rt.rank::rt.world_size]
        chosen = [records[i] for i in share]
        texts = [data.plain_answer(r) if config.plain else r["response"] for r in chosen]
        return data.load_batch(chosen, processor, config.max_image_tokens, config.plain), [processor.response_ids(text) for text in texts]

    with runtime.Interrupt(rt) as interrupt:
        for step, (batch, responses) in data.prefetch(load, range(first, config.steps), config.workers):
            start = time.perf_counter()
            rate = config.lr * runtime.cosine_with_warmup(step, config.steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens = runtime.sum_over_ranks({"tokens": sum(map(len, responses))}, rt)["tokens"]
            by_length = sorted(range(len(responses)), key=lambda i: len(batch.ids[i]) + len(responses[i]))    # alike together: less padding
            loss = 0.0
            for i in range(0, len(responses), config.micro_batch):
                part = by_length[i:i + config.micro_batch]
                with rt.autocast():
                    prompts = data.encode(model, batch[part])
                    logps, mask, _ = shard.forward(model, vlm.group_logps, prompts, [[responses[j]] for j in part])
                share = sft_loss(logps, mask, tokens)
                share.backward()
                loss += share.item()
            runtime.sum_gradients(parameters, rt)
            norm = shard.whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, error_if_nonfinite=True))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - start
            totals = runtime.sum_over_ranks({"loss": loss}, rt)
            run.log(step + 1, totals | {"grad_norm": norm, "lr": rate, "tokens": tokens, "seconds": seconds,
                                        "tokens_per_second": tokens / seconds},
                    f"step {step + 1:4d}/{config.steps}  loss {totals['loss']:.4f}  grad {norm:.2f}  lr {rate:.1e}  "
                    f"{tokens / seconds:.0f} tokens/s")
            run.end_step(step + 1, interrupt.requested, model, processor, optimizer)
    run.finish(model, processor)
    runtime.teardown(rt)


if __name__ == "__main__":
    main()
