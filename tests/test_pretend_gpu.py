"""The four scripts on a pretended GPU, two steps each: a device mistake fails here, without one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tests" / "pretend_gpu.py"

REFUSES = """
import torch, pretend_gpu

with pretend_gpu.install():
    x = torch.randn(3, device="cuda")
    layer = torch.nn.Linear(3, 3).cuda()
    layer(x).sum().backward()
    on_gpu = [x, x + 1, 2 * x, x * torch.tensor(2.0), x[torch.tensor([0, 1])], x.double(), x.T]
    on_gpu += [torch.zeros(3).to(x), torch.zeros_like(x), layer.weight, layer.weight.grad, layer(x)]
    on_gpu += [torch.zeros(3).to("cuda", torch.bfloat16), torch.nn.functional.pad(x, (0, 1))]
    for i, tensor in enumerate(on_gpu):
        assert tensor.device == torch.device("cuda", 0) and tensor.is_cuda, i
    for tensor in (x.cpu(), x.to("cpu"), torch.zeros(3), torch.zeros(3).copy_(x)):
        assert tensor.device == torch.device("cpu") and not tensor.is_cuda
    assert x.cpu().numpy().shape == (3,) and x.tolist() == x.cpu().tolist()
    mistakes = [
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.ones(3)]),
        lambda: layer(torch.ones(3)),
        lambda: x.numpy(),
        lambda: torch.ones(3)[torch.tensor([1]).cuda()],
        lambda: torch.ones(3).add_(x),
        lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
        lambda: x.__setitem__(slice(0, 2), torch.ones(2)),
    ]
    for i, mistake in enumerate(mistakes):
        try:
            mistake()
        except (RuntimeError, TypeError) as error:
            assert "pretended" in str(error)
        else:
            raise SystemExit(f"mistake {i} went through")
"""


def test_the_pretended_gpu_refuses_what_cuda_refuses():
    command = [sys.executable, "-c", REFUSES]
    done = subprocess.run(command, cwd=TOOL.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def on_gpu(*command) -> None:
    """Run a script there; it must have computed there."""
    done = subprocess.run(
        [sys.executable, TOOL, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    operations = re.search(r"(\d+) operations on a pretended GPU", done.stderr)
    assert int(operations[1]) > 1000


def test_train_sft(checkpoint, world_folder, tmp_path):
    data = ["--data", world_folder / "train.jsonl", "--part", "all"]
    small = ["--steps", "2", "--batch", "3", "--micro-batch", "2"]
    on_gpu("train_sft.py", "--model", checkpoint, "--out", tmp_path / "run", *data, *small)


def test_train_grpo_and_go_on(checkpoint, world_folder, tmp_path):
    data = ["--data", world_folder / "train.jsonl", "--part", "all", "--mu", "2"]
    small = ["--prompts", "3", "--group-size", "2", "--micro-batch", "2", "--max-new-tokens", "8"]
    run = ["train_grpo.py", "--model", checkpoint, "--out", tmp_path / "run", *data, *small]
    on_gpu(*run, "--steps", "2", "--save-every", "1")
    on_gpu(*run, "--steps", "3", "--save-every", "1", "--resume")


def test_train_recover(world_folder, tmp_path):
    small = ["--data", world_folder / "clean", "--steps", "2", "--batch", "2"]
    on_gpu("train_recover.py", "--stage", "sft", "--out", tmp_path / "sft", *small, "--side", "32")
    restorer = ["--model", tmp_path / "sft" / "model", "--group-size", "2"]
    run = ["train_recover.py", "--stage", "grpo", "--out", tmp_path / "grpo", *restorer, *small]
    on_gpu(*run)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_evaluate(checkpoint, world_folder, tmp_path, temperature):
    lines = (world_folder / "test.jsonl").read_text().splitlines()[:4]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n")
    data = [
        "--data",
        tmp_path / "test.jsonl",
        "--images",
        world_folder,
        "--levels",
        "1",
        "--max-new-tokens",
        "6",
    ]
    on_gpu(
        "evaluate.py",
        "--model",
        checkpoint,
        "--temperature",
        temperature,
        "--out",
        tmp_path / "out",
        *data,
    )


def test_the_certificate(checkpoint):
    small = ["--dtypes", "float32", "bfloat16", "--group-sizes", "2", "--new-tokens", "4"]
    on_gpu(ROOT / "rr1" / "certify.py", "--model", checkpoint, *small)
