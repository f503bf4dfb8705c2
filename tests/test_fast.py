"""rr1/fast.py: nothing needs it, and what it switches on stays on."""

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model
from PIL import Image
from test_vlm import random_responses

from rr1 import data, fast, rollout, vlm

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [[1, 9, 4], [7, 2], [8, 3, 3, 12]]


@pytest.fixture(scope="module")
def plain(processor):
    model = random_model(processor.tokenizer, hidden=192)
    vlm.freeze_vision(model)
    return model


@pytest.fixture
def prompts(plain, processor):
    pictures = [Image.new("RGB", size, "red") for size in ((112, 112), (56, 112), (84, 56))]
    texts = [
        "what is it?",
        "where is the star, and what color is the one beside it?",
        "why?",
    ]
    return data.encode(plain, data.collate(texts, pictures, processor))


def options(processor):
    return {
        "end_id": processor.end_id,
        "max_new_tokens": 16,
        "banned": processor.banned_ids,
    }


def test_an_enabled_model_computes_by_fast_and_its_copy_too(
    plain, processor, prompts, monkeypatch
):
    """Each of the three functions is called, and the results are those of the plain model."""
    policy = copy.deepcopy(plain)
    fast.enable(policy)
    models = [plain, policy, copy.deepcopy(policy).requires_grad_(False)]
    responses = random_responses(processor, LENGTHS)
    called, attend = [], fast.F.scaled_dot_product_attention

    def attention(query, *args, **settings):
        called.append(query.shape)
        return attend(query, *args, **settings)

    logps, rollouts, shapes = [], [], []
    monkeypatch.setattr(fast.F, "scaled_dot_product_attention", attention)
    for model in models:
        called.clear()
        with torch.no_grad():
            logps.append(vlm.group_logps(model, prompts, responses)[0])
        groups = rollout.sample_group(model, prompts, 4, range(3), **options(processor))
        rollouts.append([[r.ids for r in group] for group in groups])
        shapes.append(set(called))
    n = sum(map(len, LENGTHS))
    assert (n, 2, 2 * 12, 48) in shapes[1] and (3, 2, 2 * 4, 48) in shapes[1]
    assert shapes[1] == shapes[2] and (n, 2, 2 * 12, 48) not in shapes[0]
    assert rollouts[0] == rollouts[1] == rollouts[2]
    torch.testing.assert_close(logps[0], logps[1], rtol=0, atol=1e-4)
    assert torch.equal(logps[1], logps[2])


def test_an_enabled_model_is_saved_as_an_ordinary_one(plain, tmp_path):
    enabled = copy.deepcopy(plain)
    fast.enable(enabled)
    for name, model in (("plain", plain), ("enabled", enabled)):
        model.save_pretrained(tmp_path / name)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "enabled" / file.name).read_bytes() == file.read_bytes(), (
            file.name
        )


def test_scoring_switches_nothing_on(plain, processor, prompts):
    before = copy.deepcopy(plain.config).to_dict(), dict(vars(plain))
    with torch.no_grad():
        vlm.group_logps(plain, prompts, random_responses(processor, LENGTHS))
    assert (plain.config.to_dict(), dict(vars(plain))) == before
    assert plain.model.language_model.config._attn_implementation == "sdpa"


def test_branches_of_the_row_in_the_docstring():
    owner = torch.tensor([[-1, -1, -1, -1, 0, 0, 1], [-1, -1, 0, 1, 1, -2, -2]])
    found = fast.branches(2, owner, torch.float32)["full_attention"]
    assert found.P == 4 and found.row.tolist() == [0, 0, 1, 1]
    assert found.own.tolist() == [[4, 5], [6, 0], [9, 0], [10, 11]]
    assert found.place.tolist() == [[0, 1, 2, 3, 8, 9, 10], [4, 5, 12, 14, 15, 0, 0]]
    assert found.mask.shape == (4, 1, 2 * 2, 4 + 2)
    # a prompt of two tokens, two that are padding
    hidden = found.mask[2, 0].isinf().long().tolist()
    assert hidden == [[0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0]] * 2


# ---------------------------------------------------------------- the house without fast.py


@pytest.mark.parametrize("script", ["train_sft", "train_grpo"])
def test_everything_runs_without_it(checkpoint, world_folder, tmp_path, script):
    """The file and the lines that call it, deleted."""
    weights = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(ROOT / "rr1", tmp_path / "rr1", ignore=weights)
    (tmp_path / "rr1" / "fast.py").unlink()
    for name in ("degrade.py", "evaluate.py", f"{script}.py"):
        shutil.copy(ROOT / name, tmp_path)
    calls = []
    for path in tmp_path.rglob("*.py"):
        source, n = re.subn(
            r"^ *fast\.enable\(.*\n", "", path.read_text(), flags=re.MULTILINE
        )
        if n:
            calls.append(path.name)
            path.write_text(source.replace("import data, fast, ", "import data, "))
    assert "predictions.py" in calls and len(calls) > 1, "the scripts should switch it on"
    command = [sys.executable, f"{script}.py", "--model", checkpoint, "--out", "run"]
    command += ["--data", f"{world_folder}/train.jsonl", "--part", "all", "--steps", "1"]
    small = {
        "train_sft": ["--batch", "2"],
        "train_grpo": ["--prompts", "2", "--group-size", "2"],
    }
    done = subprocess.run(
        [*command, *small[script]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    command = [sys.executable, "-c", "import evaluate, rr1.evaluation.predictions"]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_the_front_does_not_know_it():
    for name in ("vlm", "rollout", "grpo", "data", "shard", "runtime"):
        source = (ROOT / "rr1" / f"{name}.py").read_text()
        assert not re.search(r"^(from|import) .*\bfast\b", source, re.MULTILINE), name
