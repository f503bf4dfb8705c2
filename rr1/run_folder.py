"""What a run leaves behind, and how it goes on from there.

    runs/NAME/   config.json  metrics.jsonl  rollouts.jsonl  curves.png  checkpoints/step-000050/  model/

`step` means "steps done". A step is logged first and saved second. The process may be killed at any moment: what bears its
final name is complete, what ends in `.tmp` is rubbish, and `RunFolder.load` cuts the .jsonl files back to the checkpoint.
Nothing is pickled: tensors go to safetensors, the rest to JSON. With several processes all of them call every method, in the
same order, and see the same folder.
"""
from __future__ import annotations

import base64
import json
import math
import os
import random
import shutil
import time
from dataclasses import MISSING, asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from rr1 import shard
from rr1.files import save_figure, to_json, write_text
from rr1.runtime import Runtime, barrier

# ------------------------------------------------------------------------------------------- what a checkpoint is made of


def get_state(generator: Any) -> Any:
    """The state, as JSON, of a torch or numpy Generator, a random.Random, or the modules `random` and `numpy.random`."""
    if isinstance(generator, torch.Generator):
        return base64.b64encode(generator.get_state().numpy().tobytes()).decode()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False) if generator is np.random else generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    """Undo `get_state`, after JSON made lists of tuples and arrays."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif generator is np.random:
        np.random.set_state(state)
    else:
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))


def reseed(generator: Any, seed: int) -> None:
    """Start any of these generators afresh."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed)


def cut_back(path: Path, step: int) -> list[dict]:
    """Drop the rows of a .jsonl file after `step`, and the half-written last line of a killed run; return the rest."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            pass  # half a line is not JSON
    rows = [row for row in rows if row["step"] <= step]
    if path.exists():
        write_text(path, "".join(to_json(row) + "\n" for row in rows))
    return rows


# --------------------------------------------------------------------------------------------------------- the folder

FREE = frozenset({"out", "resume", "steps"})  # fields that may differ when a run goes on; a script adds its own


def checkpoints(out: str | Path) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first; `model/` in each is an ordinary checkpoint folder."""
    return sorted(Path(out).glob("checkpoints/step-*[0-9]"), key=lambda folder: int(folder.name[5:]))


