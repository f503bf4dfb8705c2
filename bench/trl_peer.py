"""TRL's GRPOTrainer on a Qwen2.5-VL without torchvision: the other side of bench/grpo.py."""
from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Callable

import torch
from datasets import Dataset
from PIL import Image
from transformers import BatchFeature, ProcessorMixin, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rr1 import vlm
from rr1.chain import INSTRUCTION


def train(folder: Path, c: dict, steps: int, counts, wait_for_turn: Callable, report_step: Callable) -> None:
    """`steps` steps of TRL on what `bench/grpo.py` wrote; it says when, and what to count."""
    seconds = {}
    ours = vlm.Processor.from_pretrained(str(folder / "model"))

    class WithoutVideo(ProcessorMixin):
        """The two halves of a Qwen2.5-VL processor that need no torchvision."""
        attributes, image_processor_class = ["image_processor", "tokenizer"], "AutoImageProcessor"
        tokenizer_class, image_token, image_token_id = "AutoTokenizer", "<|image_pad|>", ours.image_token_id

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

        def __call__(self, images=None, text=None, padding=False, return_tensors=None, **_):
            texts, extra = [text] if isinstance(text, str) else list(text), {}
            if images is not None:
                flat = [image for group in images for image in (group if isinstance(group, (list, tuple)) else [group])]
                extra = dict(self.image_processor(images=flat, return_tensors="pt"))
                sizes = iter(ours.visual_tokens(extra["image_grid_thw"]))
                texts = ["".join(self.image_token * next(sizes) if piece == self.image_token else piece
                                 for piece in re.split(f"({re.escape(self.image_token)})", line)) for line in texts]
            tokens = dict(self.tokenizer(texts, padding=padding, return_tensors=return_tensors, add_special_tokens=False))
            tokens.pop("token_type_ids", None)
            if images is not None:
                ids = tokens["input_ids"]
                tokens["mm_token_type_ids"] = ((ids == self.image_token_id).long() if torch.is_tensor(ids)
                                               else [[int(i == self.image_token_id) for i in row] for row in ids])
            return BatchFeature(tokens | extra)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            wait_for_turn()
            seconds.clear()
            counts.phase, self.start = "rollout", time.perf_counter()

        def on_step_end(self, *_, **__):
            took = time.perf_counter() - self.start
            seconds["update"] = took - seconds["rollout"] - seconds["score"]
            report_step(counts, seconds | {"step": took})

    class Peer(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate(*args, **kwargs)
            seconds["rollout"], counts.phase = time.perf_counter() - start, "score"
            return out

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
            counts.phase = "update" if torch.is_grad_enabled() else "score"
            counts[f"tokens projected, {counts.phase}"] += len(input_ids) * logits_to_keep       # its fused projection passes no Linear
            start = time.perf_counter()
            out = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            if not torch.is_grad_enabled():
                seconds["score"], counts.phase = seconds.get("score", 0.0) + time.perf_counter() - start, "update"
            return out

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    rows = []
    for line in (folder / "train.jsonl").read_text().splitlines():
        record = json.loads(line)
        with Image.open(folder / record["image"]) as image:
            text = record["conversations"][0]["value"].removeprefix("<image>") + "\n" + INSTRUCTION
            rows.append({"prompt": [{"role": "user", "content": text}], "image": image.convert("RGB")})
    arguments = GRPOConfig(
        output_dir=str(folder / "peer"), use_cpu=True, bf16=False, fp16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        num_generations=c["G"], per_device_train_batch_size=c["G"] * c["groups"], gradient_accumulation_steps=1, num_iterations=1,
        max_completion_length=c["new"], generation_kwargs={"min_new_tokens": c["new"]}, beta=0.04, loss_type="grpo", scale_rewards="group",
        epsilon=0.2, learning_rate=1e-4, max_steps=steps, logging_steps=1000, temperature=1.0, gradient_checkpointing=False,
        use_bias_correction_kl=False, dataloader_num_workers=0, shuffle_dataset=False, seed=0)
    lengths = lambda completions, **_: [float(len(set(turn[0]["content"]))) for turn in completions]
    Peer(model=model, reward_funcs=lengths, args=arguments, train_dataset=Dataset.from_list(rows), callbacks=[Turns()],
         processing_class=WithoutVideo(ours.image_processor, ours.tokenizer, chat_template=ours.tokenizer.chat_template)).train()
