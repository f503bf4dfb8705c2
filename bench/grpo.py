"""How long does a GRPO step take, beside TRL's on the same model, pictures and prompts?

    pip install trl==1.16.0                     # the peer; nothing else in the repository needs it
    python bench/grpo.py                        # one thread; prints the tables, writes runs/bench-grpo/report.md and report.json
    python bench/grpo.py --configurations photo photo-G4 photo-G16 --rounds 7

Two processes stand side by side, one runs `train_grpo.main`, the other `trl.GRPOTrainer.train`. They take turns, step by step, so
that whatever slows the machine slows both; ratios are medians over turns. The first turn of each warms up and does not count. Both
sample the same number of new tokens (the end of turn is suppressed), both keep a reference (beta 0.04), freeze the vision tower and do one AdamW update.
Counters on the model's own classes say what each computed. Memory is the peak of each process.
"""
from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
from rr1 import runtime
from rr1.files import to_json, write_text
from rr1.runtime import opt
from rr1.evaluation.statistics import markdown

PHOTO = {"width": 640, "height": 480, "text": 150, "new": 128, "groups": 1, "hidden": 256, "head": 64, "layers": 6, "vocab": 4096}
CONFIGURATIONS = {
    "photo": PHOTO | {"G": 8}, "photo-G4": PHOTO | {"G": 4}, "photo-G16": PHOTO | {"G": 16},
    "tiny": {"width": 112, "height": 112, "text": 40, "new": 64, "groups": 16, "hidden": 192, "head": 48, "layers": 6, "vocab": 710, "G": 8}}
ABOUT = {"photo": "a 640 x 480 photo, 150 tokens of text, 128 new tokens, G 8", "photo-G4": "the same, G 4", "photo-G16": "the same, G 16",
         "tiny": "the default run's sizes: 16 groups of 8, 64 new tokens"}
PHASES = ("rollout", "score", "update")


# ---------------------------------------------------------------- what both are given

def write_inputs(folder: Path, c: dict, steps: int) -> None:
    """A random model and, for each step, its groups' pictures and prompts, as an ordinary checkpoint and data set."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from rr1 import tiny, vlm
    torch.manual_seed(0)
    processor = vlm.Processor.from_pretrained(tiny.BASE, min_pixels=28 * 28, max_pixels=c["width"] * c["height"])
    base = Qwen2_5_VLConfig.from_pretrained(tiny.BASE)
    size, head = c["hidden"], c["head"]
    base.text_config.update({"hidden_size": size, "intermediate_size": 3 * size, "num_hidden_layers": c["layers"], "vocab_size": c["vocab"],
                             "num_attention_heads": size // head, "layer_types": ["full_attention"] * c["layers"],
                             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}})
    base.vision_config.update({"out_hidden_size": size})
    model = Qwen2_5_VLForConditionalGeneration(base)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = processor.end_id, processor.tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    count = lambda module: sum(p.numel() for p in module.parameters())
    visual = model.model.visual                                 # the merger sees one token for four patches
    layers = model.model.language_model.layers
    sizes = {"tower": count(visual) - 0.75 * count(visual.merger), "projection": c["vocab"] * size,
             "language": count(layers) - sum(count(layer.mlp) for layer in layers), "feed-forward": count(layers[0].mlp)}
    (folder / "sizes.json").write_text(json.dumps(sizes))

    question = "what"
    while len(processor.tokenizer(question)["input_ids"]) < c["text"]:
        question += " is the color"
    rng, lines = np.random.default_rng(0), []
    for i in range(steps * c["groups"]):
        Image.fromarray(rng.integers(0, 256, (c["height"], c["width"], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>" + question}, {"from": "gpt", "value": "<TYPE>noise(0.5)<TYPE_END>"}]
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "conversations": turns}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------- counting

class Counts(Counter):
    """Tokens and pictures that go through the model's parts, by phase; `phase` is set by who runs the step."""
    phase = "rollout"

    def install(self, vocab: int) -> None:
        import torch
        from rr1 import rollout, vlm
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        def around(owner, name, count):
            original = getattr(owner, name)

            def counted(this, *args, **kwargs):
                count(this, *args, **kwargs)
                return original(this, *args, **kwargs)
            setattr(owner, name, counted)

        def tower(this, patches, grid_thw=None, *_, **__):
            self["images through the vision tower"] += len(grid_thw)
            self["tower tokens"] += len(patches)

        def language(this, *_, inputs_embeds, past_key_values=None, **__):
            n = inputs_embeds.shape[0] * inputs_embeds.shape[1]
            if self.phase == "rollout" and past_key_values is not None and not past_key_values.get_seq_length():
                self["prompt tokens prefilled"] += n
            self["tokens through the language model, " + self.phase] += n

        def feed_forward(this, hidden):
            self["tokens through feed-forward parts, " + self.phase] += hidden.shape[:-1].numel()

        def project(this, hidden):
            if this.out_features == vocab:
                self["tokens projected, " + self.phase] += hidden.shape[:-1].numel()

        around(modeling.Qwen2_5_VisionTransformerPretrainedModel, "forward", tower)
        around(modeling.Qwen2_5_VLTextModel, "forward", language)
        around(rollout, "decode", lambda model, x, *_: language(model, inputs_embeds=x))                 # ours; TRL has no such function
        around(modeling.Qwen2MLP, "forward", feed_forward)
        around(torch.nn.Linear, "forward", project)
        around(vlm.Wide, "forward", lambda this, x: project(this, x) if x.device.type == "cpu" and x.shape[:-1].numel() <= vlm.FEW_ROWS else None)
        around(Qwen2VLImageProcessorPil, "preprocess",
               lambda this, images, *_, **__: self.update({"images preprocessed": len(images) if isinstance(images, (list, tuple)) else 1}))


