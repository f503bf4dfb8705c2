"""The embedded default: a drawn world, a small but real Qwen2.5-VL, its weights. Nothing to download."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BASE = str(Path(__file__).parent / "base")           # pretrained on captions, open and choice questions
SFT = str(Path(__file__).parent / "sft")             # and then fine-tuned on chains: what train_sft.py makes of it
GRPO = str(Path(__file__).parent / "grpo")           # and then reinforced: what train_grpo.py makes of that
RESTORER = str(Path(__file__).parent / "restorer")   # recovers 56 x 56 pictures: what train_recover.py --stage sft makes
WORLD = Path("runs/tiny-world")                      # where the data set is written when first needed


def dataset(split: str) -> str:
    """Path of the drawn world's `train` or `test` file; draws the world first if it is not there yet (half a minute)."""
    path = WORLD / f"{split}.jsonl"
    if not path.exists():                            # in a process of its own, which need not import torch
        root = str(Path(__file__).resolve().parents[2])
        subprocess.run([sys.executable, "-m", "rr1.tiny.world", "--out", str(WORLD)], check=True,
                       env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])})
    return str(path)
