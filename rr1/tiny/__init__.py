"""The embedded default: a drawn world, a small but real Qwen2.5-VL, its weights. Nothing to
download."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

BASE = str(Path(__file__).parent / "base")  # pretrained on captions, open and choice questions
SFT = str(
    Path(__file__).parent / "sft"
)  # and then fine-tuned on chains: what train_sft.py makes of it
GRPO = str(Path(__file__).parent / "grpo")  # and then reinforced: what train_grpo.py makes of that
RESTORER = str(
    Path(__file__).parent / "restorer"
)  # recovers 32 x 32 pictures: what train_recover.py --stage sft makes
WORLD = Path("runs/tiny-world")  # where the data set is written when first needed


def dataset(split: str) -> str:
    """Path of the drawn world's `train` or `test` file; draws the world first if it is not there
    yet (half a minute)."""
    path = WORLD / f"{split}.jsonl"
    if not path.exists():  # in a process of its own, which need not import torch
        root = str(Path(__file__).resolve().parents[2])
        subprocess.run(
            [sys.executable, "-m", "rr1.tiny.world", "--out", str(WORLD)],
            check=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        )
    from rr1.tiny import world  # here, since it needs OpenCV, and `rr1.tiny.BASE` does not

    with open(path, encoding="utf-8") as file:
        for i, found in enumerate(map(json.loads, islice(file, 16))):
            now = world.sample(i, int(found["id"].split("-")[0])).record
            if {name: found.get(name) for name in now} != now:
                raise SystemExit(
                    f"{WORLD} was drawn by another version of rr1: delete that folder, "
                    "and it is drawn again in half a minute"
                )
    return str(path)
