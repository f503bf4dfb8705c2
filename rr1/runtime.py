"""What stands around a training loop, and nothing of the method. What a run writes is in `rr1.run_folder`.

    processes    setup, sum_over_ranks, sum_gradients, broadcast_parameters, barrier, main_first, teardown
    training     seed_everything, build_optimizer, cosine_with_warmup
    options      opt, parse_config: a dataclass is the command line
    stopping     Interrupt: Ctrl-C and SIGTERM let the step end, so that it can be saved

With several processes all of them call every function here, in the same order.
"""
from __future__ import annotations

import argparse
import atexit
import ctypes
import math
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from types import UnionType
from typing import Any, Iterable, Iterator, Mapping, Sequence, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

# ---------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Runtime:
    """This process among the others: its rank, how many there are, the device that it computes on."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU that computes in it, float32 everywhere else."""
        return torch.bfloat16 if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32

    def autocast(self) -> torch.autocast:
        """`with rt.autocast():` computes forward passes in `dtype`; does nothing where that is float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def setup(seed: int | None = None) -> Runtime:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs); one process alone under plain `python`.

    With a seed, rank r seeds its global random states with seed + r.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)      # it makes a plan for every new shape, and each decoding step has one
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: where torchrun is killed, no orphan trains on
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        atexit.register(_end)                            # early, so that it runs after what others register, a tracker's last upload
    if seed is not None:
        seed_everything(seed + rank)
    return Runtime(rank, world_size, local_rank, device)


def needs_gpu(rt: Runtime, **flags: bool) -> None:
    """SystemExit where a flag is set that this process's device cannot do."""
    if rt.device.type != "cuda" and (asked := [f"--{name}" for name, value in flags.items() if value]):
        raise SystemExit(f"{' and '.join(asked)}: this needs a GPU with CUDA, and there is none here (computing on {rt.device}); leave it out")


def teardown(rt: Runtime) -> None:
    """Leave the other processes, at the end of `main`."""
    if rt.world_size > 1:
        dist.destroy_process_group()


def _end() -> None:
    """The end of a process that has left the others: at once. Threads of gloo may outlive their group, and now and then they abort an
    interpreter that takes itself apart ("terminate called without an active exception"), after all is done and written."""
    if not dist.is_initialized():
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def barrier(rt: Runtime) -> None:
    """Wait until every process is here."""
    if rt.world_size > 1:
        dist.barrier(device_ids=[rt.local_rank] if rt.device.type == "cuda" else None)


@contextmanager
def main_first(rt: Runtime) -> Iterator[None]:
    """`with main_first(rt):` rank 0 runs the block before the others do: for what the first one makes and the rest find."""
    if not rt.is_main:
        barrier(rt)
    yield
    if rt.is_main:
        barrier(rt)


def sum_over_ranks(values: Mapping[str, float | torch.Tensor], rt: Runtime) -> dict[str, float]:
    """Each value summed over the ranks, in float64, in one collective. All ranks must bring the same names."""
    names = sorted(values)
    totals = torch.stack([torch.as_tensor(values[name], dtype=torch.float64, device=rt.device).detach() for name in names])
    if rt.world_size > 1:
        dist.all_reduce(totals)
    return dict(zip(names, totals.tolist()))


@torch.no_grad()
def sum_gradients(parameters: Iterable[torch.nn.Parameter], rt: Runtime, bucket: int = 2**26) -> None:
    """Replace every `.grad` by its sum over the ranks (not the mean: each loss is already divided by the global count).

    Gradients travel flat, in float32 or better, in buckets of at most `bucket` numbers (256 MB; a small model is one) or one
    parameter. The buckets follow from the shapes alone, so all ranks make the same collectives whatever their data. A missing
    gradient counts as zeros, with one process too: the optimizer then treats it alike however many processes there are.
    Gradients of sharded parameters are left as they are: the backward pass has summed them.
    """
    trainable = [p for p in parameters if p.requires_grad]
    buckets, size = [], 0
    for p in trainable:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if isinstance(p, DTensor):
            continue
        if not buckets or size + p.numel() > bucket:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += p.numel()
    for group in buckets if rt.world_size > 1 else ():
        flat = torch.cat([p.grad.flatten().to(torch.promote_types(p.dtype, torch.float32)) for p in group])
        dist.all_reduce(flat)
        for p, total in zip(group, flat.split([p.numel() for p in group])):
            p.grad.copy_(total.view(p.shape))


@torch.no_grad()
def broadcast_parameters(model: torch.nn.Module, rt: Runtime) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    for tensor in [*model.parameters(), *model.buffers()] if rt.world_size > 1 else ():
        dist.broadcast(tensor.detach(), src=0)


# ----------------------------------------------------------------------------------------------------------- training


def seed_everything(seed: int) -> None:
    """Seed the global random states of `random`, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_optimizer(model: torch.nn.Module, lr: float, weight_decay: float,
                    betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW on what is trainable, with weight decay on matrices and none on biases and norms; fused: without temporaries as large as the model."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: no parameter of the model requires a gradient")
    return torch.optim.AdamW([{"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
                              {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}], lr=lr, betas=betas, fused=True)


def cosine_with_warmup(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Factor on the learning rate when `step` steps are done: linear up to 1, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


# ------------------------------------------------------------------------------------------------------------ options


def opt(default: Any, help: str, choices: Sequence | None = None) -> Any:
    """A field of a configuration: its default, its help text, the values allowed. A list is copied for each instance."""
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"help": help, "choices": choices})


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the script's docstring as it was written."""


def parse_config(config: type, argv: Sequence[str] | None = None, description: str | None = None) -> Any:
    """The command line as an instance of the dataclass `config`: `group_size: int` is --group-size N, a bool is --name and
    --no-name, a list[float] takes one or several values, `X | None` is read as X."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help, allow_abbrev=False)
    hints = get_type_hints(config)
    for f in fields(config):
        kind, choices = hints[f.name], f.metadata.get("choices")
        if get_origin(kind) in (Union, UnionType):
            kind = next(arm for arm in get_args(kind) if arm is not type(None))
        options = {"help": f.metadata.get("help", "").replace("%", "%%") or " "}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            if get_origin(kind) is list:
                kind, options["nargs"] = get_args(kind)[0], "+"
            options |= {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
        default = f.default if f.default_factory is MISSING else f.default_factory()
        options |= {"required": True} if default is MISSING else {"default": default}
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    return config(**vars(parser.parse_args(argv)))


# ----------------------------------------------------------------------------------------------------------- stopping


class Interrupt:
    """`with Interrupt(rt) as interrupt:` turns the first Ctrl-C or SIGTERM into `interrupt.requested`; a second one kills."""

    def __init__(self, rt: Runtime):
        self.rt, self._asked = rt, None

    def __enter__(self) -> Interrupt:
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self._asked is None:
            self._asked = time.monotonic()
            if self.rt.is_main:  # os.write, since a handler may run in the middle of a print
                os.write(2, b"\nending this step, then saving; once more to stop at once\n")
        elif time.monotonic() - self._asked > 1:  # within a second it is one wish: the terminal's signal, and torchrun's copy
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def requested(self) -> bool:
        """Whether any rank was asked to stop. This is a collective: read it once a step, on every rank."""
        return sum_over_ranks({"asked": float(self._asked is not None)}, self.rt)["asked"] > 0
