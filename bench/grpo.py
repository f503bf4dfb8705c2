"""How long does a GRPO step take, beside TRL's on the same model, pictures and prompts?

    pip install trl==1.16.0                     # the peer; nothing else in the repository needs it
    python bench/grpo.py                        # one thread; writes runs/bench-grpo/report.md
    python bench/grpo.py --configurations photo photo-G4 photo-G16 --rounds 7

Three processes stand side by side: `train_grpo.main` without rr1/fast.py ("plain") and with it
("fast"), and `trl.GRPOTrainer.train`. They take turns, step by step, so that whatever slows the
machine slows all; ratios are medians over turns. The first turn of each warms up and does not
count. All sample the same number of new tokens (the end of turn is suppressed), keep a reference
(beta 0.04), freeze the vision tower and do one AdamW update. Counters on the model's own classes
say what each computed. Memory is the peak of each process.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)

import train_grpo
from rr1 import data, fast, rollout, run_folder, runtime, tiny, vlm
from rr1.evaluation.statistics import markdown
from rr1.files import write_json, write_text
from rr1.runtime import opt

KINDS = ("plain", "fast", "peer")
PHASES = ("rollout", "score", "update")


@dataclass
class Setting:
    """Sizes of a model and of its work."""

    about: str
    G: int = 8
    groups: int = 1
    width: int = 640
    height: int = 480
    text: int = 150  # tokens of the prompt beside the picture's
    new: int = 128  # tokens of a response
    hidden: int = 256
    head: int = 64
    layers: int = 6
    vocab: int = 4096


CONFIGURATIONS = {
    "photo": Setting("a 640 x 480 photo, 150 tokens of text, 128 new tokens, G 8"),
    "photo-G4": Setting("the same, G 4", G=4),
    "photo-G16": Setting("the same, G 16", G=16),
    "tiny": Setting(
        "the default run's sizes: 16 groups of 8, 64 new tokens",
        groups=16,
        width=112,
        height=112,
        text=40,
        new=64,
        hidden=192,
        head=48,
        vocab=710,
    ),
}


@dataclass
class Config:
    configurations: list[str] = opt(
        list(CONFIGURATIONS), "what to measure", list(CONFIGURATIONS)
    )
    rounds: int = opt(5, "turns of each that count; one more warms up")
    threads: int = opt(1, "of each process")
    out: str = opt("runs/bench-grpo", "folder for the inputs and the report")
    worker: str = opt("", "for the processes themselves", ["", *KINDS])


# ---------------------------------------------------------------- what all are given


def write_inputs(folder: Path, c: Setting, steps: int) -> None:
    """A random model and, for each step, its groups' pictures and prompts, as an ordinary
    checkpoint and data set."""
    torch.manual_seed(0)
    pixels = c.width * c.height
    processor = vlm.Processor.from_pretrained(tiny.BASE, min_pixels=784, max_pixels=pixels)
    config = Qwen2_5_VLConfig.from_pretrained(tiny.BASE)
    section = [c.head // 8, c.head * 3 // 16, c.head * 3 // 16]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
    config.text_config.update(
        {
            "hidden_size": c.hidden,
            "intermediate_size": 3 * c.hidden,
            "num_hidden_layers": c.layers,
            "vocab_size": c.vocab,
            "num_attention_heads": c.hidden // c.head,
            "layer_types": ["full_attention"] * c.layers,
            "rope_parameters": rope,
        }
    )
    config.vision_config.out_hidden_size = c.hidden
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = processor.end_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")

    question = "what"
    while len(processor.tokenizer(question)["input_ids"]) < c.text:
        question += " is the color"
    turns = [
        {"from": "human", "value": "<image>" + question},
        {"from": "gpt", "value": "<TYPE>noise(0.5)<TYPE_END>"},
    ]
    rng, lines = np.random.default_rng(0), []
    for i in range(steps * c.groups):
        noise = rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        lines.append(
            {"id": str(i), "image": f"{i}.png", "length": 60, "conversations": turns}
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---------------------------------------------------------------- counting


class Counts(Counter):
    """Tokens and pictures that go through the model's parts, by phase; `phase` is set by who runs
    the step."""

    phase = "rollout"

    def install(self, vocab: int) -> None:
        def tower(this, patches, grid_thw, *_, **__):
            self["images through the vision tower"] += len(grid_thw)

        def language(this, *_, inputs_embeds, past_key_values=None, **__):
            n = inputs_embeds.shape[:2].numel()
            if past_key_values is not None and not past_key_values.get_seq_length():
                self["prompt tokens prefilled"] += n
            self[f"tokens through the language model, {self.phase}"] += n

        def fast_step(model, embeddings, *_):
            language(model, inputs_embeds=embeddings)

        def project(this, hidden):
            if this.out_features == vocab:
                self[f"tokens projected, {self.phase}"] += hidden.shape[:-1].numel()

        def preprocess(this, images, *_, **__):
            self["images preprocessed"] += (
                len(images) if isinstance(images, (list, tuple)) else 1
            )

        before(modeling.Qwen2_5_VisionTransformerPretrainedModel, "forward", tower)
        before(modeling.Qwen2_5_VLTextModel, "forward", language)
        before(fast, "decoding_step", fast_step)
        before(torch.nn.Linear, "forward", project)
        before(Qwen2VLImageProcessorPil, "preprocess", preprocess)


def before(owner, name: str, count: Callable) -> None:
    """Let `count` see what the function is given, before it runs."""
    original = getattr(owner, name)

    def counted(*args, **options):
        count(*args, **options)
        return original(*args, **options)

    setattr(owner, name, counted)


def wait_for_turn() -> None:
    print("ready", flush=True)
    if not sys.stdin.readline():
        raise SystemExit


def report_step(counts: Counts, seconds: dict[str, float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step = {"seconds": seconds, "counts": dict(counts), "peak_mib": peak}
    print("STEP " + json.dumps(step), flush=True)
    counts.clear()


# ---------------------------------------------------------------- ours


def run_ours(kind: str, folder: Path, c: Setting, steps: int, counts: Counts) -> None:
    seconds: dict[str, float] = {}
    sample, group_logps = rollout.sample_group, vlm.group_logps

    def never_ending(*args, end_id, banned, **options):
        groups = sample(*args, end_id=end_id, banned=[*banned, end_id], **options)
        counts.phase = "score"
        return groups

    def scored(*args, **options):
        counts.phase = "update" if torch.is_grad_enabled() else "score"
        return group_logps(*args, **options)

    def one_after_the_other(make, numbers, workers):  # a step pays for its own pictures
        for number in numbers:
            wait_for_turn()
            counts.phase, start = "rollout", time.perf_counter()
            yield number, make(number)
            report_step(counts, seconds | {"step": time.perf_counter() - start})

    def log(self, step, metrics, line=None):
        for phase in PHASES:
            seconds[phase] = metrics[f"seconds/{phase}"]

    rollout.sample_group = never_ending
    vlm.group_logps = scored
    data.prefetch = one_after_the_other
    run_folder.RunFolder.log = log
    options = f"--part all --prompts {c.groups} --group-size {c.G} --max-new-tokens {c.new}".split()
    options += f"--steps {steps} --save-every 1000000 --lr 1e-4".split()
    model, records, out = folder / "model", folder / "train.jsonl", folder / kind
    train_grpo.main(
        ["--model", f"{model}", "--data", f"{records}", "--out", f"{out}", *options]
    )


# ---------------------------------------------------------------- taking turns


class Worker:
    """One of the processes: `step()` lets it do one step and returns what it reports."""

    def __init__(self, kind: str, name: str, config: Config):
        own = {"OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--worker", kind, "--configurations", name]
        command += ["--rounds", str(config.rounds), "--out", config.out]
        self.log = Path(config.out) / name / f"{kind}.log"
        self.process = subprocess.Popen(
            command,
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.log, "wb"),
            text=True,
        )

    def until(self, sign: str) -> str:
        for line in self.process.stdout:
            if line.startswith(sign):
                return line[len(sign) :]
        said = self.log.read_text(errors="replace")
        raise SystemExit(f"{self.log.stem} ended early:\n{said[-3000:]}")

    def step(self) -> dict:
        self.until("ready")
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self.until("STEP "))


def measure(name: str, config: Config) -> dict[str, list[dict]]:
    folder = Path(config.out) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder, CONFIGURATIONS[name], config.rounds + 1)
    workers = {kind: Worker(kind, name, config) for kind in KINDS}
    steps: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for _ in tqdm(range(config.rounds + 1), desc=name):
        for kind, worker in workers.items():
            steps[kind].append(worker.step())
    for worker in workers.values():
        worker.process.communicate()
    return {kind: found[1:] for kind, found in steps.items()}


def report(name: str, steps: dict[str, list[dict]]) -> str:
    """Medians over turns of the seconds and of the ratios to the peer's; counts of a step."""
    rows = []
    for key in ("step", *PHASES):
        seconds = [
            [step["seconds"][key] for step in steps[kind]] for kind in KINDS
        ]  # by turn
        ratios = [np.divide(seconds[-1], own) for own in seconds[:-1]]
        cells = [f"{statistics.median(values):.2f}" for values in [*seconds, *ratios]]
        rows.append([f"seconds, {key}", *cells])
    last = [steps[kind][-1] for kind in KINDS]
    names = sorted(last[-1]["counts"])
    totals = {"peak memory, MiB": [step["peak_mib"] for step in last]}
    totals |= {key: [step["counts"].get(key, 0) for step in last] for key in names}
    for key, values in totals.items():
        cells = [f"{value:,.0f}" for value in values]
        cells += [f"{values[-1] / max(own, 1):.2f}" for own in values[:-1]]
        rows.append([key, *cells])
    header = ["", "plain", "with fast.py", "TRL", "TRL / plain", "TRL / fast.py"]
    return f"**{name}: {CONFIGURATIONS[name].about}**\n\n{markdown(header, rows)}"


def work(config: Config) -> None:
    """What a worker process does."""
    name = config.configurations[0]
    folder, c, counts = Path(config.out) / name, CONFIGURATIONS[name], Counts()
    counts.install(c.vocab)
    if config.worker == "peer":
        import trl_peer

        trl_peer.train(folder, c, config.rounds + 1, counts, wait_for_turn, report_step)
        return
    if config.worker == "plain":
        fast.enable = lambda model: None
    run_ours(config.worker, folder, c, config.rounds + 1, counts)


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    if config.worker:
        return work(config)
    if not importlib.util.find_spec("trl"):
        raise SystemExit("the peer is not installed: pip install trl==1.16.0")
    out, texts, found = Path(config.out), [], {}
    for name in config.configurations:
        found[name] = measure(name, config)
        texts.append(report(name, found[name]))
        print(f"\n{texts[-1]}\n", flush=True)
    write_text(out / "report.md", "\n\n".join(texts) + "\n")
    write_json(out / "report.json", found)
    print(f"\nwritten: {config.out}/report.md, report.json")


if __name__ == "__main__":
    main()