class RunFolder:
    """A run's folder. `config` is a dataclass with `out` and `resume`; rank 0 writes, all ranks call.

    panels    the plots of curves.png: each "names" or "title: names", names separated by spaces, `*` allowed; none: one each
    free      fields of the configuration, besides `FREE`, that may differ when a run goes on
    keep      how many checkpoints stay
    tracker   None, "wandb" or "tensorboard"
    """

    def __init__(self, config: Any, rt: Runtime, panels: Sequence[str] = (), free: Iterable[str] = (), keep: int = 2,
                 tracker: str | None = None):
        self.out, self.resume, self.config = Path(config.out), config.resume, json.loads(to_json(asdict(config)))
        self.rt, self.panels, self.keep, self.tracker, self._track = rt, panels, keep, tracker, None
        self.rows: list[dict] = []
        self.saved_step, self._drawn, self._draw_seconds = None, time.monotonic(), 0.0
        problem = self._problem(FREE.union(free))
        if problem:
            raise SystemExit(problem if rt.is_main else 1)
        barrier(rt)  # all ranks have looked before rank 0 writes
        if rt.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            for rubbish in [*self.out.glob("*.tmp"), *self.out.glob("checkpoints/*.tmp")]:
                shutil.rmtree(rubbish) if rubbish.is_dir() else rubbish.unlink()
            write_text(self.out / "config.json", to_json(self.config, indent=2) + "\n")
        barrier(rt)

    def _problem(self, free: frozenset[str]) -> str | None:
        """Why this run cannot use this folder, and what to do; None where it can."""
        path = self.out / "config.json"
        if not path.exists():
            return None
        if not self.resume:
            return f"{self.out} already holds a run: use --resume to go on with it, or another --out for a new one"
        old, new = json.loads(path.read_text(encoding="utf-8")), self.config
        differences = [f"  {name}: was {old.get(name, 'absent')!r}, now {new.get(name, 'absent')!r}"
                       for name in sorted((old.keys() | new.keys()) - free) if old.get(name, MISSING) != new.get(name, MISSING)]
        if differences:
            return "\n".join([f"--resume cannot go on with the run in {self.out}: its configuration differs.", *differences,
                              "Give the old values, or another --out for a new run."])
        return None

    def log(self, step: int, metrics: Mapping[str, float | torch.Tensor], line: str | None = None) -> None:
        """Append to metrics.jsonl, print one line (by default all metrics; "" for none), refresh curves.png."""
        if not self.rt.is_main:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = "  ".join([f"step {step:5d}", *(f"{k} {v:.4g}" for k, v in values.items())]) if line is None else line
        self.rows.append({"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()})
        self._append("metrics.jsonl", self.rows[-1:])
        if line:  # what is said to be done is on disk
            print(line, flush=True)
        if self.tracker:
            self._track = self._track or open_tracker(self.tracker, self.out, self.config, step)
            self._track(values, step)
        if time.monotonic() - self._drawn > max(20.0, 50 * self._draw_seconds):  # at most 2 % of the time
            self.draw()

    def dump(self, rows: Sequence[Mapping]) -> None:
        """Append rows to rollouts.jsonl (those of rank 0). Each needs its "step", by which a resumed run cuts the file."""
        if not all("step" in row for row in rows):
            raise ValueError(f'every row of rollouts.jsonl needs the key "step": got a row with {sorted(rows[0])}')
        if self.rt.is_main:
            self._append("rollouts.jsonl", rows)

    def _append(self, name: str, rows: Sequence[Mapping]) -> None:
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write("".join(to_json(row) + "\n" for row in rows))

    def draw(self) -> None:
        """Write curves.png now."""
        start = time.monotonic()
        if self.rt.is_main and self.rows:
            draw_curves(self.rows, self.panels, self.out / "curves.png", self.out.name)
        self._drawn = time.monotonic()
        self._draw_seconds = self._drawn - start

    def _generators(self, generators: Mapping[str, Any] | None) -> dict[str, Any]:
        everywhere = {"random": random, "numpy.random": np.random, "torch": torch.default_generator}
        if self.rt.device.type == "cuda":
            everywhere["torch.cuda"] = torch.cuda.default_generators[self.rt.device.index]
        return everywhere | dict(generators or {})

    def save(self, step: int, model: Any, processor: Any, optimizer: torch.optim.Optimizer, state: dict | None = None,
             generators: Mapping[str, Any] | None = None) -> None:
        """Write checkpoints/step-NNNNNN whole or not at all, then delete all but the newest `keep`. `processor` None: the model
        has none. It holds

        model/ (an ordinary checkpoint folder), optimizer.safetensors (a large one in several files), state.json (step, learning
        rates, configuration) and for each rank a rank-N.json: its `state` (any JSON) and its random states, the global ones
        and `generators`. Nothing in it depends on how the model is sharded. A step that is already saved is left alone.
        """
        if step == self.saved_step:
            return
        folder = self.out / "checkpoints" / f"step-{step:06d}"
        temporary = folder.with_name(folder.name + ".tmp")
        if self.rt.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier(self.rt)
        states = {name: get_state(generator) for name, generator in self._generators(generators).items()}
        write_text(temporary / f"rank-{self.rt.rank}.json", to_json({"state": state or {}, "generators": states}))
        shard.save_model(model, temporary / "model", self.rt)
        for n, piece in enumerate(shard.pieces(shard.optimizer_tensors(optimizer, model), self.rt.is_main)):
            if self.rt.is_main:
                save_file(piece, temporary / (f"optimizer-{n}.safetensors" if n else "optimizer.safetensors"))
        if self.rt.is_main:
            if processor is not None:
                processor.save_pretrained(temporary / "model")
            rates = [group["lr"] for group in optimizer.param_groups]
            write_text(temporary / "state.json", to_json({"step": step, "lr": rates, "config": self.config}, indent=2))
        barrier(self.rt)
        if self.rt.is_main:
            os.replace(temporary, folder)
            for old in checkpoints(self.out)[:-self.keep]:
                rubbish = old.with_name(old.name + ".tmp")  # a deletion cut short must not look like a checkpoint
                os.replace(old, rubbish)
                shutil.rmtree(rubbish)
        barrier(self.rt)
        self.saved_step = step

    def load(self, model: Any, optimizer: torch.optim.Optimizer, generators: Mapping[str, Any] | None = None) -> dict | None:
        """With --resume, put everything back as the newest checkpoint has it, bit for bit, and return its `state` with
        "step" added; None where there is nothing to go on from. Where another number of processes wrote it, random states start
        afresh from the seed and the step, and `state` is rank 0's."""
        folder = next(reversed(checkpoints(self.out)), None) if self.resume else None
        common = json.loads((folder / "state.json").read_text(encoding="utf-8")) if folder else {"step": -1}
        if self.rt.is_main:
            self.rows = cut_back(self.out / "metrics.jsonl", common["step"])
            cut_back(self.out / "rollouts.jsonl", common["step"])
            if self.resume:
                print(f"resuming from {folder}" if folder else f"nothing to resume in {self.out}: starting afresh", flush=True)
        if folder is None:
            return None
        ranks = len(list(folder.glob("rank-*.json")))
        as_before = ranks == self.rt.world_size
        mine = json.loads((folder / f"rank-{self.rt.rank if as_before else 0}.json").read_text(encoding="utf-8"))
        current = self._generators(generators)
        if current.keys() != mine["generators"].keys():
            raise ValueError(f"{folder} has the random states {sorted(mine['generators'])}, the script has {sorted(current)}")
        shard.load_model(model, folder / "model", self.rt)
        shard.restore_optimizer(optimizer, model, folder.glob("optimizer*.safetensors"))
        for group, rate in zip(optimizer.param_groups, common["lr"]):
            group["lr"] = rate
        if self.rt.is_main and not as_before:
            print(f"{ranks} process(es) wrote it, {self.rt.world_size} go on: random states start afresh from seed and step", flush=True)
        for place, (name, generator) in enumerate(current.items()):  # last, since loading a model may draw random numbers
            if as_before:
                set_state(generator, mine["generators"][name])
            else:
                numbers = np.random.SeedSequence([self.config.get("seed", 0), common["step"], self.rt.rank, place])
                reseed(generator, int(numbers.generate_state(1)[0]))
        self.saved_step = common["step"]
        return mine["state"] | {"step": common["step"]}

    def end_step(self, step: int, stop: bool, *checkpoint: Any) -> None:
        """`save(step, *checkpoint)` every `save_every` steps of the configuration, after the last of its `steps`, and when asked to
        `stop`: then say how to go on, and exit with status 130."""
        if stop or step % self.config["save_every"] == 0 or step == self.config["steps"]:
            self.save(step, *checkpoint)
        if stop:
            self.draw()
            if self.rt.is_main:
                print(f"stopped after step {step}, saved in {self.out}: the same command with --resume goes on from here", flush=True)
            raise SystemExit(130)

    def finish(self, model: Any, processor: Any) -> None:
        """Draw the curves and write `model/`, an ordinary checkpoint folder, in place of an older one."""
        folder, temporary, old = (self.out / name for name in ("model", "model.tmp", "model.old.tmp"))
        shard.save_model(model, temporary, self.rt)
        if self.rt.is_main:
            if processor is not None:
                processor.save_pretrained(temporary)
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)
            print(f"written: {folder}")
        self.draw()
        barrier(self.rt)


def open_tracker(name: str, out: Path, config: dict, step: int) -> Callable[[dict, int], None]:
    """A function of (values, step) that reports to wandb or TensorBoard; imported only here."""
    try:
        if name == "wandb":
            import wandb
            return wandb.init(project="rr1", name=out.name, dir=str(out), config=config, resume="auto").log
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit(f"--tracker {name}: {error}; `pip install {name}` or leave the flag out") from None
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step)

    def track(values: dict, step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return track


# ------------------------------------------------------------------------------------------------------------ the curves

def draw_curves(rows: Sequence[Mapping], panels: Sequence[str], path: Path, title: str) -> None:
    """Plot rows of metrics over their steps: single steps light, a moving average over them. Panels as in `RunFolder`."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "step"))
    plots = [(heading, [key for key in keys if any(fnmatchcase(key, name) for name in names.split())])
             for heading, _, names in (panel.rpartition(": ") for panel in panels or keys)]
    plots = [(heading or " ".join(names), names) for heading, names in plots if names]
    columns = min(3, len(plots))
    lines = -(-len(plots) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.8 * lines + 0.4), dpi=100, layout="constrained")
    figure.suptitle(f"{title}, step {rows[-1]['step']}")
    for place, (heading, names) in enumerate(plots, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for colour, name in enumerate(names):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            steps, values = np.array(points, dtype=float).reshape(-1, 2).T
            axes.plot(steps, values, ".-", linewidth=0.6, markersize=4, alpha=0.35, color=f"C{colour}", markeredgewidth=0)
            axes.plot(steps, smooth(smooth(values)), linewidth=1.8, color=f"C{colour}", label=name)
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(fontsize=7, frameon=False)
    save_figure(figure, path)


def smooth(values: np.ndarray, share: float = 1 / 15) -> np.ndarray:
    """Moving average over this share of the curve, over what there is of it at the ends."""
    here, half = np.arange(len(values)), int(len(values) * share / 2)
    low, high = np.maximum(here - half, 0), np.minimum(here + half + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[high] - total[low]) / (high - low)
