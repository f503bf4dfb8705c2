"""Qwen2.5-VL as this project uses it, Eq. (1): load, freeze, encode an image once, score responses.

Shapes: B prompts, G responses each, P prompt tokens, L response tokens, H hidden size, V vocabulary.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

from rr1.branches import Branches, block_mask
from rr1.chain import IMAGE

# Tokens that stand for pixels or frame them. A policy that emits one breaks its own next forward pass, so none is sampled.
VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                 "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>")

FEW_ROWS = 8                         # see `Wide`; with 12 there is nothing to gain
PACK_FROM = 1.3                      # groups are packed where that saves at least this factor of the tokens
LOGITS_AT_ONCE = 2**24               # a vocabulary of 151,936 is projected to in chunks of 110 tokens, 64 MB in float32


class Processor:
    """Tokenizer and image processor, loaded apart: together they would ask for torchvision."""

    def __init__(self, tokenizer, image_processor):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id, self.end_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|im_end|>"])
        present = tokenizer.get_vocab()
        self.banned_ids = [present[t] for t in VISION_TOKENS + ("<|im_start|>", "<|endoftext|>") if t in present]

    @classmethod
    def from_pretrained(cls, name_or_path: str, **image_options) -> "Processor":
        """image_options: `min_pixels`, `max_pixels` (height x width after resizing), where the checkpoint's own will not do; 0 or None: its
        own. They are saved with the processor."""
        given = {name: value for name, value in image_options.items() if value}
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name_or_path, **given)
        least, most = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
        if least > most:
            raise SystemExit(f"--model {name_or_path}: at least {least} and at most {most} pixels contradict each other: "
                             "give both --min-pixels and --max-pixels")
        return cls(AutoTokenizer.from_pretrained(name_or_path), image_processor)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def pixels(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (patches, patch size) floats and the (image, 3) grid of patches: time, height, width."""
        out = self.image_processor(images=list(images), return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def visual_tokens(self, grid_thw: torch.Tensor) -> list[int]:
        """Tokens that the language model sees of each image: merge_size^2 patches make one."""
        return (grid_thw.prod(-1) // self.image_processor.merge_size ** 2).tolist()

    @property
    def pixels_per_token(self) -> int:
        return (self.image_processor.patch_size * self.image_processor.merge_size) ** 2

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens that the language model would see of a picture of this size; ValueError for one far too long and narrow."""
        return self.image_processor.get_number_of_image_patches(height, width) // self.image_processor.merge_size ** 2

    def prompt_ids(self, text: str, visual_tokens: Sequence[int]) -> list[int]:
        """Token ids of one user turn, X_d (+) P of Eq. (1): the images first, then the text, then the assistant's header. A text that says
        <image> once for each of several images has them there."""
        pieces = text.split(IMAGE)
        if len(visual_tokens) < 2 or len(pieces) != len(visual_tokens) + 1:
            pieces = [""] * len(visual_tokens) + [text]
        content = [part for piece in pieces for part in ({"type": "text", "text": piece}, {"type": "image"})][:-1]
        rendered = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                      add_generation_prompt=True)
        counts, ids = iter(visual_tokens), []
        tokens = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if tokens.count(self.image_token_id) != len(visual_tokens):
            raise ValueError(f"{tokens.count(self.image_token_id)} image placeholders for {len(visual_tokens)} images: "
                             f"the text must not spell <|image_pad|>; got {text!r}")
        for token in tokens:
            ids += [token] * next(counts) if token == self.image_token_id else [token]
        return ids

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a response with its end-of-turn token, which is trained and sampled like any other."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class LastLayer(Qwen2_5_VLDecoderLayer):
    """The last decoder layer, whose feed-forward part leaves out what nobody reads: `predicts` = (rows, columns), (n,) each, are the
    tokens of (B, N) that another is predicted from; only their hidden states come out, (n, H). Without `predicts`: the layer as it was."""

    def forward(self, hidden_states: torch.Tensor, predicts: tuple[torch.Tensor, torch.Tensor] | None = None, **options) -> torch.Tensor:
        x = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **options)[0]
        x = x if predicts is None else x[predicts]
        return x + self.mlp(self.post_attention_layernorm(x))


class Wide(torch.nn.Linear):
    """A linear layer to more features than it is given, without bias. Few rows on a CPU are the second operand, W x^T in place of x W^T: the
    same sums in less time (docs/benchmarks.md). They come out with the strides of that product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x.shape[:-1].numel() > FEW_ROWS:
            return super().forward(x)
        return (self.weight @ x.reshape(-1, self.in_features).T).T.view(*x.shape[:-1], self.out_features)


def adapt(model) -> None:
    """Turn the language model's last layer into a `LastLayer`, the projection and the wide layers of its feed-forward parts into `Wide` ones,
    in place. Parameters and their names stay, so checkpoints do too."""
    layers = model.model.language_model.layers
    layers[-1].__class__ = LastLayer
    for linear in (model.lm_head, *(part for layer in layers for part in (layer.mlp.gate_proj, layer.mlp.up_proj))):
        linear.__class__ = Wide


def load(name_or_path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
         **image_options) -> tuple[Qwen2_5_VLForConditionalGeneration, Processor]:
    """The model and its processor from a folder or a hub id; weights only as safetensors. On the device "meta" nothing is read but the
    configuration: the model has shapes and no weights, for `shard.shard`."""
    logging.disable_progress_bar()                                                  # of transformers: a line for every save and load
    try:
        processor = Processor.from_pretrained(name_or_path, **image_options)
        if device == "meta":
            with torch.device("meta"):
                model = Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig.from_pretrained(name_or_path), dtype=dtype).eval()
        else:
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(name_or_path, dtype=dtype, use_safetensors=True).to(device)
    except OSError as error:
        raise SystemExit(f"--model {name_or_path}: neither a checkpoint folder nor a model that can be downloaded: {error}") from error
    adapt(model)
    return model, processor


def freeze_vision(model) -> None:
    """Freeze the vision tower with its merger (the paper's projection layers): section 5, Training Configuration."""
    model.model.visual.requires_grad_(False)
    model.model.visual.eval()


def count_parameters(model) -> str:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return f"trainable {trainable:,}, frozen {frozen:,}"


def encode_images(model, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
    """Run the vision tower once: a list of (visual tokens, H), one an image, without gradient where vision is frozen.

    What comes back serves sampling, the reference and the policy alike.
    """
    visual = model.model.visual
    trainable = any(p.requires_grad for p in visual.parameters())
    with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
        features = visual(pixel_values.to(visual.device, visual.dtype), grid_thw=grid_thw.to(visual.device)).pooler_output
    return list(features.split((grid_thw.prod(-1) // visual.spatial_merge_size ** 2).tolist()))


@dataclass
class Prompt:
    """One prompt, ready for the language model: ids (P,), M-RoPE positions (3, P), features (visual tokens, H)."""
    ids: torch.Tensor
    positions: torch.Tensor
    features: torch.Tensor

    @property
    def next_position(self) -> int:
        """Where the first response token stands: one past the largest position of the prompt."""
        return int(self.positions.max()) + 1


def make_prompt(model, ids: Sequence[int], grid_thw: torch.Tensor, features: Sequence[torch.Tensor]) -> Prompt:
    """ids: P token ids with the image placeholders expanded; grid_thw (images, 3); features: one tensor an image."""
    device = model.device
    ids = torch.tensor(ids, device=device)
    is_image = ids == model.config.image_token_id
    features = torch.cat(list(features)) if len(features) else torch.zeros(0, model.config.text_config.hidden_size, device=device)
    if int(is_image.sum()) != len(features):
        raise ValueError(f"the prompt holds {int(is_image.sum())} image tokens, the images give {len(features)}: "
                         "was the prompt cut? Prompts are never truncated here; raise the limit or shrink the image")
    positions, _ = model.model.get_rope_index(ids[None], is_image[None].int(), image_grid_thw=grid_thw.to(device) if len(grid_thw) else None,
                                              attention_mask=torch.ones_like(ids)[None])
    return Prompt(ids, positions[:, 0], features)


def embed(model, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Token embeddings (.., H) with the image features, in order, at the image placeholders."""
    embeddings = model.get_input_embeddings()(ids)
    at_image = (ids == model.config.image_token_id)[..., None]
    return embeddings.masked_scatter(at_image, features.to(embeddings.dtype))


def hidden_states(model, embeddings: torch.Tensor, predicts: tuple[torch.Tensor, torch.Tensor], **inputs) -> torch.Tensor:
    """The language model on embeddings (B, N, H) -> its last hidden states at `predicts` = (rows, columns), (n, H)."""
    hidden = model.model.language_model(inputs_embeds=embeddings, predicts=predicts, **inputs).last_hidden_state
    return hidden if hidden.dim() == 2 else hidden[predicts]                        # (B, N, H) of a model that is not from `load`


def scale_logits(logits: torch.Tensor, temperature: float = 1.0, banned: Sequence[int] = ()) -> torch.Tensor:
    """(.., V) logits -> the logits of the policy in at least float32: banned ids impossible, divided by the temperature.
    Sampling and scoring both go through here, so that they speak of the same distribution."""
    penalty = torch.zeros(logits.shape[-1], dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    penalty[list(banned)] = float("-inf")
    return torch.add(penalty, logits, alpha=1 / temperature)                       # all in one pass, and none in the backward pass at T = 1


def token_logps(model, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, banned: Sequence[int] = (),
                with_entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states (N, H) and the tokens (N,) that follow them -> their log-probabilities (N,) and, where asked, the entropies
    (N,) without gradient. No more than LOGITS_AT_ONCE logits exist at a time: where there would be more, they are made in chunks, and
    a chunk is thrown away and computed again in the backward pass."""
    def chunk(hidden: torch.Tensor, targets: torch.Tensor):
        logps = scale_logits(model.lm_head(hidden), temperature, banned).log_softmax(-1)
        p_log_p = logps.detach().exp().mul_(logps.detach()) if with_entropy else None  # 0 log 0 = 0: nan, which nansum leaves out
        return logps.gather(-1, targets[:, None])[:, 0], -p_log_p.nansum(-1) if with_entropy else None

    size = max(1, LOGITS_AT_ONCE // model.config.text_config.vocab_size)
    if len(hidden) <= size:
        return chunk(hidden, targets)
    parts = [checkpoint(chunk, h, t, use_reentrant=False) for h, t in zip(hidden.split(size), targets.split(size))]
    logps, entropies = zip(*parts)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def token_ratio(prompts: Sequence[Prompt], responses: Sequence[Sequence[Sequence[int]]]) -> float:
    """How many times fewer tokens packed rows have, padding included: about G (P + L) / (P + G L)."""
    packed = len(prompts) * max(len(p.ids) + sum(map(len, group)) for p, group in zip(prompts, responses))
    rows = [len(p.ids) + len(response) for p, group in zip(prompts, responses) for response in group]
    return len(rows) * max(rows) / packed


def group_logps(model, prompts: Sequence[Prompt], responses: Sequence[Sequence[Sequence[int]]], temperature: float = 1.0,
                banned: Sequence[int] = (), with_entropy: bool = False, flex: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """log pi(response | image, prompt), token by token, for B groups of responses.

    responses: B lists of token-id lists. Each group is one packed row [prompt, response 1 .. response G]: a response sees the
    prompt and itself (`rr1.branches`), and its positions start where the prompt ended, so the prompt is computed once and the result equals
    that of separate rows, which are taken where packing saves little (`token_ratio` under PACK_FROM). `flex`: by FlexAttention.
    -> logps (N, L) in float32, mask (N, L), and entropies (N, L) without gradient where asked; N = all responses in order, padded
    on the right with 0.
    """
    if token_ratio(prompts, responses) < PACK_FROM:
        prompts = [prompt for prompt, group in zip(prompts, responses, strict=True) for _ in group]
        responses = [[response] for group in responses for response in group]
    device = model.device
    rows, positions, starts, previous, targets = [], [], [], [], []
    for prompt, group in zip(prompts, responses, strict=True):
        row, position, offset = [prompt.ids], [prompt.positions], len(prompt.ids)
        for response in group:
            n = len(response)
            row.append(torch.tensor(response, device=device))
            position.append((prompt.next_position + torch.arange(n, device=device)).expand(3, n))
            starts.append((len(rows), offset))                                     # of each response: its row and first column
            previous.append(torch.tensor([len(prompt.ids) - 1, *range(offset, offset + n - 1)]))   # what predicts each token
            targets.append(row[-1])
            offset += n
        rows.append(torch.cat(row)), positions.append(torch.cat(position, 1).T)
    lengths = [len(t) for t in targets]
    ids = pad_sequence(rows, batch_first=True)                                      # (B, N)
    position_ids = pad_sequence(positions, batch_first=True).permute(2, 0, 1)       # (3, B, N)
    embeddings = embed(model, ids, torch.cat([p.features for p in prompts]))
    attention = None                                                                # one response a row: plain causal attention
    if any(len(group) > 1 for group in responses):
        model.model.language_model.config._attn_implementation = "branches"
        packed, text = ([len(p.ids) for p in prompts], starts, lengths, embeddings), model.config.text_config
        heads_a_key = text.num_attention_heads // text.num_key_value_heads
        attention = {"full_attention": block_mask(*packed) if flex else Branches.of(*packed, heads_a_key)}
    row_of = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor([sum(map(len, g)) for g in responses]))
    hidden = hidden_states(model, embeddings, (row_of.to(device), torch.cat(previous).to(device)), attention_mask=attention,
                           position_ids=position_ids, use_cache=False)              # (tokens, H): response tokens only
    logps, entropy = token_logps(model, hidden, torch.cat(targets), temperature, banned, with_entropy)
    pad = lambda flat: pad_sequence(flat.split(lengths), batch_first=True)          # (tokens,) -> (N, L)
    return pad(logps), pad(torch.ones_like(logps)), pad(entropy) if with_entropy else None
