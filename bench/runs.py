"""Runs of the scripts in processes of their own, for the comparisons in this folder. What is finished stays, what was begun goes on."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rr1.evaluation import metrics
from rr1.files import to_json, write_text

ROOT = Path(__file__).resolve().parent.parent
MODES = {"sampled": "1", "greedy": "0"}                         # temperatures at which the models answer


def begin(config, free: set[str]) -> Path:
    """Make config.out, or go on with it; SystemExit if it was begun with another configuration, but for the fields in `free`."""
    out, settings = Path(config.out), {name: value for name, value in asdict(config).items() if name not in free}
    path = out / "config.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    if differ := [f"  {name}: was {old.get(name)!r}, now {value!r}" for name, value in settings.items() if old.get(name) != value]:
        raise SystemExit("\n".join([f"{out} was begun with other settings:", *differ, "Give the old ones, or another --out."]))
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json(settings, indent=2) + "\n")
    return out


def train(config, tasks: dict[str, list], steps: int | None = None) -> None:
    """Train what is not finished yet; each run goes into a folder of its name."""
    folders = {name: Path(config.out) / name for name in tasks}
    run_all(config, {name: [*command, "--out", folders[name], "--resume"] for name, command in tasks.items()
                     if not finished(folders[name], steps)})


def run_all(config, tasks: dict[str, list]) -> None:
    """Run scripts, config.jobs at a time, each in config.processes processes (1 where there is no such field); what they print
    goes to NAME.log in config.out. The first that fails ends it with its last lines."""
    jobs, processes = config.jobs, getattr(config, "processes", 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // (jobs * processes))), "PYTHONUNBUFFERED": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []

    def run(task: tuple[str, list]) -> None:
        name, (script, *options) = task
        log = Path(config.out) / f"{name}.log"
        print(f"{name}: {script} runs, see {log}", flush=True)
        with open(log, "ab") as file:
            command = [sys.executable, *torchrun, str(ROOT / script), *map(str, options)]
            status = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        if status:
            raise SystemExit(f"{name} failed with status {status}; the end of {log}:\n" + log.read_text(errors="replace")[-2000:])
        print(f"{name}: done", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, tasks.items()))                              # the first error cancels what has not begun


def finished(folder: Path, steps: int | None) -> bool:
    """Whether this run is complete; an error where it was asked for with another number of steps."""
    if not (folder / "model" / "config.json").exists():
        return False
    was = json.loads((folder / "config.json").read_text())["steps"]
    if steps not in (None, was):
        raise SystemExit(f"{folder} holds a run of {was} steps: give --steps {was}, or another --out")
    return True


def seconds(folder: Path) -> list[float]:
    """What each step of a run took."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [sum(value for name, value in row.items() if name.split("/")[0] == "seconds") for row in rows]


def read_rows(path: Path) -> list[dict]:
    """Judged predictions on damaged pictures."""
    return metrics.damaged([metrics.judge(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()])


def same_records(mode: str, models: dict[str, list[dict]], first: str) -> None:
    """SystemExit unless all models answered the records that `first` did, in the same order."""
    keys = [row["key"] for row in models[first]]
    for name, answered in models.items():
        if [row["key"] for row in answered] != keys:
            raise SystemExit(f"{mode}: {name} and {first} did not answer the same records; delete {mode}/ and run again")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
