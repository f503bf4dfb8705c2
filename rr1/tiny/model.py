"""A Qwen2.5-VL of 3.5M parameters: the real architecture and checkpoint layout, sized for two CPU
cores.

The tokenizer is a byte-level BPE trained on the drawn world's text, digits apart, with Qwen's
special tokens, and the reasoning chain's tags as ordinary text that merges to one token each. The
chat template is Qwen's without a system turn.
"""

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)

from rr1.chain import build_prompt, render
from rr1.tiny import questions, scenes, world
from rr1.vlm import Processor

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# the slowest rotations stand nearly still over a chain, so things can be looked up at any distance
ROPE_THETA = 1000.0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(n: int = 6000, seed: int = 0) -> list[str]:
    """Text of the drawn world, a question and its chain a line each: what the tokenizer is
    trained on."""
    rng, lines = np.random.default_rng(seed), []
    levels = list(world.LEVELS)
    for _ in range(n):
        scene = scenes.sample_scene(rng)
        damage = world.sample_damage(rng, levels[rng.integers(len(levels))])
        for question in (questions.ask(scene, rng), questions.questions(scene)[-1]):
            options = questions.choices(question, rng) if question.options else None
            length = int(rng.integers(questions.LEAST, questions.MOST))
            chain = questions.true_chain(scene, question, damage, question.answer, length)
            lines += [build_prompt(question.text, options), render(chain)]
    return lines


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # a tag with its line break | how an intensity begins | a digit | a word | marks | space
            pre_tokenizers.Split(
                Regex(r"\n?<[A-Z_]+>|\([01]\.|\d| ?\p{L}+| ?[^\s\p{L}\d<]+|<|\s"),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024 - len(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def build_processor() -> Processor:
    side = scenes.SIDE
    return Processor(
        build_tokenizer(),
        Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=side * side),
    )


def build_model(
    tokenizer,
    hidden: int = 192,
    layers: int = 6,
    vision_hidden: int = 128,
    vision_depth: int = 4,
):
    """A randomly initialised Qwen2_5_VLForConditionalGeneration; 4 heads of 48 dimensions,
    M-RoPE sections 6 + 9 + 9 = 48 / 2."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 7 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 48,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=token("<|endoftext|>"),
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "mrope_section": [6, 9, 9],
            },
        ),
        vision_config=dict(
            depth=vision_depth,
            hidden_size=vision_hidden,
            intermediate_size=2 * vision_hidden,
            num_heads=vision_hidden // 32,
            out_hidden_size=hidden,
            fullatt_block_indexes=[vision_depth - 1],
            window_size=112,
            patch_size=14,
            spatial_merge_size=2,
        ),
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>")
    )
    return model
