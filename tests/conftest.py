"""What the tests share: a small random Qwen2.5-VL as a checkpoint folder, a small drawn world."""

import copy
import os

# before torch is imported; subprocesses inherit it
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from rr1 import fast, tiny, vlm
from rr1.tiny import model as tiny_model
from rr1.tiny import world

torch.set_num_threads(1)


@torch.no_grad()
def random_model(tokenizer, seed: int = 0, hidden: int = 96, ends: float = 0.75):
    """A Qwen2.5-VL of random weights large enough for attention, images and positions to matter.

    One token in ten or so is the end of turn (more where `ends` is larger): its embedding points
    where a constant of the last layer points."""
    generator = torch.Generator().manual_seed(seed)
    model = tiny_model.build_model(
        tokenizer, hidden=hidden, layers=2, vision_hidden=64, vision_depth=2
    )
    for name, p in model.named_parameters():
        std = (
            0.15 if "embed_tokens" in name else p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
        )
        p.copy_(
            torch.randn(p.shape, generator=generator) * std
            + (p.ndim == 1 and "norm" in name)
        )
    last = model.model.language_model.layers[-1].self_attn
    repeats = last.o_proj.in_features // last.v_proj.out_features
    last.v_proj.bias.normal_(generator=generator)
    constant = (
        last.o_proj.weight
        @ last.v_proj.bias.view(-1, 48).repeat_interleave(repeats, 0).flatten()
    )
    model.get_input_embeddings().weight[model.config.text_config.eos_token_id] = (
        ends * constant / constant.norm()
    )
    return model.eval()


def ordinary(model) -> Qwen2_5_VLForConditionalGeneration:
    """The same weights in a model in which `fast.enable` has changed nothing."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    plain = Qwen2_5_VLForConditionalGeneration(config).to(model.dtype).eval()
    assert plain.model.language_model.config._attn_implementation == "sdpa"
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


@pytest.fixture(scope="module", params=["plain", "fast"])
def way(request):
    """A function to call on a model: it stays as it is, or computes by rr1/fast.py."""
    return fast.enable if request.param == "fast" else lambda model: None


@pytest.fixture(scope="session")
def processor():
    """The shipped ones; test_tiny.py shows that they are what the code builds."""
    return vlm.Processor.from_pretrained(tiny.BASE)


@pytest.fixture(scope="session")
def checkpoint(processor, tmp_path_factory):
    """Path (str) of a folder with a random model: half a million parameters, two layers."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random_model(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory):
    """48 training and 16 test records of a held-out world, so that all of them have chains."""
    folder = world.write(tmp_path_factory.mktemp("world"), train=1, test=64)
    lines = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:48]))
    (folder / "test.jsonl").write_text("".join(lines[48:]))
    return folder
