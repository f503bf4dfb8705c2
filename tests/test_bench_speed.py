"""bench/grpo.py and bench/gpu.py: what they count is right, and they run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig

import gpu
import grpo

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "qwen2.5-vl-3b"


# ---------------------------------------------------------------- bench/grpo.py

TURN = """
import sys, grpo
grpo.PHOTO = grpo.Setting(G=4, text=40, new=8, width=112, height=112, hidden=192, head=48,
                          layers=2, vocab=710)
if sys.argv[1] == "inputs":
    grpo.write_inputs(grpo.Path(sys.argv[2]), grpo.PHOTO, 2)
else:
    grpo.main(["--worker", sys.argv[1], "--rounds", "1", "--out", sys.argv[2]])
"""


def test_our_side_of_the_grpo_benchmark(tmp_path):
    """Two turns of each kind in a process of its own, as beside TRL: one picture and one prompt a
    group, and every count that the report asks for."""
    steps = {}
    for kind in ("inputs", "plain", "fast"):
        done = subprocess.run(
            [sys.executable, "-c", TURN, kind, tmp_path],
            cwd=ROOT / "bench",
            input="go\ngo\n",
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("STEP ")]
        steps[kind] = [json.loads(line.removeprefix("STEP ")) for line in lines]
    assert len(steps["plain"]) == len(steps["fast"]) == 2
    for step in steps["plain"] + steps["fast"]:
        counts = step["counts"]
        assert counts["images preprocessed"] == 1
        assert counts["images through the vision tower"] == 1
        assert {counts[f"tokens projected, {phase}"] for phase in grpo.PHASES} == {4 * 8}
        prefilled = counts["prompt tokens prefilled"]
        assert counts["tokens through the language model, rollout"] == prefilled + 4 * 7
        assert set(step["seconds"]) == {"step", *grpo.PHASES} and step["peak_mib"] > 0
    text = grpo.report(steps | {"peer": steps["plain"]})
    assert (
        "| images preprocessed " in text
        and "| TRL / fast.py |" in text
        and "| 1.00 " in text
    )


# ---------------------------------------------------------------- bench/gpu.py


@pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the published config.json of Qwen2.5-VL-3B"
)
def test_the_sizes_of_the_3b_model_are_those_of_its_checkpoint():
    published = Qwen2_5_VLConfig.from_pretrained(REAL).to_dict()
    ours = Qwen2_5_VLConfig(**gpu.QWEN_3B).to_dict()
    for name, value in gpu.QWEN_3B.items():
        if not isinstance(value, dict):
            assert ours[name] == published[name], name
    for part in ("text_config", "vision_config"):
        unsaid = {"architectures", "transformers_version"}
        assert published[part].keys() - unsaid <= ours[part].keys()
        fixed = ["hidden_act", "layer_types", "temporal_patch_size", "in_channels"]
        for name in [*gpu.QWEN_3B[part], *fixed, "use_sliding_window"]:
            assert ours[part].get(name) == published[part].get(name), name


def test_gpu_stops_at_the_first_size_that_does_not_fit(tmp_path, monkeypatch, capsys):
    real, tried = gpu.step, []

    def step(models, rt, new_tokens, case):
        tried.append(case)
        if case.G > 3:
            raise torch.OutOfMemoryError
        return real(models, rt, new_tokens, case)

    cases = {f"G {G}": gpu.Case(G, width=84, height=56) for G in (2, 4, 8)}
    monkeypatch.setattr(gpu, "step", step)
    monkeypatch.setitem(gpu.PARTS, "groups", cases)
    command = f"--sizes tiny --new-tokens 2 --rounds 1 --parts groups --out {tmp_path}"
    gpu.main(command.split())
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert [case.G for case in tried] == [2, 2, 4]
    assert "| G 4 | does not fit" in text and "| G 8" not in text
    first = next(line for line in text.splitlines() if line.startswith("| G 2"))
    assert "| 156 " in first and "does not fit" not in first


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_3b_sizes_ask_for_a_gpu():
    with pytest.raises(SystemExit, match="this needs a GPU"):
        gpu.main([])