def wait_for_turn() -> None:
    print("ready", flush=True)
    if not sys.stdin.readline():
        raise SystemExit


def report_step(counts: Counts, seconds: dict[str, float], **more) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("STEP " + json.dumps({"seconds": seconds, "counts": dict(counts), "peak_mib": peak, **more}), flush=True)
    counts.clear()


# ---------------------------------------------------------------- ours

def run_ours(folder: Path, c: dict, steps: int, counts: Counts) -> None:
    import torch

    import train_grpo
    from rr1 import data, rollout, run_folder, vlm
    seconds: dict[str, float] = {}
    sample, group_logps = rollout.sample_group, vlm.group_logps

    def forced(model, prompts, G, seeds, *, end_id, banned, **options):
        groups = sample(model, prompts, G, seeds, end_id=end_id, banned=[*banned, end_id], **options)
        counts.phase = "score"
        return groups

    def scored(*args, **options):
        counts.phase = "update" if torch.is_grad_enabled() else "score"
        return group_logps(*args, **options)

    def one_after_the_other(make, numbers, workers):             # no prefetching: a step pays for its own pictures
        for number in numbers:
            wait_for_turn()
            counts.phase, start = "rollout", time.perf_counter()
            made = make(number)
            yield number, made
            report_step(counts, seconds | {"step": time.perf_counter() - start}, matrix_rate=matrix_rate(c))

    def log(self, step, metrics, line=None):
        seconds.update({phase: metrics[f"seconds/{phase}"] for phase in PHASES})

    rollout.sample_group, vlm.group_logps, data.prefetch, run_folder.RunFolder.log = forced, scored, one_after_the_other, log
    train_grpo.main(["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--part", "all", "--out", str(folder / "ours"),
                     "--prompts", str(c["groups"]), "--group-size", str(c["G"]), "--max-new-tokens", str(c["new"]), "--steps", str(steps),
                     "--save-every", "1000000", "--lr", "1e-4"])


def matrix_rate(c: dict) -> float:
    """Operations a second of plain matrix products in the shapes of an update's layers: forward, and the two of backward."""
    import torch
    visual, h = round(c["width"] / 28) * round(c["height"] / 28), c["hidden"]
    n = c["groups"] * (visual + c["text"] + c["G"] * c["new"])
    operations = seconds = 0.0
    for repeat in range(3):                                     # the first one warms up
        for a, b in [(h, h), (h, h), (h, 3 * h), (h, 3 * h), (3 * h, h)]:
            x, w, dy = torch.randn(n, a), torch.randn(b, a), torch.randn(n, b)
            start = time.perf_counter()
            x @ w.T, dy @ w, dy.T @ x
            if repeat:
                operations, seconds = operations + 6 * n * a * b, seconds + time.perf_counter() - start
    return operations / seconds


# ---------------------------------------------------------------- taking turns

@dataclass
class Config:
    configurations: list[str] = opt(list(CONFIGURATIONS), "which to measure: " + "; ".join(f"{k}: {v}" for k, v in ABOUT.items()))
    rounds: int = opt(5, "turns of each that count; one more warms up")
    threads: int = opt(1, "of each")
    out: str = opt("runs/bench-grpo", "folder for the inputs and the report")
    worker: str = opt("", "for the two processes themselves", ["", "ours", "peer"])


class Worker:
    """One of the two processes: `step()` lets it do one step and returns what it reports."""

    def __init__(self, kind: str, name: str, config: Config, rounds: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, "--worker", kind, "--configurations", name, "--rounds", str(rounds), "--out", config.out]
        self.log = Path(config.out) / name / f"{kind}.log"
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(self.log, "wb"), text=True)

    def until(self, sign: str) -> str:
        for line in self.process.stdout:
            if line.startswith(sign):
                return line[len(sign):]
        raise SystemExit(f"{self.log.stem} ended early:\n" + self.log.read_text(errors="replace")[-3000:])

    def step(self) -> dict:
        self.process.stdin.write("go\n"), self.process.stdin.flush()
        return json.loads(self.until("STEP "))


