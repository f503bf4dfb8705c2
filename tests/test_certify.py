"""`python -m rr1.certify`: it holds for a small model, and not where something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rr1 import certify, fast, rollout, vlm

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--group-sizes", "2", "--new-tokens", "6"]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The certificate packs whatever it saves; other tests should not."""
    monkeypatch.setattr(vlm, "PACK_FROM", vlm.PACK_FROM)


def test_a_checkpoint_is_certified(checkpoint, capsys):
    certify.main(["--model", checkpoint, *QUICK])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| float", "| bfloat"))]
    assert len(rows) == 3 * 4 and not any("OVER" in row for row in rows)
    for row in rows[:4]:
        numbers = [float(cell) for cell in row.split("|")[3:5] if cell.strip()]
        assert len(numbers) == (1 if "sampler" in row else 2)
        assert max(numbers) < 1e-12  # far below the limit
    assert sum("plain: packed, separate, G 2" in row for row in rows) == 3


def shifted(packed):
    packed.positions[:, packed.owner == 1] += 1
    return packed


WRONG = {
    "the mask lets a response see another": (
        vlm,
        "attention_mask",
        lambda owner, dtype: None,
    ),
    "the second response is one place too far": (
        vlm,
        "pack",
        lambda *given, real=vlm.pack: shifted(real(*given)),
    ),
    "the scorer forgets the temperature": (vlm, "scale_logits", lambda logits, *_: logits),
    "a gradient is lost on the way": (
        vlm,
        "embed",
        lambda *given, real=vlm.embed: real(*given).detach(),
    ),
    "the fast mask is that of the prompt alone": (fast, "additive", None),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_seen(checkpoint, capsys, monkeypatch, what):
    owner, name, wrong = WRONG[what]
    if name == "additive":
        real = fast.additive

        def wrong(visible, share, dtype):
            return real(torch.ones_like(visible), share, dtype)

    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(SystemExit) as stopped:
        certify.main(["--model", checkpoint, "--dtypes", "float32", *QUICK])
    assert stopped.value.code == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "OVER 1e-04" in line]
    assert lines and (owner is vlm or not any("plain" in line for line in lines))


def test_a_sampler_that_is_wrong_is_seen(checkpoint, capsys, monkeypatch):
    step = rollout.decoding_step

    def late(model, embeddings, position, visible, cache):
        return step(model, embeddings, position + 1, visible, cache)

    monkeypatch.setattr(rollout, "decoding_step", late)
    with pytest.raises(SystemExit):
        certify.main(["--model", checkpoint, "--dtypes", "float32", *QUICK])
    over = [line for line in capsys.readouterr().out.splitlines() if "OVER" in line]
    assert len(over) == 1 and "plain: sampler, scorer" in over[0]


def test_two_processes_are_held_against_one(checkpoint):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "rr1.certify", "--model", checkpoint, "--dtypes", "float64", *QUICK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes, one") == 2 and "OVER" not in done.stdout
