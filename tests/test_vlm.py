"""Eq. 1: freezing, encoding an image once, scoring a packed group as separate rows are scored."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ordinary, random_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from rr1 import data, vlm
from rr1.chain import TAGS
from rr1.tiny.model import CHAT_TEMPLATE

SIZES = [(112, 112), (56, 112), (84, 56)]  # height, width: 16, 8 and 6 visual tokens
TEXTS = [
    "what is it?",
    "how many shapes are there, and what color is the one in the top left?",
    "where?",
]
REAL = Path(__file__).resolve().parents[2] / "shared" / "qwen2.5-vl-3b"


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES
    ]


def random_responses(processor, lengths, seed=0):
    """B lists of token lists of these lengths, no vision tokens; those of even length end."""
    rng = np.random.default_rng(seed)
    allowed = [i for i in range(len(processor.tokenizer)) if i not in processor.banned_ids]
    return [
        [
            [
                *rng.choice(allowed, n - 1).tolist(),
                processor.end_id if n % 2 == 0 else allowed[n],
            ]
            for n in group
        ]
        for group in lengths
    ]


def ordinary_logps(model, processor, text, image, response, temperature=1.0, banned=()):
    """log pi(response), (L,): one row [prompt, response] through the whole model, with pixels."""
    pixel_values, grid = processor.pixels([image])
    prompt = processor.prompt_ids(text, processor.visual_tokens(grid))
    ids = torch.tensor([prompt + response])
    logits = (
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixel_values,
            image_grid_thw=grid,
            mm_token_type_ids=(ids == processor.image_token_id).int(),
        ).logits[0, len(prompt) - 1 : -1]
        / temperature
    )
    logits[:, list(banned)] = float("-inf")
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def exact_norm(self, x):
    """RMSNorm in the dtype of its input. The model's own rounds to float32: seven digits."""
    return self.weight * (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    )


@pytest.fixture(scope="module")
def model(processor, way):
    """Four heads that share two key-value heads, as the real model's share theirs; float32."""
    model = random_model(processor.tokenizer, hidden=192)
    way(model)
    return model


@pytest.fixture
def frozen(model):
    model = copy.deepcopy(model)
    vlm.freeze_vision(model)
    return model


# ---------------------------------------------------------------- freezing and encoding


def test_freeze_vision_freezes_tower_and_merger_and_nothing_else(frozen):
    still = {name for name, p in frozen.named_parameters() if not p.requires_grad}
    assert still == {name for name, _ in frozen.named_parameters() if ".visual." in name}
    assert any("merger" in name for name in still)
    total = sum(p.numel() for p in frozen.parameters())
    visual = sum(p.numel() for p in frozen.model.visual.parameters())
    assert (
        vlm.count_parameters(frozen) == f"trainable {total - visual:,}, frozen {visual:,}"
    )


def test_encode_images_gives_one_tensor_an_image_with_gradient_only_where_vision_is_trained(
    model, frozen, processor
):
    pixel_values, grid = processor.pixels(pictures())
    features = vlm.encode_images(frozen, pixel_values, grid)
    assert [tuple(f.shape) for f in features] == [(16, 192), (8, 192), (6, 192)]
    assert processor.visual_tokens(grid) == [16, 8, 6]
    assert not any(f.requires_grad for f in features)
    assert all(f.requires_grad for f in vlm.encode_images(model, pixel_values, grid))
    with torch.no_grad():
        assert not any(
            f.requires_grad for f in vlm.encode_images(model, pixel_values, grid)
        )


# ---------------------------------------------------------------- packed rows equal separate rows

LENGTHS = {
    1: [[1], [9], [4]],
    2: [[1, 6], [8, 3], [2, 2]],
    8: [[1, 2, 3, 4, 5, 6, 7, 12], [3] * 8, [12, 1, 1, 2, 9, 4, 5, 6]],
}


