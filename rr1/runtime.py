"""What stands around a training loop, and nothing of the method.

    processes    setup, check_even, teardown, barrier, main_first
                 sum_over_ranks, sum_gradients
    training     seed_everything, build_optimizer, cosine_with_warmup, update
    logging      Means, Timer
    options      opt, parse_config: a dataclass is the command line
    stopping     Interrupt: Ctrl-C and SIGTERM let the step end, so that it can be saved

With several processes all of them call every function here, in the same order.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import ctypes
import math
import os
import random
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import HfArgumentParser

INF = math.inf
ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Runtime:
    """This process among the others: its rank, how many there are, the device it computes on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU that computes in it, float32 everywhere else."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return torch.float32

    def autocast(self) -> torch.autocast:
        """`with rt.autocast():` computes forward passes in `dtype`."""
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32
        )


def setup(seed: int | None = None) -> Runtime:
    """Join the processes that torchrun started; one process alone under plain `python`.

    They talk by NCCL on GPUs and by gloo on CPUs. With a seed, rank r seeds its global random
    states with seed + r.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # it makes a plan for every new shape, and each decoding step has a new one
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # PR_SET_PDEATHSIG: where torchrun is killed, no orphan trains on
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        atexit.register(_end)  # early, so that it runs after a tracker's last upload
    if seed is not None:
        seed_everything(seed + rank)
    return Runtime(rank, world_size, device)


def check_even(rt: Runtime, option: str, n: int) -> None:
    """SystemExit where n cannot be shared out evenly: all must make as many passes."""
    if n % rt.world_size:
        raise SystemExit(
            f"{option} {n} cannot be shared out evenly to {rt.world_size} processes: "
            f"give a multiple of {rt.world_size}"
        )


def teardown(rt: Runtime) -> None:
    """Leave the other processes, at the end of `main`."""
    if rt.world_size > 1:
        dist.destroy_process_group()


def _end() -> None:
    """End at once a process that has left the others, when all is done and written. One that was
    stopped by an error after that keeps its exit status.

    Threads of gloo may outlive their group, and now and then they abort an interpreter that takes
    itself apart ("terminate called without an active exception").
    """
    main = sys.modules["__main__"]
    # SystemExit ends a script before Python takes its file's name away; other errors are noted
    stopped = main.__spec__ is None and hasattr(main, "__file__")
    if not dist.is_initialized() and not stopped and not hasattr(sys, "last_value"):
        sys.stdout.flush()  # stderr waits for nothing but the end of a line
        os._exit(0)


def barrier(rt: Runtime) -> None:
    """Wait until every process is here."""
    if rt.world_size > 1:
        dist.barrier(device_ids=[rt.device.index] if rt.device.type == "cuda" else None)


@contextmanager
def main_first(rt: Runtime) -> Iterator[None]:
    """`with main_first(rt):` rank 0 runs the block before the others, who find what it made."""
    if not rt.is_main:
        barrier(rt)
    yield
    if rt.is_main:
        barrier(rt)


def sum_over_ranks(
    values: Mapping[str, Any], rt: Runtime, op=dist.ReduceOp.SUM
) -> dict[str, float]:
    """Each number summed (or what `op` says) over the ranks, in float64 and in one collective.

    All ranks must bring the same names.
    """
    names = sorted(values)
    listed = [values[name] for name in names]
    totals = torch.tensor(listed, dtype=torch.float64, device=rt.device)
    if rt.world_size > 1:
        dist.all_reduce(totals, op)
    return dict(zip(names, totals.tolist()))


@torch.no_grad()
def sum_gradients(parameters: Iterable[torch.nn.Parameter], rt: Runtime) -> None:
    """Replace every `.grad` by its sum over the ranks, made in float32 or better.

    It is the sum and not the mean, since each loss is already divided by the global count. A
    missing gradient counts as zeros, with one process too: the optimizer then treats it alike
    however many processes there are, and all ranks make the same collectives whatever their data.
    Gradients of sharded parameters are left as they are: the backward pass has summed them.
    """
    for p in parameters:
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
        if p.requires_grad and rt.world_size > 1 and not isinstance(p, DTensor):
            total = p.grad.to(torch.promote_types(p.dtype, torch.float32))
            dist.all_reduce(total)
            p.grad.copy_(total)


# ---------------------------------------------------------------- training


def seed_everything(seed: int) -> None:
    """Seed the global random states of `random`, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(rt: Runtime) -> dict[str, Any]:
    """The global random states of this process, as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if rt.device.type == "cuda":
        tensors["torch.cuda"] = torch.cuda.get_rng_state(rt.device)
    states = {name: base64.b64encode(t.numpy()).decode() for name, t in tensors.items()}
    states["random"] = random.getstate()
    states["numpy.random"] = np.random.get_state(legacy=False)
    return states


def set_random_states(states: Mapping[str, Any], rt: Runtime) -> None:
    """Undo `random_states`, after JSON made lists of tuples and arrays."""
    version, words, gauss = states["random"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(states["numpy.random"])
    torch.set_rng_state(_bytes(states["torch"]))
    if rt.device.type == "cuda" and "torch.cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["torch.cuda"]), rt.device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def build_optimizer(
    model: torch.nn.Module, lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW on what is trainable, with weight decay on matrices and none on biases and norms.

    It is fused: without temporaries as large as the model.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: no parameter of the model requires a gradient")
    matrices = {
        "params": [p for p in trainable if p.ndim >= 2],
        "weight_decay": weight_decay,
    }
    vectors = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, 0.95), fused=True)


def cosine_with_warmup(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Factor on the learning rate when `step` steps are done: linear up to 1, then half a cosine
    down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def update(
    optimizer: torch.optim.Optimizer, rt: Runtime, lr: float, max_grad_norm: float
) -> float:
    """One optimizer step with the gradients of all processes, which are gone afterwards.

    They are scaled down to `max_grad_norm` together; returns their norm before that. Where it is
    not finite, no rank takes the step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sum_gradients(parameters, rt)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def updates_of(optimizer: torch.optim.Optimizer) -> int:
    """How often it has stepped."""
    return int(next(iter(optimizer.state.values()), {}).get("step", 0))


