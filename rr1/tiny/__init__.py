"""The embedded default: a drawn world, a small but real Qwen2.5-VL, its weights. Nothing to
download."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = str(HERE / "base")  # pretrained on captions, open and choice questions
SFT = str(HERE / "sft")  # and then fine-tuned on chains: what train_sft.py makes of it
GRPO = str(HERE / "grpo")  # and then reinforced: what train_grpo.py makes of that
RESTORER = str(HERE / "restorer")  # recovers pictures: what train_recover.py makes
WORLD = Path("runs/tiny-world")  # where the data set is written when first needed


def dataset(split: str) -> str:
    """Path of the drawn world's `train` or `test` file. The world is drawn first if it is not
    there yet (about a minute)."""
    path = WORLD / f"{split}.jsonl"
    if not path.exists():  # in a process of its own, which need not import torch
        places = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
        command = [sys.executable, "-m", "rr1.tiny.world", "--out", str(WORLD)]
        subprocess.run(command, check=True, env=environment)
    from rr1.tiny import world  # here, since it needs OpenCV, and `rr1.tiny.BASE` does not

    with open(path, encoding="utf-8") as file:
        for i, found in enumerate(map(json.loads, islice(file, 16))):
            now = world.sample(i, int(found["id"].split("-")[0])).record
            if {name: found.get(name) for name in now} != now:
                raise SystemExit(
                    f"{WORLD} was drawn by another version of rr1: delete that folder, and it is "
                    "drawn again in a minute"
                )
    return str(path)
