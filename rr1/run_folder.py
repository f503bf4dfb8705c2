"""What a run leaves behind, and how it goes on from there.

    runs/NAME/   config.json  metrics.jsonl  rollouts.jsonl  curves.png  checkpoints/step-000050/
                 model/

`step` means "steps done". A step is logged first and saved second. The process may be killed at any
moment: what bears its final name is complete, what ends in `.tmp` is rubbish, and `RunFolder.load`
cuts the .jsonl files back to the checkpoint. Nothing is pickled: tensors go to safetensors, the
rest to JSON. With several processes all of them call every method, in the same order, and see the
same folder.
"""

import json
import math
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rr1 import files, runtime, shard
from rr1.curves import draw_curves
from rr1.runtime import Runtime, barrier, random_states, set_random_states, updates_of

SKIPPED = 3  # so many steps in a row without a finite gradient end a run
# options that may differ when a run goes on; scripts add theirs
FREE = {"out", "resume", "steps"}


@dataclass
class RunFolder:
    """A run's folder. `config` is a dataclass with `out`, `resume`, `steps`, `save_every`, `seed`
    and `tracker`; rank 0 writes, all call.

    panels    the plots of curves.png, {title: [names of metrics]}, `*` allowed; none: one a metric
    free      options, besides `FREE`, that may differ when a run goes on
    keep      how many checkpoints stay
    """

    config: Any
    rt: Runtime
    panels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    free: Iterable[str] = ()
    keep: int = 2

    def __post_init__(self):
        self.out = Path(self.config.out)
        self.settings = json.loads(files.to_json(asdict(self.config)))
        self.rows: list[dict] = []
        self.saved_step: int | None = None
        self.done = 0, 0, {}  # steps, updates of the optimizer, random states after them
        self.skipped = 0  # steps in a row whose gradient was not finite
        self._track: Callable | None = None
        self._drawn = time.monotonic()
        try:
            self._check()
        except SystemExit as problem:
            raise SystemExit(problem.code if self.rt.is_main else 1) from None
        barrier(self.rt)  # all ranks have looked before rank 0 writes
        if self.rt.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            for rubbish in [*self.out.glob("*.tmp"), *self.out.glob("checkpoints/*.tmp")]:
                shutil.rmtree(rubbish) if rubbish.is_dir() else rubbish.unlink()
            files.write_json(self.out / "config.json", self.settings)
        barrier(self.rt)

    def _check(self) -> None:
        """SystemExit where this run cannot use this folder."""
        if not (self.out / "metrics.jsonl").exists():
            # a start that failed before its first step
            (self.out / "skipped.json").unlink(missing_ok=True)
            return
        if not self.config.resume:
            raise SystemExit(
                f"{self.out} already holds a run: use --resume to go on with it, or another --out"
            )
        path = self.out / "config.json"
        defaults = asdict(type(self.config)())
        files.same_settings(path, self.settings, FREE.union(self.free), defaults=defaults)

    def say(self, text: str) -> None:
        if self.rt.is_main:
            print(text, flush=True)

    # ---------------------------------------------------------------- while it runs

    def log(self, step: int, metrics: Mapping[str, Any], line: str) -> None:
        """Append to metrics.jsonl, print the line, refresh curves.png."""
        values = {name: float(value) for name, value in metrics.items()}
        if "grad_norm" in values:
            values["skipped"] = float(not math.isfinite(values["grad_norm"]))
            self.skipped = self.skipped + 1 if values["skipped"] else 0
        if not self.rt.is_main:
            return
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self.rows.append({"step": step, **finite})
        files.append_lines(self.out / "metrics.jsonl", self.rows[-1:])
        self.say(line)  # what is said to be done is on disk
        name = self.config.tracker
        if name:
            self._track = self._track or open_tracker(name, self.out, self.settings, step)
            self._track(values, step)
        if time.monotonic() - self._drawn > 60:
            self.draw()

    def dump(self, step: int, rows: Iterable[Mapping]) -> None:
        """Append rows (of rank 0) to rollouts.jsonl."""
        if self.rt.is_main:
            files.append_lines(
                self.out / "rollouts.jsonl", [{"step": step, **row} for row in rows]
            )

    def draw(self) -> None:
        """Write curves.png now."""
        if self.rt.is_main and self.rows:
            draw_curves(self.rows, self.panels, self.out / "curves.png", self.out.name)
        self._drawn = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Every `save_every` steps (0: never) and after the last of `steps`."""
        every = self.config.save_every
        return step == self.config.steps or every > 0 and step % every == 0

    def end_step(self, step: int, stop: bool, model, processor, optimizer) -> None:
        """Save where it is due.

        Asked to `stop`: save, say how to go on, and exit with status 130. After SKIPPED steps in a
        row whose gradient was not finite: save, and exit with what was seen.
        """
        if stop or self.is_due(step) or self.skipped == SKIPPED:
            self.save(step, model, processor, optimizer)
        self.done = step, updates_of(optimizer), random_states(self.rt)
        if self.skipped == SKIPPED:
            why = (
                f"the gradients of the last {SKIPPED} steps were not finite, so none was taken; "
                f"see the end of {self.out}/metrics.jsonl and rollouts.jsonl. Saved as it is after "
                f"step {step}: lower --lr, or find what is odd in these records"
            )
            raise SystemExit(why if self.rt.is_main else 1)
        if stop:
            self.draw()
            self.say(
                f"stopped after step {step}, saved in {self.out}: "
                "the same command with --resume goes on from here"
            )
            raise SystemExit(130)

    @contextmanager
    def kept(self, model, processor, optimizer) -> Iterator[None]:
        """Around the loop: an error does not lose the steps that were done.

        With several processes rank 0 saves alone, since the others may be gone; where the model is
        sharded it cannot, and says where --resume goes on from.
        """
        try:
            yield
        except Exception as error:
            step, updates, states = self.done
            # then the weights are those of a whole step
            between = updates == updates_of(optimizer)
            alone = self.rt.is_main and not isinstance(model, shard.FSDPModule)
            if between and step and alone:
                self.rt = Runtime(device=self.rt.device)
                set_random_states(states, self.rt)
                self.save(step, model, processor, optimizer)
            found = checkpoints(self.out)
            kept = (
                f"--resume goes on from {found[-1].name}"
                if found
                else "nothing was saved yet"
            )
            self.say(f"{type(error).__name__} in step {step + 1}: {kept}")
            raise

    def finish(self, model, processor) -> None:
        """Draw the curves and write `model/`, an ordinary checkpoint folder."""
        folder, new = self.out / "model", self.out / "model.new.tmp"
        self._write_model(model, processor, new)
        if self.rt.is_main:
            if folder.exists():
                remove(folder)
            os.replace(new, folder)
        self.say(f"written: {folder}")
        self.draw()
        barrier(self.rt)

    # ---------------------------------------------------------------- checkpoints

    def _write_model(self, model, processor, folder: Path) -> None:
        shard.save_model(model, folder, self.rt)
        if self.rt.is_main and processor is not None:
            processor.save_pretrained(folder)

    def save(self, step: int, model, processor, optimizer: torch.optim.Optimizer) -> None:
        """Write checkpoints/step-NNNNNN whole or not at all; all but the newest `keep` go.

        It holds model/ (an ordinary checkpoint folder; `processor` None: the model has none),
        optimizer.safetensors, state.json (step, learning rates, configuration) and for each rank a
        rank-N.json with its random states. Nothing in it depends on how the model is sharded. A
        step that is already saved is left alone.
        """
        if step == self.saved_step:
            return
        folder = self.out / "checkpoints" / f"step-{step:06d}"
        temporary = folder.with_name(folder.name + ".tmp")
        if self.rt.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier(self.rt)
        states = {"generators": random_states(self.rt)}
        files.write_json(temporary / f"rank-{self.rt.rank}.json", states, indent=None)
        self._write_model(model, processor, temporary / "model")
        tensors = shard.optimizer_state(model, optimizer)
        if self.rt.is_main:
            save_file(tensors, temporary / "optimizer.safetensors")
            rates = [group["lr"] for group in optimizer.param_groups]
            state = {"step": step, "lr": rates, "config": self.settings}
            files.write_json(temporary / "state.json", state)
        barrier(self.rt)
        if self.rt.is_main:
            os.replace(temporary, folder)
            for old in checkpoints(self.out)[: -self.keep]:
                remove(old)
        barrier(self.rt)
        self.saved_step = step

    def load(self, model, optimizer: torch.optim.Optimizer) -> int:
        """Put everything back as the newest checkpoint has it, bit for bit -> the steps done.

        0 without --resume, or where there is nothing to go on from. Where another number of
        processes wrote it, random states start afresh from the seed and the step.
        """
        folder = None
        step = 0
        if self.config.resume and checkpoints(self.out):
            folder = checkpoints(self.out)[-1]
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            step = state["step"]
        if self.rt.is_main:
            # a start afresh looks at the held-out records again before its first step
            kept = step if folder else -1
            self.rows = files.cut_back(self.out / "metrics.jsonl", kept)
            files.cut_back(self.out / "rollouts.jsonl", kept)
        if folder is None:
            if self.config.resume:
                self.say(f"nothing to resume in {self.out}: starting afresh")
            return 0
        self.say(f"resuming from {folder}")
        shard.load_model(model, folder / "model", self.rt)
        tensors = {}
        for file in folder.glob("optimizer*.safetensors"):  # earlier versions wrote several
            tensors |= load_file(file)
        shard.load_optimizer_state(model, optimizer, tensors)
        for group, rate in zip(optimizer.param_groups, state["lr"]):
            group["lr"] = rate
        # random states last, since loading a model may draw random numbers
        ranks, now = len(list(folder.glob("rank-*.json"))), self.rt.world_size
        if ranks == now:
            path = folder / f"rank-{self.rt.rank}.json"
            states = json.loads(path.read_text(encoding="utf-8"))
            set_random_states(states["generators"], self.rt)
        else:
            numbers = np.random.SeedSequence([self.config.seed, step, self.rt.rank])
            runtime.seed_everything(int(numbers.generate_state(1)[0]))
            self.say(
                f"{ranks} process(es) wrote it, {now} go on: "
                "random states start afresh from seed and step"
            )
        self.saved_step = step
        self.done = step, updates_of(optimizer), random_states(self.rt)
        return step


def checkpoints(out: str | Path) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first."""
    found = Path(out).glob("checkpoints/step-*[0-9]")
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def remove(folder: Path) -> None:
    """Delete a folder, which has another name before it is half deleted."""
    rubbish = folder.with_name(folder.name + ".tmp")
    os.replace(folder, rubbish)
    shutil.rmtree(rubbish)


def open_tracker(
    name: str, out: Path, config: dict, step: int
) -> Callable[[dict, int], None]:
    """A function of (values, step) that reports to wandb or TensorBoard; imported only here."""
    try:
        if name == "wandb":
            import wandb

            run = wandb.init(
                project="rr1", name=out.name, dir=str(out), config=config, resume="auto"
            )
            return run.log
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = f"--tracker {name}: {error}; `pip install {name}` or leave the flag out"
        raise SystemExit(message) from None
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step)

    def track(values: dict, step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return track
