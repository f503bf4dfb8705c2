"""What does a GRPO step cost on one GPU: by G and by pixels up to the largest that fits, and
by what is switched on?

    python bench/gpu.py                                  # Qwen2.5-VL-3B's sizes; needs some 80 GB
    python bench/gpu.py --parts pictures --out runs/p    # one of the tables alone
    python bench/gpu.py --sizes tiny --new-tokens 16     # anywhere, to see that it works

One group a step, as `train_grpo.py` does it, with random weights: float32 weights, bfloat16 passes,
a reference, AdamW, the layers' activations computed again. Every response has the same number of
tokens (the end of turn is banned). The first step of each case warms up and does not count; medians
of the others. Written after every case: runs/bench-gpu/report.md and report.json.
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
from rr1.files import write_json, write_text
from rr1.runtime import opt

QWEN_3B = {
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
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
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
TEXT = 150  # tokens of the prompt beside the picture's


@dataclass(frozen=True)
class Case:
    G: int = 8
    width: int = 640
    height: int = 480
    shared: bool = True  # else pictures, prompts and rows G times; sampling as it is
    checkpointing: bool = True
    whole_logits: bool = False  # the projection to the vocabulary at once and not in chunks


PARTS = {
    "groups": {f"G {G}": Case(G=G) for G in (2, 4, 8, 16, 32, 64, 128, 256, 512)},
    "pictures": {
        f"{width} x {width * 3 // 4}": Case(width=width, height=width * 3 // 4)
        for width in (320, 640, 1280, 1920, 2560, 3840, 5120)
    },
    "modes": {
        "as it is": Case(),
        "without sharing": Case(shared=False),
        "without --gradient-checkpointing": Case(checkpointing=False),
        "with all logits at once": Case(whole_logits=True),
    },
}


@dataclass
class Config:
    parts: list[str] = opt(list(PARTS), "which tables", list(PARTS))
    sizes: str = opt(
        "3b", "of the model: Qwen2.5-VL-3B's, or the tiny one's", ["3b", "tiny"]
    )
    new_tokens: int = opt(256, "of each response")
    rounds: int = opt(3, "steps of each case that count")
    plain: bool = opt(False, "without rr1/fast.py")
    tflops: float = opt(
        989.0, "dense bfloat16 of the GPU; this is that of an H100 SXM or H200"
    )
    out: str = opt("runs/bench-gpu", "folder for the report")


@dataclass
class Models:
    """A policy with random weights, its reference and its optimizer, as in train_grpo.py."""

    policy: Qwen2_5_VLForConditionalGeneration
    reference: Qwen2_5_VLForConditionalGeneration
    optimizer: torch.optim.Optimizer


def make_models(sizes: str, plain: bool, device: torch.device) -> Models:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(**QWEN_3B)
    if sizes == "tiny":
        config = Qwen2_5_VLConfig.from_pretrained(tiny.BASE)
    with device:
        policy = Qwen2_5_VLForConditionalGeneration(config)
    vlm.freeze_vision(policy)
    if not plain:
        fast.enable(policy)
    visual = policy.model.visual
    reference = copy.deepcopy(policy, {id(visual): visual}).requires_grad_(False).eval()
    return Models(policy, reference, runtime.build_optimizer(policy, 1e-6, 0.0))


def make_prompts(policy, case: Case, copies: int) -> list[vlm.Prompt]:
    """A picture of noise and TEXT tokens, `copies` times through the tower."""
    vision = policy.config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    rows = round(case.height / unit) * vision.spatial_merge_size  # of patches
    columns = round(case.width / unit) * vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, rows, columns]])
    patches = torch.randn(rows * columns, values, device=policy.device)
    features = vlm.encode_images(policy, patches.repeat(copies, 1), grid.repeat(copies, 1))
    text = list(range(300, 300 + TEXT))
    ids = text[:10] + [policy.config.image_token_id] * len(features[0]) + text[10:]
    return [vlm.make_prompt(policy, ids, grid, [own]) for own in features]


def step(
    models: Models, rt: runtime.Runtime, new_tokens: int, case: Case
) -> dict[str, float]:
    """One group through the phases of train_grpo.py -> seconds of each, and the peak of memory in
    1e9 bytes."""
    policy, c = models.policy, models.policy.config
    cuda = rt.device.type == "cuda"
    end = c.text_config.eos_token_id
    banned = [end, c.image_token_id, c.video_token_id, c.vision_start_token_id]
    banned.append(c.vision_end_token_id)
    copies, each = (1, case.G) if case.shared else (case.G, 1)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    timer = runtime.Timer()

    def lap(name: str) -> None:
        if cuda:
            torch.cuda.synchronize()
        timer.lap(name)

    def score(model, prompts: list[vlm.Prompt], **options):
        with rt.autocast():
            if not case.shared:
                prompts = make_prompts(policy, case, copies)
            return vlm.group_logps(model, prompts, responses, banned=banned, **options)

    policy.eval()
    with rt.autocast():
        prompts = make_prompts(policy, case, copies)
        sampling = {"end_id": end, "banned": banned, "max_new_tokens": new_tokens}
        groups = rollout.sample_group(policy, prompts, each, range(copies), **sampling)
    responses = [[r.ids for r in group] for group in groups]
    lap("rollout")
    with torch.no_grad():
        reference_logps = score(models.reference, prompts)[0]
    lap("score")
    policy.train()
    logps, mask, _ = score(policy, prompts, with_entropy=True)
    rewards = torch.arange(case.G, dtype=torch.float32)[None]
    A = grpo.group_advantages(rewards).flatten().to(rt.device)
    loss, _ = grpo.policy_loss(
        logps, logps.detach(), A, mask, logp_ref=reference_logps, beta=0.04
    )
    loss.backward()
    runtime.update(models.optimizer, rt, 1e-6, 1.0)
    lap("update")
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    seconds = {
        name.removeprefix("seconds/"): value for name, value in timer.seconds.items()
    }
    seconds["step"] = sum(seconds.values())
    return seconds | {"peak": peak / 1e9, "prompt": len(prompts[0].ids)}


def update_operations(text, P: int, G: int, L: int) -> float:
    """Multiply-adds, twice, that an update of one packed row needs: three times the forward pass's
    (what is computed again does not count)."""
    H = text.hidden_size
    keys = H // text.num_attention_heads * text.num_key_value_heads
    layer = 2 * H * H + 2 * H * keys + 3 * H * text.intermediate_size  # weights
    pairs = P * (P + 1) / 2 + G * (L * P + L * (L + 1) / 2)  # of tokens, in attention
    forward = text.num_hidden_layers * (2 * layer * (P + G * L) + 4 * H * pairs)
    return 3 * (forward + 2 * H * text.vocab_size * G * L)


def measure(models: Models, rt: runtime.Runtime, config: Config, case: Case) -> dict | None:
    """Medians over the steps of a case; None where it does not fit into memory, {"error": ..} where
    it fails. "useful" is the share of --tflops that the operations of a packed row make."""
    at_once = vlm.LOGITS_AT_ONCE
    try:
        if case.whole_logits:
            vlm.LOGITS_AT_ONCE = 2**62
        found = [
            step(models, rt, config.new_tokens, case) for _ in range(config.rounds + 1)
        ]
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # the other cases are worth having
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        vlm.LOGITS_AT_ONCE = at_once
        models.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if rt.device.type == "cuda":
            torch.cuda.empty_cache()
    middle = {key: statistics.median(one[key] for one in found[1:]) for key in found[0]}
    text = models.policy.config.text_config
    operations = update_operations(text, middle["prompt"], case.G, config.new_tokens)
    middle["useful"] = operations / middle["update"] / (config.tflops * 1e12)
    middle["tokens_per_second"] = case.G * config.new_tokens / middle["rollout"]
    return middle


COLUMNS = {
    "prompt tokens": "{prompt:.0f}",
    "s a step": "{step:.2f}",
    "rollout": "{rollout:.2f}",
    "score": "{score:.2f}",
    "update": "{update:.2f}",
    "tokens/s sampled": "{tokens_per_second:.0f}",
    "MFU, update": "{useful:.0%}",
    "peak, GB": "{peak:.1f}",
}


def table(found: dict[str, dict | None]) -> str:
    rows = []
    for name, one in found.items():
        cells = [""] * len(COLUMNS)
        if one is None:
            cells[0] = "does not fit"
        elif "error" in one:
            cells[0] = one["error"]
        else:
            cells = [form.format(**one) for form in COLUMNS.values()]
        rows.append([name, *cells])
    return markdown(["", *COLUMNS], rows)


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    if config.rounds < 1:
        raise SystemExit(f"--rounds {config.rounds}: give at least 1")
    rt = runtime.setup(0)
    cuda = rt.device.type == "cuda"
    if config.sizes == "3b" and not cuda:
        raise SystemExit(
            "--sizes 3b: this needs a GPU with CUDA, and there is none here; "
            "--sizes tiny runs anywhere"
        )
    device = torch.cuda.get_device_name() if cuda else "CPU"
    models, out = make_models(config.sizes, config.plain, rt.device), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    head = f"{device}, torch {torch.__version__}, sizes {config.sizes}, {TEXT} tokens of text, "
    head += f"{config.new_tokens} new tokens; {Case()}"
    found: dict[str, dict] = {}
    for part in config.parts:
        found[part] = {}
        for name, case in tqdm(PARTS[part].items(), desc=part):
            found[part][name] = measure(models, rt, config, case)
            tables = [f"**{part}**\n\n{table(rows)}" for part, rows in found.items()]
            write_text(out / "report.md", "\n\n".join([head, *tables]) + "\n")
            write_json(out / "report.json", {"head": head, **found})
            if part != "modes" and found[part][name] is None:
                break  # nor would a larger one
    print((out / "report.md").read_text() + f"\nwritten: {out}/report.md, report.json")


if __name__ == "__main__":
    main()
