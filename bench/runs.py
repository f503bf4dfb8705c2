"""Runs of the scripts in processes of their own, for the comparisons in this folder. What is
finished stays, what was begun goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rr1 import files
from rr1.evaluation import metrics

ROOT = Path(__file__).resolve().parent.parent


def begin(config, free: set[str]) -> Path:
    """Make config.out, or go on with it; SystemExit if it was begun with other settings, but for
    those in `free`."""
    out = Path(config.out)
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    files.same_settings(out / "config.json", settings)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "config.json", settings)
    return out


def train(config, tasks: dict[str, list], steps: int | None = None) -> None:
    """Train what is not finished yet; each run goes into a folder of its name."""
    folders = {name: Path(config.out) / name for name in tasks}
    todo = {name: command for name, command in tasks.items() if not finished(folders[name], steps)}
    run_all(
        config,
        {name: [*command, "--out", folders[name], "--resume"] for name, command in todo.items()},
    )


def run_all(config, tasks: dict[str, list]) -> None:
    """Run scripts, config.jobs at a time, each in config.processes processes (1 where there is
    no such field); what they print goes to NAME.log in config.out. The first that fails ends
    it with its last lines."""
    jobs, processes = config.jobs, getattr(config, "processes", 1)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = max(1, cores // (jobs * processes))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]

    def run(task: tuple[str, list]) -> None:
        name, (script, *options) = task
        log = Path(config.out) / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{name}: {script} runs, see {log}", flush=True)
        command = [sys.executable, *(several if processes > 1 else []), ROOT / script, *options]
        command = [str(part) for part in command]
        with open(log, "ab") as file:
            done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            end = log.read_text(errors="replace")[-2000:]
            raise SystemExit(
                f"{name} failed with status {done.returncode}; the end of {log}:\n{end}"
            )
        print(f"{name}: done", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, tasks.items()))  # the first error cancels what has not begun


def finished(folder: Path, steps: int | None) -> bool:
    """Whether this run is complete; an error where it was asked for with another number of
    steps."""
    if not (folder / "model" / "config.json").exists():
        return False
    was = json.loads((folder / "config.json").read_text())["steps"]
    if steps not in (None, was):
        raise SystemExit(
            f"{folder} holds a run of {was} steps: give --steps {was}, or another --out"
        )
    return True


def seconds(folder: Path) -> list[float]:
    """What each step of a run took."""
    rows = files.read_lines(folder / "metrics.jsonl")
    return [
        sum(value for name, value in row.items() if name.split("/")[0] == "seconds") for row in rows
    ]


def steps_in(total: float, probe: Path, warm: int = 2) -> int:
    """How many steps like those of a short run, the first ones left out, take `total` seconds."""
    each = sorted(seconds(probe)[warm:])
    return max(1, round(total / each[len(each) // 2]))


def read_rows(path: Path) -> list[dict]:
    """Judged predictions on damaged pictures."""
    return metrics.damaged([metrics.judge(row) for row in files.read_lines(path)])


def same_records(mode: str, models: dict[str, list[dict]], first: str) -> None:
    """SystemExit unless all models answered the records that `first` did, in the same order."""
    keys = [row["key"] for row in models[first]]
    for name, answered in models.items():
        if [row["key"] for row in answered] != keys:
            raise SystemExit(
                f"{mode}: {name} and {first} did not answer the same records; "
                f"delete {mode}/ and run again"
            )