@pytest.mark.parametrize(
    "G, norm, train_vision, bound",
    [
        (1, "exact", False, 1e-9),
        (2, "exact", False, 1e-9),
        (8, "exact", False, 1e-9),
        (8, "as released", False, 1e-6),
        (2, "exact", True, 1e-6),
    ],
)
def test_packed_groups_equal_separate_rows(
    model, processor, monkeypatch, G, norm, train_vision, bound
):
    """float64; log-probabilities and the gradient of every trainable parameter, at T = 0.7 with the
    vision tokens banned, beside a model that is all transformers' own.

    As released, the model's norms (and the rotations in its vision tower) round to float32: that
    is the looser bound."""
    monkeypatch.setattr(vlm, "PACK_FROM", 0.0)
    monkeypatch.setattr(
        vlm, "LOGITS_AT_ONCE", 5 * len(processor.tokenizer)
    )  # five tokens at a time
    if norm == "exact":
        monkeypatch.setattr(Qwen2_5_VLRMSNorm, "forward", exact_norm)
    model = copy.deepcopy(model).double()
    if not train_vision:
        vlm.freeze_vision(model)
    plain = ordinary(model)
    images, responses, T, banned = (
        pictures(),
        random_responses(processor, LENGTHS[G]),
        0.7,
        processor.banned_ids,
    )
    weights = torch.randn(
        3 * G, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]

    def gradients(model, loss):
        return dict(
            zip(
                trainable,
                torch.autograd.grad(
                    loss, [model.get_parameter(name) for name in trainable]
                ),
            )
        )

    prompts = data.encode(model, data.collate(TEXTS, images, processor))
    logps, mask, _ = vlm.group_logps(model, prompts, responses, T, banned)
    packed = gradients(model, (logps * mask * weights[:, : logps.shape[1]]).sum())

    rows = [
        ordinary_logps(plain, processor, text, image, response, T, banned)
        for text, image, group in zip(TEXTS, images, responses)
        for response in group
    ]
    separate = gradients(
        plain, sum((row * w[: len(row)]).sum() for row, w in zip(rows, weights))
    )

    assert mask.tolist() == [
        [1.0] * len(r) + [0.0] * (logps.shape[1] - len(r)) for r in rows
    ]
    for ours, theirs in zip(logps, rows):
        torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=bound)
        assert not ours[len(theirs) :].any()
    for name, theirs in separate.items():
        error = (packed[name] - theirs).abs().max() / theirs.abs().max()
        assert error <= bound, f"{name}: {error:.1e}"


def test_the_projection_in_chunks_equals_the_whole_and_never_holds_more(
    frozen, processor, monkeypatch
):
    frozen, prompts = (
        frozen.double(),
        data.encode(frozen.double(), data.collate(TEXTS, pictures(), processor)),
    )
    responses, V = random_responses(processor, LENGTHS[8]), len(processor.tokenizer)
    tokens, found = sum(map(len, [r for group in responses for r in group])), {}
    for at_once in (2**24, 10 * V):
        monkeypatch.setattr(vlm, "LOGITS_AT_ONCE", at_once)
        largest = []

        def is_logits(t):  # 192 rows: the projection's own matrix
            return t.shape[-1:] == (V,) and len(t) != 192

        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (largest.append(is_logits(t) * t.numel()), t)[1], lambda t: t
        ):
            logps, _, entropy = vlm.group_logps(
                frozen, prompts, responses, 0.7, processor.banned_ids, with_entropy=True
            )
        gradient = torch.autograd.grad(
            logps.square().sum(), frozen.model.language_model.embed_tokens.weight
        )[0]
        found[at_once] = logps, entropy, gradient, max(largest)
    whole, chunked = found.values()
    for a, b in zip(whole[:3], chunked[:3]):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-12)
    assert whole[3] == tokens * V and chunked[3] <= 10 * V


def test_where_packing_saves_little_separate_rows_are_taken(frozen, processor, monkeypatch):
    frozen = frozen.double()
    prompts, seen = data.encode(frozen, data.collate(TEXTS, pictures(), processor)), []
    P = [len(p.ids) for p in prompts]
    forward = type(frozen.model.language_model).forward
    monkeypatch.setattr(
        type(frozen.model.language_model),
        "forward",
        lambda self, **options: (
            seen.append(tuple(options["inputs_embeds"].shape[:2])),
            forward(self, **options),
        )[1],
    )
    short, long = (random_responses(processor, [[n] * 4] * 3) for n in (2, 200))
    assert (
        vlm.token_ratio(prompts, short)
        == 12 * (max(P) + 2) / (3 * (max(P) + 8))
        > vlm.PACK_FROM
    )
    assert (
        vlm.token_ratio(prompts, long)
        == 12 * (max(P) + 200) / (3 * (max(P) + 800))
        < vlm.PACK_FROM
    )
    for responses, shape in ((short, (3, max(P) + 8)), (long, (12, max(P) + 200))):
        logps, mask, _ = vlm.group_logps(frozen, prompts, responses)
        assert seen.pop() == shape
        with monkeypatch.context() as patch:
            patch.setattr(
                vlm, "PACK_FROM", 0.0 if shape[0] == 12 else float("inf")
            )  # the other path
            other, other_mask, _ = vlm.group_logps(frozen, prompts, responses)
        assert seen.pop() != shape and torch.equal(mask, other_mask)
        torch.testing.assert_close(logps, other, rtol=0, atol=1e-6)