def measure(name: str, config: Config) -> dict[str, list[dict]]:
    folder, rounds = Path(config.out) / name, config.rounds + 1
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder, CONFIGURATIONS[name], rounds)
    workers = {kind: Worker(kind, name, config, rounds) for kind in ("ours", "peer")}
    for worker in workers.values():
        worker.until("ready")
    steps: dict[str, list[dict]] = {kind: [] for kind in workers}
    for turn in tqdm(range(rounds), desc=name):
        for kind, worker in workers.items():
            steps[kind].append(worker.step())
            if turn + 1 < rounds:
                worker.until("ready")
    for worker in workers.values():
        worker.process.stdin.close(), worker.process.wait()
    return {kind: found[1:] for kind, found in steps.items()}


# ---------------------------------------------------------------- the report

def operations(counts: dict, sizes: dict, phase: str | None = None) -> float:
    """Multiply-adds, twice, of weights and tokens, the backward pass at twice the forward; attention's own products are left out."""
    factor = {"rollout": 2, "score": 2, "update": 6}
    parts = {"tokens through the language model": "language", "tokens through feed-forward parts": "feed-forward", "tokens projected": "projection"}
    total = sum(factor[p] * sizes[part] * counts.get(f"{name}, {p}", 0) for name, part in parts.items() for p in PHASES if phase in (None, p))
    return total + (2 * sizes["tower"] * counts.get("tower tokens", 0) if phase is None else 0)


def report(name: str, steps: dict[str, list[dict]], sizes: dict) -> str:
    middle = lambda kind, key: statistics.median(step["seconds"][key] for step in steps[kind])
    last = {kind: found[-1] for kind, found in steps.items()}
    ratio = lambda key: statistics.median(peer["seconds"][key] / ours["seconds"][key] for ours, peer in zip(steps["ours"], steps["peer"]))
    rows = [[f"seconds, {key}", *(f"{middle(kind, key):.2f}" for kind in steps), f"{ratio(key):.2f}"] for key in ("step", *PHASES)]
    rows.append(["peak memory, MiB", *(f"{last[kind]['peak_mib']:.0f}" for kind in steps), f"{last['peer']['peak_mib'] / last['ours']['peak_mib']:.2f}"])
    for key in sorted(last["peer"]["counts"].keys() | last["ours"]["counts"].keys()):
        ours, peer = (last[kind]["counts"].get(key, 0) for kind in ("ours", "peer"))
        rows.append([key, f"{ours:,}", f"{peer:,}", f"{peer / ours:.2f}" if ours else "-"])
    total = {kind: operations(last[kind]["counts"], sizes) for kind in steps}
    rows.append(["operations by these counts, 1e9", *(f"{total[kind] / 1e9:.0f}" for kind in steps), f"{total['peer'] / total['ours']:.2f}"])
    rate = operations(last["ours"]["counts"], sizes, "update") / middle("ours", "update")
    plain = statistics.median(step["matrix_rate"] for step in steps["ours"])
    return (f"### {name}: {ABOUT[name]}\n\n" + markdown(["", "ours", "TRL", "TRL / ours"], rows)
            + f"\n\nOur update runs at {rate / 1e9:.0f} GFLOP/s; plain matrix products of its shapes at {plain / 1e9:.0f}: {rate / plain:.0%}.")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    if unknown := [name for name in config.configurations if name not in CONFIGURATIONS]:
        raise SystemExit(f"--configurations {' '.join(unknown)}: unknown; there are {', '.join(CONFIGURATIONS)}")
    name = config.configurations[0]
    if config.worker:
        c, counts = CONFIGURATIONS[name], Counts()
        counts.install(c["vocab"])
        if config.worker == "ours":
            return run_ours(Path(config.out) / name, c, config.rounds, counts)
        import trl_peer
        return trl_peer.train(Path(config.out) / name, c, config.rounds, counts, wait_for_turn, report_step)
    if not importlib.util.find_spec("trl"):
        raise SystemExit("the peer is not installed: pip install trl==1.16.0")
    texts, found = [], {}
    for name in config.configurations:
        found[name] = measure(name, config)
        texts.append(report(name, found[name], json.loads((Path(config.out) / name / "sizes.json").read_text())))
        print("\n" + texts[-1] + "\n", flush=True)
    write_text(Path(config.out) / "report.md", "\n\n".join(texts) + "\n")
    write_text(Path(config.out) / "report.json", to_json(found, indent=1) + "\n")
    print(f"\nwritten: {config.out}/report.md, report.json")


if __name__ == "__main__":
    main()
