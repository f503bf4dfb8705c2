"""Qwen2.5-VL as this project uses it, Eq. (1): load, freeze, encode an image once, score.

Shapes: B prompts, G responses each, P prompt tokens, L response tokens, H hidden size, V
vocabulary; packed rows of N columns hold T response tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.utils import logging

from rr1.chain import IMAGE

IMAGE_PAD = "<|image_pad|>"
# Tokens that stand for pixels or frame them, or begin a turn. A policy that wrote one would break
# its own next forward pass, so none is sampled.
NEVER_SAMPLED = """
    <|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|>
    <|im_start|> <|endoftext|>
""".split()

PROMPT, NOBODY = -1, -2  # owners of a column, beside the responses 0 .. G - 1
PACK_FROM = 1.3  # groups are packed where that saves at least this factor of the tokens
# with 151,936 tokens to choose from: 110 at a time, 64 MB in float32
LOGITS_AT_ONCE = 2**24

Groups = Sequence[Sequence[Sequence[int]]]  # B groups of G responses of L token ids


class Processor:
    """Tokenizer and image processor, loaded apart: together they would ask for torchvision."""

    def __init__(self, tokenizer, image_processor):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        vocabulary = tokenizer.get_vocab()
        self.image_token_id = vocabulary[IMAGE_PAD]
        self.end_id = vocabulary["<|im_end|>"]
        self.banned_ids = [
            vocabulary[token] for token in NEVER_SAMPLED if token in vocabulary
        ]

    @classmethod
    def from_pretrained(cls, name_or_path: str, **image_options) -> Processor:
        """image_options: `min_pixels` and `max_pixels`, height x width after resizing; 0 or None
        leaves the checkpoint's own. They are saved with the processor."""
        given = {name: value for name, value in image_options.items() if value}
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name_or_path, **given)
        least = image_processor.size["shortest_edge"]
        most = image_processor.size["longest_edge"]
        if least > most:
            raise SystemExit(
                f"--model {name_or_path}: at least {least} and at most {most} pixels contradict "
                "each other: give both --min-pixels and --max-pixels"
            )
        return cls(AutoTokenizer.from_pretrained(name_or_path), image_processor)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """-> (patches, patch size) floats and the (images, 3) grid: time, height, width."""
        out = self.image_processor(images=list(images), return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def visual_tokens(self, grid_thw: Tensor) -> list[int]:
        """Tokens that the language model sees of each image: merge_size^2 patches make one."""
        return (grid_thw.prod(-1) // self.image_processor.merge_size**2).tolist()

    @property
    def pixels_per_token(self) -> int:
        return (self.image_processor.patch_size * self.image_processor.merge_size) ** 2

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens of a picture of this size; ValueError for one far too long and narrow."""
        patches = self.image_processor.get_number_of_image_patches(height, width)
        return patches // self.image_processor.merge_size**2

    def prompt_ids(self, text: str, visual_tokens: Sequence[int]) -> list[int]:
        """Token ids of one user turn, X_d (+) P of Eq. (1), and the assistant's header.

        The images come first. Several images stand where the text says <image>, if it says so
        once for each of them.
        """
        n = len(visual_tokens)
        pieces = text.split(IMAGE)
        if n < 2 or len(pieces) != n + 1:
            pieces = [""] * n + [text]
        content = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            content += [{"type": "image"}, {"type": "text", "text": piece}]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
        )
        expanded, *rest = rendered.split(IMAGE_PAD)
        if len(rest) != n:
            raise ValueError(
                f"{len(rest)} image placeholders for {n} images: "
                f"the text must not spell {IMAGE_PAD}; got {text!r}"
            )
        for tokens, piece in zip(visual_tokens, rest):
            expanded += IMAGE_PAD * tokens + piece
        return self.tokenizer(expanded, add_special_tokens=False)["input_ids"]

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a response and its end-of-turn token, which is trained and sampled too."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.image_token_id in ids:
            raise ValueError(f"a response must not spell {IMAGE_PAD}: it stands for pixels")
        return [*ids, self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load(
    name_or_path: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **image_options,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Processor]:
    """The model and its processor from a folder or a hub id; weights only as safetensors.

    On the device "meta" only the configuration is read: a model of shapes, for `shard.shard`.
    Anything but a whole Qwen2.5-VL is an error.
    """
    logging.disable_progress_bar()  # of transformers: a line for every save and load
    Model = Qwen2_5_VLForConditionalGeneration
    try:
        config = read_config(name_or_path)
        processor = Processor.from_pretrained(name_or_path, **image_options)
        if device == "meta":
            with torch.device("meta"):
                model = Model._from_config(config, dtype=dtype).eval()
        else:
            model, found = Model.from_pretrained(
                name_or_path, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            model.to(device)
            if found["missing_keys"] or found["unexpected_keys"]:
                raise SystemExit(
                    f"--model {name_or_path}: its weights are not those of its config.json: "
                    f"missing {sorted(found['missing_keys'])}, "
                    f"unexpected {sorted(found['unexpected_keys'])}"
                )
    except OSError as error:
        raise SystemExit(
            f"--model {name_or_path}: neither a checkpoint folder nor a model that can be "
            f"downloaded: {error}"
        ) from error
    # the embedding is padded: ids that the tokenizer does not have mean nothing
    processor.banned_ids += range(len(processor.tokenizer), config.text_config.vocab_size)
    return model, processor


def read_config(name_or_path: str) -> Qwen2_5_VLConfig:
    """The configuration of a checkpoint that this code can sample from and score."""
    kind = Qwen2_5_VLConfig.get_config_dict(name_or_path)[0].get("model_type")
    if kind != "qwen2_5_vl":
        raise SystemExit(f"--model {name_or_path}: this is a {kind}, not a qwen2_5_vl")
    config = Qwen2_5_VLConfig.from_pretrained(name_or_path)
    if "sliding_attention" in config.text_config.layer_types:
        raise SystemExit(
            f"--model {name_or_path}: it attends to a sliding window, which sampling and scoring "
            'do not: set "use_sliding_window" to false in its config.json if it works without'
        )
    return config


def freeze_vision(model) -> None:
    """Freeze the vision tower and its merger: section 5, Training Configuration."""
    model.model.visual.requires_grad_(False)


def count_parameters(model) -> str:
    sizes = {True: 0, False: 0}
    for p in model.parameters():
        sizes[p.requires_grad] += p.numel()
    return f"trainable {sizes[True]:,}, frozen {sizes[False]:,}"


def encode_images(model, pixel_values: Tensor, grid_thw: Tensor) -> list[Tensor]:
    """Run the vision tower once -> one (visual tokens, H) tensor an image, which sampling, the
    reference and the policy share. Without gradient where the tower is frozen."""
    visual = model.model.visual
    patches = pixel_values.to(visual.device, visual.dtype)
    features = visual(patches, grid_thw=grid_thw.to(visual.device)).pooler_output
    sizes = grid_thw.prod(-1) // visual.spatial_merge_size**2
    return list(features.split(sizes.tolist()))


@dataclass
class Prompt:
    """One prompt, ready for the language model."""

    ids: Tensor  # (P,)
    positions: Tensor  # (3, P), M-RoPE: time, row, column
    features: Tensor  # (visual tokens, H)

    @property
    def next_position(self) -> int:
        """Where the first response token stands: one past the largest position of the prompt."""
        return int(self.positions.max()) + 1


def make_prompt(
    model, ids: Sequence[int], grid_thw: Tensor, features: Sequence[Tensor]
) -> Prompt:
    """ids: P tokens, image placeholders expanded; grid_thw (images, 3); features: one an image."""
    device = model.device
    ids = torch.tensor(ids, device=device)
    is_image = ids == model.config.image_token_id
    no_image = torch.zeros(0, model.config.text_config.hidden_size, device=device)
    features = torch.cat(list(features) or [no_image])
    expected = int(is_image.sum())
    if expected != len(features):
        raise ValueError(
            f"the prompt holds {expected} image tokens, the images give "
            f"{len(features)}: was the prompt cut? Prompts are never truncated here; raise the "
            "limit or shrink the image"
        )
    positions, _ = model.model.get_rope_index(
        ids[None],
        is_image[None].int(),
        image_grid_thw=grid_thw.to(device) if len(grid_thw) else None,
    )
    return Prompt(ids, positions[:, 0], features)


def embed(model, ids: Tensor, features: Tensor) -> Tensor:
    """Token embeddings (.., H) with the image features, in order, at the image placeholders."""
    embeddings = model.get_input_embeddings()(ids)
    at_image = (ids == model.config.image_token_id)[..., None]
    return embeddings.masked_scatter(at_image, features.to(embeddings.dtype))


def scale_logits(
    logits: Tensor, temperature: float = 1.0, banned: Sequence[int] = ()
) -> Tensor:
    """(.., V) logits -> the policy's own, in at least float32: banned ids are impossible, the rest
    is divided by the temperature. Sampling and scoring both go through here, so that they speak of
    the same distribution."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    penalty = torch.zeros(logits.shape[-1], dtype=dtype, device=logits.device)
    penalty[list(banned)] = float("-inf")
    return torch.add(penalty, logits, alpha=1 / temperature)


def token_logps(
    model,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states (T, H) and the tokens (T,) that follow them -> their log-probabilities (T,)
    and, where asked, the entropies (T,) without gradient.

    No more than LOGITS_AT_ONCE logits exist at a time: where there would be more they are made in
    chunks, and a chunk is thrown away and computed again in the backward pass.
    """

    def chunk(hidden, targets):
        logps = scale_logits(model.lm_head(hidden), temperature, banned).log_softmax(-1)
        entropy = None
        if with_entropy:
            p = logps.detach().exp()
            entropy = -(p * logps.detach()).nansum(-1)  # 0 log 0 is nan, and counts as 0
        return logps.gather(-1, targets[:, None])[:, 0], entropy

    size = max(1, LOGITS_AT_ONCE // model.config.text_config.vocab_size)
    if len(hidden) <= size:
        return chunk(hidden, targets)
    parts = zip(hidden.split(size), targets.split(size))
    logps, entropies = zip(
        *[checkpoint(chunk, *part, use_reentrant=False) for part in parts]
    )
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


@dataclass
class Packed:
    """Groups as rows [prompt, response 1 .. response G], padded on the right."""

    ids: Tensor  # (B, N)
    positions: Tensor  # (3, B, N); each response starts where the prompt ended
    owner: Tensor  # (B, N): PROMPT, the response's number in its group, NOBODY for padding
    predicted_at: tuple[Tensor, Tensor]  # row and column, (T,) each
    targets: Tensor  # (T,) the response tokens, one response after the other
    lengths: list[int]  # how many of them each response has


def pack(prompts: Sequence[Prompt], responses: Groups) -> Packed:
    """One row a group. A response's first token is predicted where the prompt ends, every other
    token at the one before it."""
    rows, positions, owners = [], [], []
    for prompt, group in zip(prompts, responses, strict=True):
        ids, owner, steps = [], [PROMPT] * len(prompt.ids), []
        for number, response in enumerate(group):
            ids += response
            owner += [number] * len(response)
            steps += range(len(response))
        row = [prompt.ids, prompt.ids.new_tensor(ids)]
        after = prompt.next_position + prompt.ids.new_tensor(steps).expand(3, -1)
        rows.append(torch.cat(row))
        positions.append(torch.cat([prompt.positions, after], dim=1).T)
        owners.append(prompt.ids.new_tensor(owner))
    ids = pad_sequence(rows, batch_first=True)
    positions = pad_sequence(positions, batch_first=True).permute(2, 0, 1)
    owner = pad_sequence(owners, batch_first=True, padding_value=NOBODY)

    row, column = (owner >= 0).nonzero(as_tuple=True)  # of the response tokens, (T,) each
    is_first = owner[row, column] != owner[row, column - 1]
    prompt_end = (owner == PROMPT).sum(1) - 1  # (B,)
    predicted_at = row, torch.where(is_first, prompt_end[row], column - 1)
    lengths = [len(response) for group in responses for response in group]
    return Packed(ids, positions, owner, predicted_at, ids[row, column], lengths)


def attention_mask(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """The rule of a packed row: a token looks at the prompt and at its own response, causally.
    Owners (B, N) -> (B, 1, N, N), added to the scores: 0 where a token may look, else -inf."""
    looking, looked_at = owner[:, :, None], owner[:, None, :]
    visible = ((looked_at == PROMPT) | (looked_at == looking)).tril()
    return torch.where(visible, 0.0, float("-inf")).to(dtype)[:, None]


def token_ratio(prompts: Sequence[Prompt], responses: Groups) -> float:
    """How many times fewer tokens packed rows have, padding included: about
    G (P + L) / (P + G L)."""
    packed, separate = [], []
    for prompt, group in zip(prompts, responses):
        packed.append(len(prompt.ids) + sum(map(len, group)))
        separate += [len(prompt.ids) + len(response) for response in group]
    return len(separate) * max(separate) / (len(packed) * max(packed))


def group_logps(
    model,
    prompts: Sequence[Prompt],
    responses: Groups,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log pi(response | image, prompt), token by token, for B groups of responses.

    Each group is one packed row, which gives what G separate rows [prompt, response] give, and
    computes the prompt once (docs/learn/sharing.md). Where that saves little (`token_ratio` under
    PACK_FROM) the rows are separate.
    -> logps (R, L), mask (R, L), and entropies (R, L) without gradient where asked; R is all
    responses in order, padded on the right with 0.
    """
    if token_ratio(prompts, responses) < PACK_FROM:
        prompts = [prompt for prompt, group in zip(prompts, responses) for _ in group]
        responses = [[response] for group in responses for response in group]
    packed = pack(prompts, responses)
    embeddings = embed(
        model, packed.ids, torch.cat([prompt.features for prompt in prompts])
    )
    attention = None  # one response a row: causal
    if len(packed.lengths) > len(prompts):
        make_mask = getattr(model, "fast_mask", attention_mask)  # see rr1/fast.py
        attention = make_mask(packed.owner, embeddings.dtype)
    out = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=attention,
        position_ids=packed.positions,
        use_cache=False,
    )
    hidden = out.last_hidden_state[packed.predicted_at]  # (T, H)
    logps, entropy = token_logps(
        model, hidden, packed.targets, temperature, banned, with_entropy
    )

    def by_response(values):  # (T,) -> (R, L)
        return pad_sequence(values.split(packed.lengths), batch_first=True)

    mask = by_response(torch.ones_like(logps))
    if with_entropy:
        entropy = by_response(entropy)
    return by_response(logps), mask, entropy
