"""What the two training scripts share: options, how a run begins, a look at held-out records."""

from dataclasses import dataclass

import torch

from rr1 import data, fast, records, rewards, rollout, runtime, shard, tiny, vlm
from rr1.groups import to_text
from rr1.run_folder import RunFolder
from rr1.runtime import Means, Runtime, opt

# options that may differ when a run goes on
FREE = {
    "save_every",
    "workers",
    "tracker",
    "shard",
    "micro_batch",
    "gradient_checkpointing",
    "eval_every",
    "eval_data",
    "eval_records",
}
PANELS = {
    "held out: right answers": ["eval/accuracy*"],
    "held out: rewards, F1 of types": ["eval/reward/*", "eval/f1"],
}


@dataclass
class Options:
    # data
    data: str = opt("", "file of JSON lines; empty: the drawn world, written on first use")
    images: str = opt(
        "", "folder that image paths are relative to; empty: the data file's own"
    )
    skip_bad: bool = opt(False, "leave out, and list in --out, records that cannot be used")
    max_image_tokens: int = opt(
        0, "a record whose pictures take more tokens is bad; 0: no limit"
    )
    min_pixels: int = opt(0, "enlarge smaller pictures to this; 0: as the checkpoint says")
    max_pixels: int = opt(0, "reduce larger pictures to this; 0: as the checkpoint says")
    workers: int = opt(0, "threads that read pictures ahead, in each process; 0: one")
    # watching
    eval_every: int = opt(0, "steps between looks at held-out records; 0: none")
    eval_data: str = opt("", "their file; empty: the drawn world's test split")
    eval_records: int = opt(64, "how many of them, the first ones", low=1)
    # machine
    micro_batch: int = opt(8, "records or groups a pass, in each process", low=1)
    gradient_checkpointing: bool = opt(
        False, "recompute activations: slower, much less memory"
    )
    shard: bool = opt(False, "spread weights, gradients, optimizer state: docs/use/gpus.md")
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm", low=1e-9)
    max_new_tokens: int = opt(128, "longest response (2048 in the published run)", low=1)
    resume: bool = opt(False, "go on from the newest checkpoint in --out")
    tracker: str | None = opt(None, "report to this too", ["wandb", "tensorboard"])


def load_records(config, rt: Runtime) -> records.Records:
    """The records of the script's share, read and not yet looked at."""
    with runtime.main_first(rt):
        path = config.data or tiny.dataset("train")
    return data.split(records.read(path, config.images, config.skip_bad), config.part)


def load_model(config, rt: Runtime):
    """The script's model on this process's device, vision frozen -> (model, processor)."""
    device = rt.device
    if config.shard:  # rank 0 alone reads what is to be sharded
        device = "cpu" if rt.is_main else "meta"
    pixels = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    model, processor = vlm.load(config.model, device=device, **pixels)
    fast.enable(model)  # delete this line and rr1/fast.py, and all still runs
    vlm.freeze_vision(model)
    if not config.shard:
        shard.broadcast_parameters(model, rt)
    if config.gradient_checkpointing:
        # the whole model would have the frozen tower keep a graph, which all parts of a step share
        model.model.language_model.gradient_checkpointing_enable()
    return model, processor


def begin(config, run: RunFolder, model, found: records.Records):
    """-> (optimizer, steps that are done already)."""
    optimizer = runtime.build_optimizer(model, config.lr, config.weight_decay)
    first = run.load(model, optimizer)
    path = config.data or "the drawn world"
    run.say(f"{vlm.count_parameters(model)}; {len(found)} records from {path}")
    return optimizer, first


def held_out(
    config, rt: Runtime, model, processor, formula: dict[str, rewards.Reward], step: int
) -> dict[str, float]:
    """How the model answers held-out records, greedily -> {"eval/..": mean}; {} between looks.

    Terms of the reward, F1 of the types of damage, share of right answers, and that by the damage's
    total intensity. The processes share the records out; the figures are those of one process.
    """
    if not config.eval_every or step % config.eval_every and step != config.steps:
        return {}
    with runtime.main_first(rt):
        path = config.eval_data or tiny.dataset("test")
    images = config.images if config.eval_data else None
    found = records.read(path, images)[: config.eval_records]
    mine = found[rt.rank :: rt.world_size]
    plain = getattr(config, "plain", False)
    formula = {} if plain else formula
    means = Means()
    names = ["accuracy", *(f"accuracy/{level}" for level in records.LEVELS)]
    if formula:
        names += ["f1", *(f"reward/{name}" for name in formula)]
    for name in names:  # a process without records logs them, too
        means.add(name, 0.0, count=0)
    model.eval()
    with rt.autocast(), torch.no_grad(), shard.gathered(model):
        for i in range(0, len(mine), config.micro_batch):
            part = mine[i : i + config.micro_batch]
            batch = data.load_batch(part, processor, config.max_image_tokens, plain)
            sampled = rollout.sample_group(
                model,
                data.encode(model, batch),
                1,
                [0] * len(part),
                end_id=processor.end_id,
                max_new_tokens=config.max_new_tokens,
                temperature=0,
                banned=processor.banned_ids,
            )
            for record, [r] in zip(part, sampled):
                y = to_text(r, processor)
                if plain:  # the answer alone
                    y = rewards.Response(f"<ANSWER>{y}<ANSWER_END>", y.length, y.truncated)
                length = data.true_length(record, processor)
                judge(means, y, record | {"length": length}, formula)
    model.model.language_model.train()
    seen = means.over_ranks(rt)
    shown = "  ".join(f"{name} {mean:.3f}" for name, mean in seen.items())
    if rt.is_main:
        print(f"held out, step {step}: {shown}", flush=True)
    return {f"eval/{name}": mean for name, mean in seen.items()}


def judge(means: Means, y: rewards.Response, record: dict, formula: dict) -> None:
    """Add what a held-out response earns, and whether it is right."""
    named, true = y.chain.degradations, record["degradations"]
    if formula:
        _, terms = rewards.composite(y, record, formula)
        for name, value in terms.items():
            means.add(f"reward/{name}", value)
        pairs, _ = rewards.match_types(named, true)
        means.add("f1", 2 * pairs, count=len(named) + len(true))
    if record["answer"] is not None:
        right = rewards.accuracy(y, record)
        level = records.level(sum(s for _, s in true))
        means.add("accuracy", right)
        means.add(f"accuracy/{level}", right)