def test_groups_of_unequal_size_and_a_batch_equal_one_by_one(frozen, processor):
    """Pictures of different sizes stay with their own prompts."""
    frozen, images = frozen.double(), pictures()
    responses = random_responses(processor, [[3, 5], [4], [1, 7, 2]])
    together, mask, entropy = vlm.group_logps(
        frozen,
        data.encode(frozen, data.collate(TEXTS, images, processor)),
        responses,
        with_entropy=True,
    )
    alone, alone_entropy = [], []
    for text, image, group in zip(TEXTS, images, responses):
        logps, own, h = vlm.group_logps(
            frozen,
            data.encode(frozen, data.collate([text], [image], processor)),
            [group],
            with_entropy=True,
        )
        alone += logps[own > 0].tolist()
        alone_entropy += h[own > 0].tolist()
    torch.testing.assert_close(
        together[mask > 0], torch.tensor(alone, dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        entropy[mask > 0],
        torch.tensor(alone_entropy, dtype=torch.float64),
        rtol=0,
        atol=1e-6,
    )


def test_a_part_of_a_batch_keeps_its_own_patches(frozen, processor):
    whole = data.collate(TEXTS, pictures(), processor)
    for i, (text, image) in enumerate(zip(TEXTS, pictures())):
        alone, part = data.collate([text], [image], processor), whole[[i]]
        assert (
            part.ids == alone.ids
            and torch.equal(part.pixel_values, alone.pixel_values)
            and torch.equal(part.grid_thw, alone.grid_thw)
        )
    assert (
        whole[range(1, 3)].ids == whole.ids[1:]
        and len(whole[range(1, 3)].pixel_values) == (8 + 6) * 4
    )


def test_entropy_is_that_of_the_scaled_policy(frozen, processor):
    prompts = data.encode(frozen, data.collate(TEXTS[:1], pictures()[:1], processor))
    logits = frozen(
        inputs_embeds=vlm.embed(frozen, prompts[0].ids, prompts[0].features)[None],
        position_ids=prompts[0].positions[:, None],
    ).logits[0, -1]
    for T in (1.0, 0.5):
        kept = [i for i in range(len(logits)) if i not in processor.banned_ids]
        expected = torch.distributions.Categorical(logits=logits[kept] / T).entropy()
        _, _, entropy = vlm.group_logps(
            frozen, prompts, [[[5]]], T, processor.banned_ids, with_entropy=True
        )
        torch.testing.assert_close(entropy[0, 0], expected.detach())
        assert not entropy.requires_grad


# ---------------------------------------------------------------- the picture matters


@torch.no_grad()
def test_another_picture_changes_policy_and_reference(frozen, processor):
    reference = copy.deepcopy(frozen)
    responses = random_responses(processor, [[6, 3]])
    seen, other = (
        data.encode(frozen, data.collate(TEXTS[:1], pictures(seed)[:1], processor))
        for seed in (0, 1)
    )
    for model in (frozen, reference):
        a, b = (vlm.group_logps(model, prompts, responses)[0] for prompts in (seen, other))
        assert (
            (a[0] - b[0]).abs().min() > 1e-3
        )  # from the first token on: the first is predicted from the prompt


@pytest.mark.parametrize("T", [1.0, 0.7])
def test_policy_in_training_and_reference_agree_to_the_last_bit(frozen, processor, T):
    reference = copy.deepcopy(frozen).requires_grad_(False)
    prompts = data.encode(frozen, data.collate(TEXTS, pictures(), processor))
    responses = random_responses(processor, LENGTHS[2])
    policy = vlm.group_logps(frozen.train(), prompts, responses, T, processor.banned_ids)[0]
    with torch.no_grad():
        assert torch.equal(
            policy,
            vlm.group_logps(reference, prompts, responses, T, processor.banned_ids)[0],
        )


def test_gradient_checkpointing_changes_no_gradient(frozen, processor):
    responses = random_responses(processor, LENGTHS[2])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            frozen.model.language_model.gradient_checkpointing_enable()
        prompts = data.encode(frozen.train(), data.collate(TEXTS, pictures(), processor))
        vlm.group_logps(frozen, prompts, responses)[0].sum().backward()
        gradients.append(
            {name: p.grad for name, p in frozen.named_parameters() if p.requires_grad}
        )
        frozen.zero_grad()
    for name in gradients[0]:
        torch.testing.assert_close(
            gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-6, msg=name
        )


# ---------------------------------------------------------------- prompts and responses


def test_prompts_that_were_cut_are_an_error(frozen, processor):
    batch = data.collate(TEXTS[:1], pictures()[:1], processor)
    features = vlm.encode_images(frozen, batch.pixel_values, batch.grid_thw)
    first = batch.ids[0].index(processor.image_token_id)
    for cut in (
        batch.ids[0][: first + 10],
        batch.ids[0][first + 1 :],
        batch.ids[0][:first],
    ):
        with pytest.raises(
            ValueError, match=r"image tokens, the images give 16.*never truncated"
        ):
            vlm.make_prompt(frozen, cut, batch.grid_thw, features)


def test_responses_start_where_the_prompt_ended(frozen, processor):
    batch = data.collate(TEXTS[:1], pictures()[:1], processor)
    (prompt,) = data.encode(frozen, batch)
    assert len(prompt.features) == batch.ids[0].count(processor.image_token_id) == 16
    assert (
        prompt.next_position == prompt.positions.max() + 1 == len(prompt.ids) - 16 + 4
    )  # a 4 x 4 picture takes 4 places
    assert processor.tokenizer.decode(batch.ids[0]).endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_without_a_picture(frozen, processor):
    ids = processor.prompt_ids("how are you?", [])
    prompt = vlm.make_prompt(frozen, ids, torch.zeros(0, 3, dtype=torch.long), [])
    logps, _, _ = vlm.group_logps(frozen, [prompt], [[[7, 8, 9]]])
    logits = frozen(input_ids=torch.tensor([ids + [7, 8, 9]])).logits[0, len(ids) - 1 : -1]
    torch.testing.assert_close(
        logps[0], logits.log_softmax(-1)[range(3), [7, 8, 9]], rtol=0, atol=1e-5
    )


def test_end_of_turn_is_trained_and_is_not_the_padding(frozen, processor):
    assert processor.tokenizer.pad_token_id != processor.end_id
    ids = processor.response_ids("the shape is red")
    assert ids[-1] == processor.end_id and processor.decode(ids) == "the shape is red"
    prompts = data.encode(frozen, data.collate(TEXTS[:1], pictures()[:1], processor))
    logps, mask, _ = vlm.group_logps(frozen, prompts, [[ids, ids[:2]]])
    assert mask.sum(1).tolist() == [len(ids), 2] and logps[0, len(ids) - 1] < 0
    (gradient,) = torch.autograd.grad(
        -logps[0, len(ids) - 1], frozen.get_input_embeddings().weight
    )
    assert gradient[processor.end_id].abs().max() > 0


def test_the_text_of_a_question_cannot_stand_for_a_picture(processor):
    with pytest.raises(ValueError, match="image_pad"):
        processor.prompt_ids("what is <|image_pad|> here?", [16])


def test_banned_ids_are_impossible_and_get_no_gradient(frozen, processor):
    logits = torch.randn(3, len(processor.tokenizer), requires_grad=True)
    scaled = vlm.scale_logits(logits, 0.5, processor.banned_ids)
    assert (
        scaled[:, processor.banned_ids] == float("-inf")
    ).all() and scaled.dtype == torch.float32
    scaled.log_softmax(-1)[:, 5].sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[:, processor.banned_ids].any()
    assert vlm.scale_logits(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"} <= set(
        processor.tokenizer.convert_ids_to_tokens(processor.banned_ids)
    )
    assert processor.end_id not in processor.banned_ids


# ---------------------------------------------------------------- checkpoints


@torch.no_grad()
def test_a_saved_checkpoint_is_an_ordinary_one(checkpoint):
    """Plain transformers classes load it and give the same logits."""
    ours, processor = vlm.load(checkpoint)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    tokenizer, image_processor = (
        AutoTokenizer.from_pretrained(checkpoint),
        AutoImageProcessor.from_pretrained(checkpoint, backend="pil"),
    )
    assert (
        json.loads(Path(checkpoint, "config.json").read_text())["model_type"]
        == "qwen2_5_vl"
    )
    assert next(ours.parameters()).dtype == torch.float32 and not ours.training
    image = pictures()[0]
    content = [{"type": "image"}, {"type": "text", "text": TEXTS[0]}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    patches = image_processor(images=[image], return_tensors="pt")
    n = int(patches["image_grid_thw"].prod()) // 4
    ids = tokenizer(
        text.replace("<|image_pad|>", "<|image_pad|>" * n), return_tensors="pt"
    )["input_ids"]
    logits = theirs(
        input_ids=ids, mm_token_type_ids=(ids == processor.image_token_id).int(), **patches
    ).logits[0]
    (prompt,) = data.encode(ours, data.collate(TEXTS[:1], [image], processor))
    assert prompt.ids.tolist() == ids[0].tolist()
    hidden = ours.model.language_model(
        inputs_embeds=vlm.embed(ours, prompt.ids, prompt.features)[None],
        position_ids=prompt.positions[:, None],
    )
    torch.testing.assert_close(
        ours.lm_head(hidden.last_hidden_state)[0], logits, rtol=0, atol=1e-6
    )


def test_a_checkpoint_that_is_not_there_says_what_was_tried(tmp_path):
    with pytest.raises(SystemExit, match="--model .*nowhere"):
        vlm.load(str(tmp_path / "nowhere"))


def edited(checkpoint, folder, text_config=None, **changes):
    """A copy of the checkpoint with other values in its config.json."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text_config or {}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def test_another_models_checkpoint_is_refused_by_name(checkpoint, tmp_path):
    for kind in ("qwen3_vl", "qwen2_vl", "qwen2"):
        folder = edited(checkpoint, tmp_path / kind, model_type=kind)
        with pytest.raises(
            SystemExit, match=f"{kind}: this is a {kind}, not a qwen2_5_vl$"
        ):
            vlm.load(folder)
        with pytest.raises(SystemExit, match=f"this is a {kind}"):
            vlm.load(folder, device="meta")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fill_the_model_are_refused_by_name(
    checkpoint, tmp_path, change
):
    folder = Path(edited(checkpoint, tmp_path / "torn"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("merger.mlp.0.weight"))
    if change == "missing":
        del tensors[name]
        name = "model.visual.merger.mlp.0.weight"
    else:
        name = "model.language_model.layers.0.self_attn.q_norm.weight"
        tensors[name] = torch.ones(48)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=rf"torn: .*{change} \['{name}'\]"):
        vlm.load(str(folder))


def test_a_sliding_window_is_refused(checkpoint, tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    window["layer_types"] = ["sliding_attention"] * 2
    folder = edited(checkpoint, tmp_path / "window", text_config=window)
    with pytest.raises(SystemExit, match="window: it attends to a sliding window"):
        vlm.load(folder)


def test_ids_that_the_tokenizer_does_not_have_are_banned(checkpoint, tmp_path):
    """The real model's embedding has 271 rows more than its tokenizer has tokens."""
    model, processor = vlm.load(checkpoint)
    n = len(processor.tokenizer)
    assert processor.banned_ids == vlm.Processor.from_pretrained(checkpoint).banned_ids
    model.resize_token_embeddings(n + 3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for device in ("cpu", "meta"):
        _, padded = vlm.load(str(tmp_path), device=device)
        assert padded.banned_ids == [*processor.banned_ids, n, n + 1, n + 2]


def test_a_response_cannot_spell_a_placeholder(processor):
    with pytest.raises(ValueError, match=r"must not spell <\|image_pad\|>"):
        processor.response_ids("the shape <|image_pad|> is red")


@pytest.mark.skipif(
    not REAL.exists(), reason="the real model's tokenizer is not beside the repository"
)
def test_the_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    processor = vlm.Processor(
        tokenizer, AutoImageProcessor.from_pretrained(REAL, backend="pil")
    )
    assert tokenizer("Hello, world!")["input_ids"] == [9707, 11, 1879, 0]
    assert {len(tokenizer(tag)["input_ids"]) for tag in TAGS} <= set(range(3, 8))
    assert (
        processor.response_ids("Hello")[-1]
        == processor.end_id
        == 151645
        != tokenizer.pad_token_id
    )
    assert processor.image_token_id == 151655 and len(processor.banned_ids) == len(
        vlm.NEVER_SAMPLED
    )
    ids = processor.prompt_ids("what is it?", [391, 4])
    assert ids.count(processor.image_token_id) == 395
    assert processor.decode(ids).endswith("assistant\n")
    pixel_values, grid = processor.pixels([Image.new("RGB", (640, 480))])
    assert (
        grid.tolist() == [[1, 34, 46]]
        and processor.visual_tokens(grid) == [391]
        and len(pixel_values) == 34 * 46
    )
