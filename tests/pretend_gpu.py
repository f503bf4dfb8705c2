"""A pretended GPU, so that a device mistake fails on a machine without one.

    python tests/pretend_gpu.py train_grpo.py --steps 2 ..      # as if there were one GPU

Tensors are computed on the CPU, but each carries the device that the program believes it to be on,
and an operation on tensors of two devices fails as on CUDA. As on CUDA these are allowed: CPU
scalars beside GPU tensors, CPU indices into GPU tensors, copies from one device to the other. It
says nothing about speed, memory, kernels or streams.
"""

import contextlib
import runpy
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
Tensor = torch.Tensor

# those that may be given tensors of two devices
FREE = (
    "copy_",
    "type_as",
    "is_set_to",
    "set_",
    "__deepcopy__",
    "_has_compatible_shallow_copy_type",
)
ROOT = Path(__file__).resolve().parent.parent


def place(tensor: Tensor) -> torch.device:
    """Where the program believes the tensor to be."""
    with torch._C.DisableTorchFunction():
        real = tensor.device
    return getattr(tensor, "_place", CPU) if real == CPU else real


def put(out, device: torch.device):
    """Mark every tensor of a result."""

    def mark(value):
        if isinstance(value, Tensor):
            value._place = device
        return value

    return tree_map(mark, out)


def as_device(value) -> torch.device | None:
    """A device with its number, or None where the value is no device."""
    if isinstance(value, int | str | torch.device) and not isinstance(value, bool):
        with contextlib.suppress(RuntimeError):
            device = torch.device(value)
            return GPU if device.type == "cuda" else device
    return None


def mixed(name: str, args, tensors: list[Tensor]) -> bool:
    """Whether CUDA would refuse: a tensor that is no scalar on the CPU beside one on the GPU."""
    if name in FREE:
        return False
    if name in ("__getitem__", "index"):  # indices may be on the CPU
        return place(args[0]) == CPU
    if name in ("__setitem__", "index_put_", "index_put"):
        tensors = [args[0]] + ([args[2]] if isinstance(args[2], Tensor) else [])
        if place(args[0]) == CPU:  # then nothing may be on the GPU
            return True
    return any(place(t) == CPU and t.dim() > 0 for t in tensors)


class PretendGPU(TorchFunctionMode):
    """Every function of torch comes through here, getters of attributes too."""

    seen = 0  # operations on the pretended GPU

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return self.get(function, args)
        if name == "__set__":
            return self.set(function, args)
        tensors = [
            value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)
        ]
        on_gpu = any(place(t) == GPU for t in tensors)
        self.seen += on_gpu
        if name in ("numpy", "__array__") and on_gpu:
            raise TypeError(f"{name}: can't convert a tensor on {GPU} to numpy (pretended)")
        if name == "cpu":
            return self.move(args[0], CPU, (), {})
        if name == "cuda":
            return self.move(args[0], GPU, (), {})
        if name == "to":
            return self.to(*args, **kwargs)

        wanted = as_device(kwargs.get("device"))
        if wanted == GPU:
            kwargs["device"] = CPU
        target = wanted or (GPU if on_gpu else CPU)
        generator = kwargs.get("generator")
        if target == GPU and generator is not None and generator.device == CPU:
            raise RuntimeError(
                f"{name}: a generator on {CPU} cannot draw on {GPU} (pretended)"
            )
        if on_gpu and mixed(name, args, tensors):
            where = [f"{tuple(t.shape)} on {place(t)}" for t in tensors]
            raise RuntimeError(
                f"{name}: tensors on two devices (pretended): {', '.join(where)}"
            )
        out = function(*args, **kwargs)
        if target not in (CPU, GPU):
            return out
        in_place = isinstance(out, Tensor) and any(out is t for t in tensors)
        return out if in_place else put(out, target)

    def get(self, function, args):
        tensor = args[0]
        attribute = function.__self__.__name__
        if attribute == "device":
            return place(tensor)
        if attribute in ("is_cuda", "is_cpu"):
            return place(tensor).type == attribute.removeprefix("is_")
        out = function(*args)
        return put(out, place(tensor)) if isinstance(out, Tensor) else out

    def set(self, function, args):
        function(*args)
        tensor, value = args
        if isinstance(value, Tensor):
            put(tensor if function.__self__.__name__ == "data" else value, place(value))

    def to(self, tensor: Tensor, *args, **kwargs):
        target, rest = as_device(kwargs.pop("device", None)), []
        kwargs.pop("non_blocking", None)
        for value in args:
            if isinstance(value, Tensor):  # x.to(other): its device and its dtype
                target, value = place(value), value.dtype
            if isinstance(value, torch.dtype):
                rest.append(value)
            else:
                target = as_device(value) or target
        return self.move(tensor, target or place(tensor), rest, kwargs)

    def move(self, tensor: Tensor, target: torch.device, rest, kwargs):
        if target not in (CPU, GPU):
            return tensor.to(target, *rest, **kwargs)
        with torch._C.DisableTorchFunction():
            out = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
            if out is tensor:
                if target == place(tensor):
                    return tensor
                out = tensor.clone()
        return put(out, target)


def install() -> PretendGPU:
    """Let torch.cuda say that there is one GPU."""
    said = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "max_memory_allocated": 0,
        "get_device_name": "a pretended GPU",
        "get_device_capability": (9, 0),
        "get_rng_state_all": [],
    }
    silent = [
        "set_device",
        "synchronize",
        "set_rng_state",
        "set_rng_state_all",
        "empty_cache",
    ]
    silent += ["reset_peak_memory_stats", "manual_seed", "manual_seed_all"]
    for name, value in (said | dict.fromkeys(silent)).items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.default_generators = (torch.default_generator,)
    torch.cuda.device = lambda *_: contextlib.nullcontext()

    class Autocast(torch.autocast):
        def __init__(self, device_type, *args, **options):
            super().__init__(
                "cpu" if device_type == "cuda" else device_type, *args, **options
            )

    torch.autocast = torch.amp.autocast = Autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        real = getattr(torch, name)
        setattr(torch, name, lambda kind="cpu", real=real: real("cpu"))
    copied = torch.nn.Parameter.__deepcopy__
    torch.nn.Parameter.__deepcopy__ = lambda self, memo: put(
        copied(self, memo), place(self)
    )
    made = torch.nn.Parameter.__new__

    def on_its_device(cls, data=None, requires_grad=True):
        parameter = made(cls, data, requires_grad)
        return parameter if data is None else put(parameter, place(data))

    torch.nn.Parameter.__new__ = on_its_device
    return PretendGPU()


if __name__ == "__main__":
    script, sys.argv = sys.argv[1], sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    with install() as mode:
        runpy.run_path(script, run_name="__main__")
    print(f"{mode.seen} operations on a pretended GPU", file=sys.stderr)
