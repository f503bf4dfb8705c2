"""What does a GRPO step cost on one GPU: by what is switched on, by G, by pixels, and what is the largest that fits?

    python bench/gpu.py                                  # the sizes of Qwen2.5-VL-3B, random weights; needs some 80 GB
    python bench/gpu.py --parts pictures --out runs/p    # one of the tables alone
    python bench/gpu.py --sizes tiny --new-tokens 16     # anywhere, to see that it works

One group a step, as `train_grpo.py` does it: float32 weights, bfloat16 passes, a reference, AdamW, the layers' activations computed again.
Every response has the same number of tokens (the end of turn is banned). The first step of each case warms up and does not count;
medians of the others. "Without sharing" is this code with sharing off: pictures, prompts and rows G times, sampling as it is.
Written after every case: runs/bench-gpu/report.md and report.json.
"""
from __future__ import annotations

import copy
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rr1 import grpo, rollout, runtime, tiny, vlm
from rr1.files import to_json, write_text
from rr1.runtime import opt
from rr1.evaluation.statistics import markdown

QWEN_3B = {"tie_word_embeddings": True, "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
           "text_config": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                           "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
                           "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
                           "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
           "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
                             "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}}
TEXT = 150                                                      # tokens of the prompt beside the picture's
BASE = {"G": 8, "picture": (640, 480), "checkpointing": True}
PARTS = {"groups": {f"G {G}": {"G": G} for G in (2, 4, 8, 16, 32)},
         "pictures": {f"{w} x {h}": {"picture": (w, h)} for w, h in ((320, 240), (640, 480), (1280, 960), (1920, 1440))},
         "largest": {**{f"G {G}": {"G": G} for G in (64, 128, 256, 512)},
                     **{f"{w} x {h}": {"picture": (w, h)} for w, h in ((2560, 1920), (3840, 2880), (5120, 3840))}},
         "modes": {"as it is": {}, "without sharing": {"shared": False}, "--capture": {"capture": True}, "--flex": {"flex": True},
                   "--capture --flex": {"capture": True, "flex": True}, "no --gradient-checkpointing": {"checkpointing": False}}}


@dataclass
class Config:
    parts: list[str] = opt(list(PARTS), "tables: by G; by pixels; larger ones, until one does not fit; by what is switched on")
    sizes: str = opt("3b", "of the model: Qwen2.5-VL-3B's, or the tiny one's", ["3b", "tiny"])
    new_tokens: int = opt(256, "of each response")
    rounds: int = opt(3, "steps of each case that count")
    tflops: float = opt(989.0, "that the utilisation is a share of: dense bfloat16 of an H100 SXM or H200, by NVIDIA's data sheets")
    out: str = opt("runs/bench-gpu", "folder for the report")


def make_models(sizes: str, device: torch.device):
    """A policy with random weights, its reference and its optimizer, as train_grpo.main has them."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(**QWEN_3B) if sizes == "3b" else Qwen2_5_VLConfig.from_pretrained(tiny.BASE)
    with device:
        policy = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    vlm.adapt(policy), vlm.freeze_vision(policy)
    visual = policy.model.visual
    reference = copy.deepcopy(policy, {id(visual): visual}).requires_grad_(False).eval()
    return policy, reference, runtime.build_optimizer(policy, 1e-6, 0.0)


def make_picture(policy, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of noise, on the model's device, and their (1, 3) grid."""
    unit, vision = policy.config.vision_config.spatial_merge_size, policy.config.vision_config
    width, height = (round(side / vision.patch_size / unit) * unit for side in size)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    return torch.randn(height * width, values, device=policy.device), torch.tensor([[1, height, width]])


def make_prompts(policy, picture: tuple[torch.Tensor, torch.Tensor], copies: int) -> list[vlm.Prompt]:
    """The picture and TEXT tokens, `copies` times through the tower."""
    (patches, grid), generator = picture, torch.Generator().manual_seed(0)
    features = vlm.encode_images(policy, patches.repeat(copies, 1), grid.repeat(copies, 1))
    text = torch.randint(300, 600, (TEXT,), generator=generator).tolist()
    ids = text[:10] + [policy.config.image_token_id] * len(features[0]) + text[10:]
    return [vlm.make_prompt(policy, ids, grid, [own]) for own in features]


def step(models, rt: runtime.Runtime, new_tokens: int, G: int, picture: tuple[int, int], checkpointing: bool, shared: bool = True,
         capture: bool = False, flex: bool = False) -> dict[str, float]:
    """One group through the phases of train_grpo.main -> seconds of each and the peak of memory, in 1e9 bytes. Without sharing the picture is
    encoded G times for each of sampling, reference and policy, and each response has a row with a prompt of its own."""
    policy, reference, optimizer = models
    policy.gradient_checkpointing_enable() if checkpointing else policy.gradient_checkpointing_disable()
    cuda, c = rt.device.type == "cuda", policy.config                               # end of turn first, then what stands for pictures
    banned = [c.text_config.eos_token_id, c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id]
    copies, each = (1, G) if shared else (G, 1)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    clock, noise = [], make_picture(policy, picture)

    def lap():
        if cuda:
            torch.cuda.synchronize()
        clock.append(time.perf_counter())

    def score(model, **options):
        with rt.autocast():
            given = prompts if shared else make_prompts(policy, noise, copies)
            return vlm.group_logps(model, given, responses, banned=banned, flex=flex, **options)

    lap()
    policy.eval()
    with rt.autocast():
        prompts = make_prompts(policy, noise, copies)
        rollouts = rollout.sample_group(policy, prompts, each, range(copies), end_id=banned[0], banned=banned, max_new_tokens=new_tokens, capture=capture)
    responses = [[r.ids for r in group] for group in rollouts]
    lap()
    with torch.no_grad():
        reference_logps = score(reference)[0]
    lap()
    policy.train()
    logps, mask, _ = score(policy, with_entropy=True)
    advantages = grpo.group_advantages(torch.arange(G, dtype=torch.float32)[None]).flatten().to(rt.device)
    grpo.policy_loss(logps, logps.detach(), advantages, mask, logp_ref=reference_logps, beta=0.04)[0].backward()
    torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    lap()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    seconds = dict(zip(("rollout", "score", "update"), (b - a for a, b in zip(clock, clock[1:]))))
    return seconds | {"step": clock[-1] - clock[0], "peak": peak / 1e9, "prompt": len(prompts[0].ids)}


def update_operations(text, P: int, G: int, L: int) -> float:
    """Multiply-adds, twice, that an update of one packed row needs: three times the forward pass's (what is computed again does not count)."""
    H, head, feed_forward = text.hidden_size, text.hidden_size // text.num_attention_heads, 3 * text.hidden_size * text.intermediate_size
    layer = 2 * H * H + 2 * H * head * text.num_key_value_heads + feed_forward                          # weights
    seen = P * (P + 1) / 2 + G * (L * P + L * (L + 1) / 2)                                              # pairs of tokens
    forward = text.num_hidden_layers * (2 * layer * (P + G * L) + 4 * H * seen) + 2 * H * text.vocab_size * G * L
    forward -= 2 * feed_forward * P                                                                     # `vlm.LastLayer`
    return 3 * forward


def measure(models, rt: runtime.Runtime, config: Config, case: dict, rounds: int) -> dict | None:
    """Medians over that many steps of a case, after one that warms up; "useful" is the share of --tflops that the operations of a packed row
    make. None where it does not fit into memory, {"error": ..} where it fails."""
    case, found = BASE | case, []
    try:
        for _ in range(rounds + 1):
            found.append(step(models, rt, config.new_tokens, **case))
    except torch.OutOfMemoryError:
        return None
    except Exception as error:                                  # the other cases are worth having
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        models[2].zero_grad(set_to_none=True)
        gc.collect()
        if rt.device.type == "cuda":
            torch.cuda.empty_cache()
    middle = {key: statistics.median(one[key] for one in found[1:]) for key in found[0]} | {"peak": max(one["peak"] for one in found)}
    operations = update_operations(models[0].config.text_config, middle["prompt"], case["G"], config.new_tokens)
    return middle | {"tokens_per_second": case["G"] * config.new_tokens / middle["rollout"], "useful": operations / middle["update"] / (config.tflops * 1e12)}


def table(found: dict[str, dict | None]) -> str:
    rows = []
    for name, one in found.items():
        cells = ["does not fit"] + [""] * 7 if one is None else [one["error"]] + [""] * 7 if "error" in one else [
            f"{one['prompt']:.0f}", *(f"{one[key]:.2f}" for key in ("step", "rollout", "score", "update")), f"{one['tokens_per_second']:.0f}",
            f"{one['useful']:.0%}", f"{one['peak']:.1f}" if one["peak"] else "-"]
        rows.append([name, *cells])
    return markdown(["", "prompt tokens", "s a step", "rollout", "score", "update", "tokens/s sampled", "MFU, update", "peak, GB"], rows)


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    if unknown := [part for part in config.parts if part not in PARTS]:
        raise SystemExit(f"--parts {' '.join(unknown)}: unknown; there are {', '.join(PARTS)}")
    if config.rounds < 1:
        raise SystemExit(f"--rounds {config.rounds}: give at least 1")
    rt = runtime.setup(0)
    if config.sizes == "3b" and rt.device.type != "cuda":
        raise SystemExit("--sizes 3b: this needs a GPU with CUDA, and there is none here; --sizes tiny runs anywhere")
    device = torch.cuda.get_device_name() if rt.device.type == "cuda" else "CPU"
    models, out = make_models(config.sizes, rt.device), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    head = f"{device}, torch {torch.__version__}, sizes {config.sizes}, {TEXT} tokens of text, {config.new_tokens} new tokens; {BASE}"
    found: dict[str, dict] = {}
    for part in config.parts:
        found[part], too_large = {}, set()
        for name, case in (bar := tqdm(PARTS[part].items(), desc=part)):
            bar.set_postfix_str(name)
            if too_large & case.keys() or rt.device.type != "cuda" and case.keys() & {"capture", "flex"}:
                continue                                        # a smaller one did not fit, or this needs a GPU
            found[part][name] = measure(models, rt, config, case, 1 if part == "largest" else config.rounds)
            if found[part][name] is None:
                too_large |= case.keys() & {"G", "picture"}
            write_text(out / "report.md", "\n\n".join([head, *(f"**{p}**\n\n{table(rows)}" for p, rows in found.items())]) + "\n")
            write_text(out / "report.json", to_json({"head": head, **found}, indent=1) + "\n")
    print((out / "report.md").read_text() + f"\nwritten: {out}/report.md, report.json")


if __name__ == "__main__":
    main()
