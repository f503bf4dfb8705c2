"""How long does a GRPO step take, beside TRL's on the same model, pictures and prompts?

    pip install trl==1.16.0                     # the peer; nothing else in the repository needs it
    python bench/grpo.py --rounds 7             # one thread; writes runs/bench-grpo/report.md

Three processes stand side by side: `train_grpo.main` without rr1/fast.py ("plain") and with it
("fast"), and `trl.GRPOTrainer.train`. They take turns, step by step, so that whatever slows the
machine slows all; ratios are medians over turns. The first turn of each warms up and does not
count. All sample the same number of new tokens (the end of turn is suppressed), keep a reference
(beta 0.04), freeze the vision tower and do one AdamW update. Counters on the model's own classes
say what each computed. Memory is the peak of each process.
"""

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
from rr1.files import lines_of, write_text
from rr1.runtime import opt

KINDS = ("plain", "fast", "peer")
PHASES = ("rollout", "score", "update")


@dataclass
class Setting:
    """Sizes of a model and of its work: one group a step."""

    G: int = 8
    width: int = 640
    height: int = 480
    text: int = 150  # tokens of the prompt beside the picture's
    new: int = 128  # tokens of a response
    hidden: int = 256
    head: int = 64
    layers: int = 6
    vocab: int = 4096


PHOTO = Setting()


@dataclass
class Config:
    rounds: int = opt(5, "turns of each that count; one more warms up", low=1)
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
    for i in range(steps):
        noise = rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "length": 60, "conversations": turns})
    write_text(folder / "train.jsonl", lines_of(lines))


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
    options = f"--part all --prompts 1 --group-size {c.G} --max-new-tokens {c.new}"
    options += f" --steps {steps} --save-every 0 --lr 1e-4"
    options += f" --model {folder}/model --data {folder}/train.jsonl --out {folder}/{kind}"
    train_grpo.main(options.split())


# ---------------------------------------------------------------- taking turns


class Worker:
    """One of the processes: `step()` lets it do one step and returns what it reports."""

    def __init__(self, kind: str, config: Config):
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--worker", kind, "--out", config.out]
        command += ["--rounds", str(config.rounds)]
        self.log = Path(config.out) / f"{kind}.log"
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


def measure(config: Config) -> dict[str, list[dict]]:
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        shutil.rmtree(folder / kind, ignore_errors=True)
    write_inputs(folder, PHOTO, config.rounds + 1)
    workers = {kind: Worker(kind, config) for kind in KINDS}
    steps: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for _ in tqdm(range(config.rounds + 1)):
        for kind, worker in workers.items():
            steps[kind].append(worker.step())
    for worker in workers.values():
        worker.process.communicate()
    return {kind: found[1:] for kind, found in steps.items()}


def report(steps: dict[str, list[dict]]) -> str:
    """Medians over turns of the seconds and of the ratios to the peer's; counts of a step."""
    rows = []
    for key in ("step", *PHASES):
        # by turn
        seconds = [[step["seconds"][key] for step in steps[kind]] for kind in KINDS]
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
    return f"{PHOTO}\n\n{markdown(header, rows)}"


def work(config: Config) -> None:
    """What a worker process does."""
    folder, counts, steps = Path(config.out), Counts(), config.rounds + 1
    counts.install(PHOTO.vocab)
    if config.worker == "peer":
        import trl_peer

        trl_peer.train(folder, PHOTO, steps, counts, wait_for_turn, report_step)
        return
    if config.worker == "plain":
        fast.enable = lambda model: None
    run_ours(config.worker, folder, PHOTO, steps, counts)


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    if config.worker:
        return work(config)
    if not importlib.util.find_spec("trl"):
        raise SystemExit("the peer is not installed: pip install trl==1.16.0")
    text = report(measure(config))
    write_text(Path(config.out) / "report.md", text + "\n")
    print(f"\n{text}\n\nwritten: {config.out}/report.md")


if __name__ == "__main__":
    main()
