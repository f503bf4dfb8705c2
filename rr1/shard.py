"""One model over N processes: each keeps an N-th of every parameter, gradient and optimizer state (FSDP2, torch's `fully_shard`).

    spread     rank 0's weights to all: nobody else reads them
    forward    function(model, ..) as a forward pass: a layer is gathered when its turn comes and let go after it
    gathered   function(model, ..) with all layers gathered once, for many passes: sampling
    pieces     whole tensors out of the shards, one at a time
    load_model, restore_optimizer    and back into them

What is not sharded goes through the same functions and nothing happens to it. All processes call every function here, in the
same order. A forward pass and its backward pass make collectives that all must make: as many passes on every process, whatever
the data (the scripts share batches out evenly). Inside a pass, and while sampling, what a process does is its own.
"""
from __future__ import annotations

from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rr1.runtime import Runtime, broadcast_parameters


def shard(model, rt: Runtime):
    """Shard the language model of rank 0 in place, layer by layer, on the devices (the others may bring it as mere shapes): every decoder
    layer is gathered as one piece, the embedding (which is the projection to the vocabulary too, where tied) and the last norm as
    another. The frozen vision tower stays whole.

    Shards are in the parameters' own dtype (float32: master weights). Layers are gathered in `rt.dtype`, so a GPU receives bfloat16,
    which autocast would make of them anyway; embedding and last norm in float32, so hidden states add up in float32 from layer
    to layer as they do on one GPU. Gradients are reduced in float32, and summed: each loss is already divided by the global count.
    """
    if rt.world_size == 1:
        return model.to(rt.device)
    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    visual, layers = model.model.visual, model.model.language_model.layers
    for layer in layers:
        spread(layer, rt)
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(rt.dtype, torch.float32, cast_forward_inputs=False))
    spread(model, rt)                                                # what is left: embedding, last norm, vision tower
    trained = any(p.requires_grad for p in layers.parameters())      # then the backward pass needs the outer piece at once
    fully_shard(model, mesh=mesh, ignored_params=set(visual.parameters()), reshard_after_forward=not trained)
    for module in (model, *layers):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    model.run = MethodType(lambda model, call: call(), model)        # FSDP gathers and frees around this method
    register_fsdp_forward_method(model, "run")
    return model


@torch.no_grad()
def spread(module, rt: Runtime) -> None:
    """Bring rank 0's parameters and buffers to every process's device; those that are sharded already stay. The other processes may have
    mere shapes (device "meta"). Tensors keep their identity, so what is tied stays tied."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if not isinstance(tensor, DTensor):
            here = tensor.detach().to(rt.device) if rt.is_main else torch.empty_like(tensor, device=rt.device)
            dist.broadcast(here, src=0)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fresh = torch.nn.Parameter(here, tensor.requires_grad) if is_parameter else here.detach()  # `here` itself gloo may still hold
            torch.utils.swap_tensors(tensor, fresh)


def forward(model, function: Callable, *args: Any, **options: Any) -> Any:
    """function(model, *args, **options), where the function calls parts of the model and not `model.forward`. It runs the layers once."""
    call = partial(function, model, *args, **options)
    return model.run(call) if isinstance(model, FSDPModule) else call()


@torch.no_grad()
def gathered(model, function: Callable, *args: Any, **options: Any) -> Any:
    """function(model, *args, **options), where the function runs the layers many times, without gradient: each process then holds the
    whole language model (in `rt.dtype`) from the first line to the last, and no token costs a collective."""
    if not isinstance(model, FSDPModule):
        return function(model, *args, **options)
    layers = model.model.language_model.layers

    def call(model):
        for layer in layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        return function(model, *args, **options)

    result = forward(model, call)
    for layer in layers:
        layer.set_reshard_after_forward(True)
        layer.reshard()
    model.reshard()
    return result


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def pieces(named: Iterable[tuple[str, torch.Tensor]], keep: bool, limit: int = 2**32) -> Iterator[dict[str, torch.Tensor]]:
    """Named tensors -> dicts of whole tensors on the CPU, each of `limit` bytes at most or of one tensor. They are gathered one by one, and
    only where `keep` (rank 0) is one kept; elsewhere a single empty dict comes out."""
    piece, size = {}, 0
    for name, tensor in named:
        tensor = whole(tensor)
        if keep:
            if piece and size + tensor.nbytes > limit:
                yield piece
                piece, size = {}, 0
            piece[name], size = tensor.detach().cpu().contiguous(), size + tensor.nbytes
    yield piece


@torch.no_grad()
def fill(target: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a whole tensor into `target`, of which this process may have a shard."""
    if isinstance(target, DTensor):
        tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return target.copy_(tensor)


def save_model(model, folder: Path, rt: Runtime) -> None:
    """Write an ordinary checkpoint folder, from rank 0."""
    weights = {}
    if isinstance(model, FSDPModule):    # parameters alone: the model has no other state, and tied ones come once
        for piece in pieces(model.named_parameters(), rt.is_main):
            weights |= piece
    if rt.is_main:
        model.save_pretrained(folder, **({"state_dict": weights} if weights else {}))


def load_model(model, folder: Path, rt: Runtime) -> None:
    """Fill the model from a checkpoint folder, which rank 0 reads; parameter by parameter where it is sharded."""
    saved = {}
    if rt.is_main:  # by from_pretrained, since the names on disk need not be those of the state dict
        widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
        plain = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
        saved = plain.from_pretrained(folder, dtype=widest).state_dict()
    if not isinstance(model, FSDPModule):
        if rt.is_main:
            model.load_state_dict(saved)
        return broadcast_parameters(model, rt)
    for name, p in model.named_parameters():
        tensor = saved[name].to(p.device, p.dtype) if rt.is_main else torch.empty(p.shape, dtype=p.dtype, device=p.device)
        dist.broadcast(tensor, src=0)
        fill(p, tensor)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the optimizer, each with the name "name of the parameter/key"."""
    names = {p: name for name, p in model.named_parameters()}
    return ((f"{names[p]}/{key}", value) for p, state in optimizer.state.items() for key, value in state.items())


def restore_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module, files: Iterable[Path]) -> None:
    """Undo `optimizer_tensors` in place, from the files that hold its pieces. Every process reads them, tensor by tensor."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for file in files:
        with safe_open(file, "pt") as tensors:
            for path in tensors.keys():
                name, key = path.rsplit("/", 1)
                p, tensor = parameters[name], tensors.get_tensor(path)  # copied, as the file will be deleted
                optimizer.state[p][key] = fill(torch.zeros_like(p, dtype=tensor.dtype), tensor) if tensor.ndim else tensor.to(p.device, copy=True)
