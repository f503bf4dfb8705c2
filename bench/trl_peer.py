"""TRL's GRPOTrainer on a Qwen2.5-VL without torchvision: the other side of bench/grpo.py."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    BatchFeature,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from rr1 import vlm
from rr1.chain import INSTRUCTION
from rr1.files import read_lines

PLACEHOLDER = "<|image_pad|>"


class WithoutVideo(ProcessorMixin):
    """The two halves of a Qwen2.5-VL processor that need no torchvision."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    image_token = PLACEHOLDER

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_id = tokenizer.convert_tokens_to_ids(PLACEHOLDER)

    def __call__(self, images=None, text=None, padding=False, return_tensors=None, **_):
        texts = [text] if isinstance(text, str) else list(text)
        seen = {}
        if images is not None:
            flat = []
            for group in images:
                flat += group if isinstance(group, (list, tuple)) else [group]
            seen = dict(self.image_processor(images=flat, return_tensors="pt"))
            # 2 x 2 patches a token
            counts = iter((seen["image_grid_thw"].prod(-1) // 4).tolist())
            for i, line in enumerate(texts):
                first, *rest = line.split(PLACEHOLDER)
                texts[i] = first + "".join(
                    PLACEHOLDER * next(counts) + piece for piece in rest
                )
        tokens = self.tokenizer(
            texts, padding=padding, return_tensors=return_tensors, add_special_tokens=False
        )
        tokens.pop("token_type_ids", None)
        if images is not None:
            rows = [
                [int(i == self.image_token_id) for i in row] for row in tokens["input_ids"]
            ]
            is_tensor = torch.is_tensor(tokens["input_ids"])
            tokens["mm_token_type_ids"] = torch.tensor(rows) if is_tensor else rows
        return BatchFeature(dict(tokens) | seen)


def rows(folder: Path) -> list[dict]:
    """What bench/grpo.py wrote, in TRL's form."""
    found = []
    for record in read_lines(folder / "train.jsonl"):
        question = record["conversations"][0]["value"].removeprefix("<image>")
        turn = {"role": "user", "content": question + "\n" + INSTRUCTION}
        image = Image.open(folder / record["image"]).convert("RGB")
        found.append({"prompt": [turn], "image": image})
    return found


def train(
    folder: Path, c, steps: int, counts, wait_for_turn: Callable, report_step: Callable
) -> None:
    """`steps` steps of TRL; bench/grpo.py says when, and what to count."""
    seconds: dict[str, float] = {}

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            wait_for_turn()
            seconds.clear()
            counts.phase, self.start = "rollout", time.perf_counter()

        def on_step_end(self, *_, **__):
            step = time.perf_counter() - self.start
            seconds["update"] = step - seconds["rollout"] - seconds["score"]
            report_step(counts, seconds | {"step": step})

    class Peer(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate(*args, **kwargs)
            seconds["rollout"], counts.phase = time.perf_counter() - start, "score"
            return out

        def _get_per_token_logps_and_entropies(
            self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        ):
            training = torch.is_grad_enabled()
            counts.phase = "update" if training else "score"
            # its fused projection passes no Linear
            counts[f"tokens projected, {counts.phase}"] += len(input_ids) * logits_to_keep
            start = time.perf_counter()
            out = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
            if not training:
                seconds["score"] = seconds.get("score", 0.0) + time.perf_counter() - start
                counts.phase = "update"
            return out

    def distinct_letters(completions, **_):
        return [float(len(set(turn[0]["content"]))) for turn in completions]

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32
    )
    model.model.visual.requires_grad_(False)
    ours = vlm.Processor.from_pretrained(str(folder / "model"))
    template = ours.tokenizer.chat_template
    arguments = GRPOConfig(
        output_dir=str(folder / "peer"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        num_generations=c.G,
        per_device_train_batch_size=c.G,
        max_completion_length=c.new,
        generation_kwargs={"min_new_tokens": c.new},
        beta=0.04,
        loss_type="grpo",
        learning_rate=1e-4,
        max_steps=steps,
        logging_steps=1000,
        gradient_checkpointing=False,
        use_bias_correction_kl=False,
        shuffle_dataset=False,
        seed=0,
    )
    Peer(
        model=model,
        reward_funcs=distinct_letters,
        args=arguments,
        train_dataset=Dataset.from_list(rows(folder)),
        callbacks=[Turns()],
        processing_class=WithoutVideo(ours.image_processor, ours.tokenizer, template),
    ).train()
