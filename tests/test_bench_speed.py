"""bench/grpo.py: what it counts is right, and it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import grpo

ROOT = Path(__file__).resolve().parent.parent


TURN = """
import sys, grpo
grpo.PHOTO = grpo.Setting(G=4, text=40, new=8, width=112, height=112, hidden=192, head=48,
                          layers=2, vocab=730)
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
