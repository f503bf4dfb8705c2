"""What does a GRPO step cost on one GPU, by G and by pixels, up to the largest that fits?

    python bench/gpu.py                                  # Qwen2.5-VL-3B's sizes; needs some 80 GB
    python bench/gpu.py --parts pictures --out runs/p    # one of the tables alone
    python bench/gpu.py --sizes tiny --new-tokens 16     # anywhere, to see that it works

One group a step, as `train_grpo.py` does it, with random weights: float32 weights, bfloat16 passes,
a reference, AdamW, the layers' activations computed again. Every response has the same number of
tokens (the end of turn is banned). The first step of each case warms up and does not count; medians
of the others. Written after every case: runs/bench-gpu/report.md.
"""

from __future__ import annotations

import copy
import gc
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rr1 import fast, grpo, rollout, runtime, tiny, vlm
from rr1.evaluation.statistics import markdown
from rr1.files import write_text
from rr1.runtime import opt

# what differs from the library's defaults
QWEN_3B = {
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
}
TEXT = 150  # tokens of the prompt beside the picture's


@dataclass(frozen=True)
class Case:
    G: int = 8
    width: int = 640
    height: int = 480


PARTS = {
    "groups": {f"G {G}": Case(G=G) for G in (2, 4, 8, 16, 32, 64, 128, 256, 512)},
    "pictures": {
        f"{width} x {width * 3 // 4}": Case(width=width, height=width * 3 // 4)
        for width in (320, 640, 1280, 1920, 2560, 3840, 5120)
    },
}
COLUMNS = {
    "prompt tokens": "{prompt:.0f}",
    "rollout, s": "{rollout:.2f}",
    "score": "{score:.2f}",
    "update": "{update:.2f}",
    "peak, GB": "{peak:.1f}",
}


@dataclass
class Config:
    parts: list[str] = opt(list(PARTS), "which tables", list(PARTS))
    sizes: str = opt(
        "3b", "of the model: Qwen2.5-VL-3B's, or the tiny one's", ["3b", "tiny"]
    )
    new_tokens: int = opt(256, "of each response", low=1)
    rounds: int = opt(3, "steps of each case that count", low=1)
    out: str = opt("runs/bench-gpu", "folder for the report")


@dataclass
class Models:
    """A policy with random weights, its reference and its optimizer, as in train_grpo.py."""

    policy: Qwen2_5_VLForConditionalGeneration
    reference: Qwen2_5_VLForConditionalGeneration
    optimizer: torch.optim.Optimizer


def make_models(sizes: str, device: torch.device) -> Models:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(**QWEN_3B)
    if sizes == "tiny":
        config = Qwen2_5_VLConfig.from_pretrained(tiny.BASE)
    with device:
        policy = Qwen2_5_VLForConditionalGeneration(config)
    vlm.freeze_vision(policy)
    fast.enable(policy)
    policy.gradient_checkpointing_enable()
    visual = policy.model.visual
    reference = copy.deepcopy(policy, {id(visual): visual}).requires_grad_(False).eval()
    return Models(policy, reference, runtime.build_optimizer(policy, 1e-6, 0.0))


def make_prompt(policy, case: Case) -> vlm.Prompt:
    """A picture of noise and TEXT tokens."""
    vision = policy.config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    rows = round(case.height / unit) * vision.spatial_merge_size  # of patches
    columns = round(case.width / unit) * vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, rows, columns]])
    patches = torch.randn(rows * columns, values, device=policy.device)
    features = vlm.encode_images(policy, patches, grid)
    text = list(range(300, 300 + TEXT))
    ids = text[:10] + [policy.config.image_token_id] * len(features[0]) + text[10:]
    return vlm.make_prompt(policy, ids, grid, features)


def step(
    models: Models, rt: runtime.Runtime, new_tokens: int, case: Case
) -> dict[str, float]:
    """One group through the phases of train_grpo.py -> seconds of each, tokens of the prompt, and
    the peak of memory in 1e9 bytes."""
    policy, c = models.policy, models.policy.config
    end = c.text_config.eos_token_id
    banned = [end, c.image_token_id, c.video_token_id, c.vision_start_token_id]
    banned.append(c.vision_end_token_id)
    cuda = rt.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    timer = runtime.Timer()

    def lap(name: str) -> None:
        if cuda:
            torch.cuda.synchronize()
        timer.lap(name)

    policy.eval()
    with rt.autocast():
        prompts = [make_prompt(policy, case)]
        sampling = {"end_id": end, "banned": banned, "max_new_tokens": new_tokens}
        [group] = rollout.sample_group(policy, prompts, case.G, [0], **sampling)
    responses = [[r.ids for r in group]]
    lap("rollout")
    with rt.autocast(), torch.no_grad():
        scored = vlm.group_logps(models.reference, prompts, responses, banned=banned)
    lap("score")
    policy.train()
    with rt.autocast():
        logps, mask, _ = vlm.group_logps(
            policy, prompts, responses, banned=banned, with_entropy=True
        )
    rewards = torch.arange(case.G, dtype=torch.float32)[None]
    A = grpo.group_advantages(rewards).flatten().to(rt.device)
    loss, _ = grpo.policy_loss(
        logps, logps.detach(), A, mask, logp_ref=scored[0], beta=0.04
    )
    loss.backward()
    runtime.update(models.optimizer, rt, 1e-6, 1.0)
    lap("update")
    seconds = {name.removeprefix("seconds/"): s for name, s in timer.seconds.items()}
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return seconds | {"peak": peak / 1e9, "prompt": len(prompts[0].ids)}


def measure(models: Models, rt: runtime.Runtime, config: Config, case: Case) -> list[str]:
    """Medians over the steps of a case; no cells where it does not fit into memory."""
    try:
        found = []
        for _ in range(config.rounds + 1):
            found.append(step(models, rt, config.new_tokens, case))
    except torch.OutOfMemoryError:
        return []
    finally:
        models.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if rt.device.type == "cuda":
            torch.cuda.empty_cache()
    middle = {key: statistics.median(one[key] for one in found[1:]) for key in found[0]}
    return [form.format(**middle) for form in COLUMNS.values()]


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    rt = runtime.setup(0)
    cuda = rt.device.type == "cuda"
    if config.sizes == "3b" and not cuda:
        raise SystemExit(
            "--sizes 3b: this needs a GPU with CUDA, and there is none here; "
            "--sizes tiny runs anywhere"
        )
    device = torch.cuda.get_device_name() if cuda else "CPU"
    models, out = make_models(config.sizes, rt.device), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    said = [f"{device}, torch {torch.__version__}, {config}, {TEXT} tokens of text"]
    for part in config.parts:
        rows = []
        said.append("")
        for name, case in tqdm(PARTS[part].items(), desc=part):
            cells = measure(models, rt, config, case)
            rows.append([name, *(cells or ["does not fit"])])
            rows[-1] += [""] * (1 + len(COLUMNS) - len(rows[-1]))
            said[-1] = f"**{part}**\n\n{markdown(['', *COLUMNS], rows)}"
            write_text(out / "report.md", "\n\n".join(said) + "\n")
            if not cells:
                break  # nor would a larger one
    print((out / "report.md").read_text() + f"\nwritten: {out}/report.md")


if __name__ == "__main__":
    main()