# ---------------------------------------------------------------- logging


class Means:
    """Means over a step and all processes: add values where they arise, divide once."""

    def __init__(self):
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)
        self.largest: dict[str, float] = {}

    def add(self, name: str, values: Any, count: float | None = None) -> None:
        """Values to be averaged (a number, a list, a tensor); or their sum, of `count` values."""
        values = torch.as_tensor(values, dtype=torch.float64)
        self.totals[name] += values.sum().item()
        self.counts[name] += values.numel() if count is None else float(count)

    def add_largest(self, name: str, value: Any) -> None:
        self.largest[name] = max(self.largest.get(name, -INF), float(value))

    def over_ranks(self, rt: Runtime) -> dict[str, float]:
        """name -> mean (nan: of nothing), or largest. All ranks must have added the same names."""
        totals = sum_over_ranks(self.totals, rt)
        counts = sum_over_ranks(self.counts, rt)
        means = {name: total / (counts[name] or math.nan) for name, total in totals.items()}
        return means | sum_over_ranks(self.largest, rt, dist.ReduceOp.MAX)


class Timer:
    """Seconds of each phase: call `lap` at its end."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._before = time.perf_counter()

    def lap(self, name: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # passes are queued: wait until they are done
        now = time.perf_counter()
        self.seconds["seconds/" + name] = now - self._before
        self._before = now


# ---------------------------------------------------------------- options


def opt(
    default: Any, help: str, choices: Sequence = (), low: float = 0, high: float = INF
) -> Any:
    """A field of a configuration: its default, its help text, and what is allowed: one of
    `choices`, or numbers from `low` to `high`, never nan or infinity."""
    metadata = {"help": help.replace("%", "%%"), "limits": (low, high)}
    if choices:
        metadata["choices"] = choices
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class _Parser(HfArgumentParser):
    """Knows the limits of `opt`, and spells options with dashes. An error is one line."""

    def add_argument(
        self, *names: str, limits: Sequence[float] = (-INF, INF), **options: Any
    ):
        names = [name for name in names if "_" not in name]
        if options.pop("const", False):  # a bool: no value follows its name
            del options["nargs"], options["type"]
            options["action"] = "store_true"
        action = super().add_argument(*names, **options)
        action.limits = limits
        return action

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        found = super().parse_args(argv)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            low, high = action.limits
            for x in value if isinstance(value, list) else [value]:
                if isinstance(x, (int, float)) and not (
                    low <= x <= high and math.isfinite(x)
                ):
                    allowed = f"at least {low}" if high == INF else f"{low} to {high}"
                    self.error(f"{action.option_strings[-1]} {x}: give {allowed}")
        return found

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the script's docstring as it was written, and the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default in (None, "", [], argparse.SUPPRESS) or isinstance(default, bool):
            return action.help
        shown = str(default).strip("[]").replace(f"{ROOT}/", "")
        return f"{action.help} (default: {shown})"


def parse_config(
    config: type, argv: Sequence[str] | None = None, doc: str | None = None
) -> Any:
    """The command line as an instance of the dataclass `config`.

    `group_size: int` is --group-size N, a bool is --name, and --no-name where its default is True,
    a list[float] takes one or several values, `X | None` is read as X.
    """
    module = sys.modules["__main__"].__spec__  # None: a script, which has its own name
    prog = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    parser = _Parser(
        config, prog=prog, description=doc, formatter_class=_Help, allow_abbrev=False
    )
    return config(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------- stopping


class Interrupt:
    """`with Interrupt(rt) as interrupt:` turns the first Ctrl-C or SIGTERM into
    `interrupt.requested`; a second one kills."""

    def __init__(self, rt: Runtime):
        self.rt = rt
        self._asked: float | None = None  # when

    def __enter__(self) -> Interrupt:
        self._handlers = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        if self._asked is None:
            self._asked = time.monotonic()
            if self.rt.is_main:
                # not by print: a handler may run in the middle of one
                os.write(2, b"\nending this step, then saving; once more to stop at once\n")
        elif time.monotonic() - self._asked > 1:
            # within a second it is one wish: the terminal's signal, and torchrun's copy of it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def requested(self) -> bool:
        """Whether any rank was asked to stop. A collective: read it once a step, on every rank."""
        asked = float(self._asked is not None)
        return sum_over_ranks({"asked": asked}, self.rt)["asked"] > 0
