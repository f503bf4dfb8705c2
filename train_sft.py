"""Supervised fine-tuning on reasoning chains: Eq. (5), Figure 2(A).

    L_SFT = - E sum_n log P(w_n | w_<n, X_d, P)

The whole language model is trained, the vision tower and its merger are frozen, the loss counts the
response's tokens, the end-of-turn token included. Each step:
    1. encode      the pictures, once each
    2. score       log-probabilities of the responses, given picture and prompt
    3. update      the loss over all micro-batches and processes, Eq. (5), then one optimizer step
    4. log         metrics.jsonl, curves.png

By default the tiny base model learns from a quarter of the drawn world:

    python train_sft.py                            # laptop, 5 to 6 minutes -> runs/sft/model
    python train_sft.py --plain --out runs/plain   # Table 3's "w/o Reasoning": no chains
    torchrun --nproc-per-node 2 train_sft.py --out runs/sft2    # the same batch, shared out
    torchrun --nproc-per-node 8 train_sft.py --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --data train.jsonl --images train_images --lr 1e-5 --steps 117 --batch 64 \\
        --micro-batch 1 --gradient-checkpointing --shard --out runs/sft-3b

Differences from the paper: Eq. (5) sums over a sequence; here the sum is divided by the number of
response tokens of the whole batch, over all processes, so the step does not depend on how the batch
is split.

Shapes: n records in a micro-batch, L response tokens.
"""

import os

# before torch is imported: threads that wait must not spin, or other work stalls them
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from rr1 import data, records, rewards, run_folder, runtime, shard, tiny, training, vlm
from rr1.runtime import opt


@dataclass
class Config(training.Options):
    # data
    part: str = opt(
        "sft", "the paper's 25 % for SFT, its 75 % for RL, or all", ["sft", "rl", "all"]
    )
    plain: bool = opt(
        False, "no chains: a question and its answer (Table 3, w/o Reasoning)"
    )
    # optimisation
    model: str = opt(tiny.BASE, "checkpoint folder or hub id to start from")
    steps: int = opt(
        425, "optimizer steps; three epochs of the released data: 117 at --batch 64", low=1
    )
    batch: int = opt(32, "records a step, over all processes", low=1)
    lr: float = opt(2e-3, "peak learning rate (1e-5 is usual for the 3B model)")
    warmup: int = opt(20, "steps of linear warm-up; a cosine down to a tenth follows")
    weight_decay: float = opt(0.01, "of AdamW, on matrices only")
    # machine
    out: str = opt("runs/sft", "the run's folder")
    seed: int = opt(0, "fixes the order of the records and everything random")
    save_every: int = opt(100, "steps between checkpoints; 0: only the last")


PANELS = {
    "loss": ["loss"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["lr"],
    "tokens per second": ["tokens_per_second"],
    **training.PANELS,
}


def sft_loss(logps: Tensor, mask: Tensor, n_tokens: float) -> Tensor:
    """Eq. (5): - sum_n log P(w_n | w_<n, X_d, P), per response token of the whole batch.

    logps, mask (n, L); n_tokens counts the response tokens of the optimizer step, over all
    processes and micro-batches: then the losses of the micro-batches add up to that of the whole.
    """
    return -(logps * mask).sum() / n_tokens


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    rt = runtime.setup(config.seed)
    runtime.check_even(rt, "--batch", config.batch)
    run = run_folder.RunFolder(config, rt, PANELS, training.FREE)
    found = training.load_records(config, rt)
    model, processor = training.load_model(config, rt)
    check = partial(check_record, config, processor, model)
    found = data.usable(found, check, rt, run.out if config.skip_bad else None)
    model.model.language_model.train()  # the frozen tower has nothing to compute again
    if config.shard:
        shard.shard(model, rt)
    optimizer, first = training.begin(config, run, model, found)

    load = partial(load_step, config, rt, processor, model, found)
    batches = data.prefetch(load, range(first, config.steps), config.workers)
    formula = rewards.load_rewards(["deg", "len"])
    look = partial(training.held_out, config, rt, model, processor, formula)
    if config.eval_every and not first:
        run.log(0, look(0), "now the training")
    with runtime.Interrupt(rt) as interrupt, run.kept(model, processor, optimizer):
        for step, (batch, responses) in batches:
            timer = runtime.Timer()
            count = {"tokens": sum(len(response) for response in responses)}
            tokens = runtime.sum_over_ranks(count, rt)["tokens"]
            total = 0.0
            for part in micro_batches(batch, responses, config.micro_batch):
                with rt.autocast():
                    # 1. encode
                    prompts = data.encode(model, batch[part])

                    # 2. score
                    wanted = [[responses[i]] for i in part]
                    # (n, L) each
                    logps, mask, _ = shard.forward(model, vlm.group_logps, prompts, wanted)

                # 3. update
                loss = sft_loss(logps, mask, tokens)
                loss.backward()
                total += loss.item()
            rate = config.lr * runtime.cosine_with_warmup(step, config.steps, config.warmup)
            norm = runtime.update(optimizer, rt, rate, config.max_grad_norm)
            timer.lap("step")

            # 4. log
            seconds = timer.seconds["seconds/step"]
            metrics = runtime.sum_over_ranks({"loss": total}, rt)
            metrics |= {"grad_norm": norm, "lr": rate, "tokens": tokens}
            metrics |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
            line = (
                f"step {step + 1:4d}/{config.steps}  loss {metrics['loss']:.4f}  grad {norm:.2f}  "
                f"lr {rate:.1e}  {tokens / seconds:.0f} tokens/s"
            )
            run.log(step + 1, metrics | look(step + 1), line)
            run.end_step(step + 1, interrupt.requested, model, processor, optimizer)
    run.finish(model, processor)
    runtime.teardown(rt)


def check_record(config: Config, processor, model, record: dict) -> None:
    """DataError where a record cannot be used; with --skip-bad its pictures are looked at, too."""
    data.response_ids(record, processor, config.plain)
    if config.skip_bad:
        load_examples(config, processor, model, [record])


def load_step(
    config, rt: runtime.Runtime, processor, model, found: records.Records, step: int
):
    """This process's share of a step: pictures and questions, and the responses' tokens."""
    indices = data.batch_indices(len(found), config.batch, step, config.seed)
    chosen = [found[i] for i in indices[rt.rank :: rt.world_size]]
    return load_examples(config, processor, model, chosen)


def load_examples(config: Config, processor, model, chosen: list[dict]):
    responses = [data.response_ids(r, processor, config.plain) for r in chosen]
    batch = data.load_batch(chosen, processor, config.max_image_tokens, config.plain)
    data.check_room(model, chosen, batch, map(len, responses))
    return batch, responses


def micro_batches(
    batch: data.Batch, responses: list[list[int]], size: int
) -> list[list[int]]:
    """Which records go through the model together: alike in length, for less padding."""

    def length(i: int) -> int:
        return len(batch.ids[i]) + len(responses[i])

    order = sorted(range(len(responses)), key=length)
    return [order[i : i + size] for i in range(0, len(order), size)]


if __name__ == "__main__":
    with records.one_line_errors():
        main()
