"""Runs of the scripts in processes of their own, for the comparisons in this folder. What is
finished stays, what was begun goes on."""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from rr1 import files

ROOT = Path(__file__).resolve().parent.parent


def begin(config, free: set[str]) -> Path:
    """Make config.out, or go on with it; SystemExit if it was begun with another configuration.
    The fields in `free` may differ."""
    out = Path(config.out)
    files.begin(out, asdict(config), free)
    return out


def train(config, tasks: dict[str, list]) -> None:
    """Train what is not finished yet; each run goes into a folder of its name."""
    unfinished = {}
    for name, command in tasks.items():
        folder = Path(config.out) / name
        if not (folder / "model" / "config.json").exists():
            unfinished[name] = [*command, "--out", folder, "--resume"]
    run_all(config, unfinished)


def run_all(config, tasks: dict[str, list]) -> None:
    """Run scripts, config.jobs at a time; what they print goes to NAME.log in config.out. The
    first that fails ends it with its last lines."""
    environment = {"OMP_NUM_THREADS": str(threads(config)), "PYTHONUNBUFFERED": "1"}
    run = partial(run_one, Path(config.out), os.environ | environment)
    with ThreadPoolExecutor(config.jobs) as pool:
        list(pool.map(run, tasks.items()))  # the first error cancels what has not begun


def threads(config) -> int:
    """Each process's share of the cores."""
    return max(1, (os.cpu_count() or 1) // config.jobs)


def in_processes(config, function, calls: dict) -> dict:
    """What function(*call) returns, by the name of each call; config.jobs at a time."""
    context, share = get_context("spawn"), (threads(config),)
    with ProcessPoolExecutor(config.jobs, context, torch.set_num_threads, share) as pool:
        results = pool.map(function, *zip(*calls.values()))
        return dict(zip(tqdm(calls, function.__name__), results))


def run_one(out: Path, environment: dict[str, str], task: tuple[str, list]) -> None:
    name, (script, *options) = task
    log = out / f"{name}.log"
    print(f"{name}: {script} runs, see {log}", flush=True)
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    with open(log, "ab") as file:
        done = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        end = log.read_text(errors="replace")[-2000:]
        raise SystemExit(
            f"{name} failed with status {done.returncode}; the end of {log}:\n{end}"
        )
    print(f"{name}: done", flush=True)


def seconds(folder: Path) -> list[float]:
    """What each step of a run took."""
    steps = []
    for row in files.read_lines(folder / "metrics.jsonl"):
        steps.append(
            sum(value for name, value in row.items() if name.startswith("seconds"))
        )
    return steps


def steps_in(total: float, probe: Path) -> int:
    """How many steps like those of a short run, the first two left out, take `total` seconds."""
    each = sorted(seconds(probe)[2:])
    return max(1, round(total / each[len(each) // 2]))
