"""One model over N processes: each keeps an N-th of every parameter, gradient and optimizer state.

This is FSDP2, torch's `fully_shard`.

    spread     rank 0's weights to all: nobody else reads them
    broadcast_parameters    the same for a model that is not sharded, and that all have read
    forward    function(model, ..) as a forward pass: a layer is gathered when its turn comes
    gathered   `with gathered(model):` all layers are gathered once, for many passes: sampling
    save_model, load_model, optimizer_state, load_optimizer_state    whole tensors, out and in

What is not sharded goes through the same functions and nothing happens to it. All processes call
every function here, in the same order. A forward pass and its backward pass make collectives that
all must make: as many passes on every process, whatever the data (the scripts share batches out
evenly). Inside a pass, and while sampling, what a process does is its own.
"""

from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rr1.runtime import Runtime, sum_over_ranks

ON_RANK_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model, rt: Runtime):
    """Shard the language model of rank 0 in place, layer by layer, on the devices.

    The other processes may bring it as mere shapes. Every decoder layer is gathered as one piece,
    the embedding (which is the projection to the vocabulary too, where tied) and the last norm as
    another. The frozen vision tower stays whole.

    Shards are in the parameters' own dtype (float32: master weights). Layers are gathered in
    `rt.dtype`, so a GPU receives the bfloat16 that autocast would make of them anyway; embedding
    and last norm in float32, so hidden states add up in float32 from layer to layer as they do on
    one GPU. Gradients are reduced in float32, and summed: each loss is already divided by the
    global count.
    """
    if rt.world_size == 1:
        return model.to(rt.device)
    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    visual, layers = model.model.visual, model.model.language_model.layers
    policy = MixedPrecisionPolicy(rt.dtype, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        spread(layer, rt)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    spread(model, rt)  # what is left: embedding, last norm, vision tower
    # a backward pass would need the outer piece again at once
    trained = any(p.requires_grad for p in layers.parameters())
    frozen = set(visual.parameters())
    fully_shard(model, mesh=mesh, ignored_params=frozen, reshard_after_forward=not trained)
    for module in (model, *layers):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    # FSDP gathers and frees around this method
    model.run = MethodType(lambda model, call: call(), model)
    register_fsdp_forward_method(model, "run")
    return model


@torch.no_grad()
def spread(module, rt: Runtime) -> None:
    """Bring rank 0's parameters and buffers to every process's device.

    The other processes may have mere shapes (device "meta"). Sharded tensors stay as they are.
    Tensors keep their identity, so what is tied stays tied.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        if isinstance(tensor, DTensor):
            continue
        if rt.is_main:
            here = tensor.detach().to(rt.device)
        else:
            here = torch.empty_like(tensor, device=rt.device)
        dist.broadcast(here, src=0)
        fresh = here.detach()  # gloo may still hold `here` itself
        if isinstance(tensor, torch.nn.Parameter):
            fresh = torch.nn.Parameter(fresh, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, fresh)


@torch.no_grad()
def broadcast_parameters(model, rt: Runtime) -> None:
    """Give every rank the parameters and buffers of rank 0, and say so where they differed."""
    if rt.world_size == 1:
        return
    differed = False
    for tensor in [*model.parameters(), *model.buffers()]:
        first = tensor.detach().clone()
        dist.broadcast(first, src=0)
        if not torch.equal(first, tensor):
            differed = True
            tensor.copy_(first)
    ranks = sum_over_ranks({"differed": differed}, rt)["differed"]
    if ranks and rt.is_main:
        print(
            f"the weights that {ranks:.0f} process(es) had read differed: "
            "all go on with those of rank 0",
            flush=True,
        )


def forward(model, function: Callable, *args: Any, **options: Any) -> Any:
    """function(model, *args, **options), where the function calls parts of the model and not
    `model.forward`. It runs the layers once."""
    call = partial(function, model, *args, **options)
    return model.run(call) if isinstance(model, FSDPModule) else call()


@contextmanager
def gathered(model) -> Iterator[None]:
    """`with gathered(model):` for code that runs the layers many times, without gradient.

    Each process then holds the whole language model (in `rt.dtype`) from the first line to the
    last, and no token costs a collective.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    layers = model.model.language_model.layers
    with torch.no_grad():
        model.run(lambda: None)  # FSDP learns which module is the outermost
        model.unshard()
        for layer in layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()
        model.reshard()


def save_model(model, folder: Path, rt: Runtime) -> None:
    """Write an ordinary checkpoint folder, from rank 0."""
    options = {}
    if isinstance(model, FSDPModule):
        state = get_model_state_dict(model, options=ON_RANK_0)
        once = [name for name, _ in model.named_parameters()]  # tied parameters come once
        options["state_dict"] = {name: state[name] for name in once if name in state}
    if rt.is_main:
        model.save_pretrained(folder, **options)


def load_model(model, folder: Path, rt: Runtime) -> None:
    """Fill the model from a checkpoint folder, which rank 0 alone reads."""
    state = {}
    if rt.is_main:
        # by from_pretrained, since names on disk need not be those of the state dict
        kinds = {p.dtype for p in model.parameters()}
        widest = max(kinds, key=lambda dtype: dtype.itemsize)
        classes = type(model).__mro__
        plain = next(kind for kind in classes if not issubclass(kind, FSDPModule))
        state = plain.from_pretrained(folder, dtype=widest).state_dict()
    several = rt.world_size > 1
    options = StateDictOptions(full_state_dict=several, broadcast_from_rank0=several)
    set_model_state_dict(model, state, options=options)


def optimizer_state(model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole tensors of the optimizer by "name of the parameter/key", on rank 0."""
    state = get_optimizer_state_dict(model, optimizer, options=ON_RANK_0).get("state", {})
    return {
        f"{name}/{key}": value.contiguous()
        for name, at in state.items()
        for key, value in at.items()
    }


def load_optimizer_state(model, optimizer: torch.optim.Optimizer, tensors: dict) -> None:
    """Undo `optimizer_state`, in place. Every process brings the whole tensors."""
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    state: dict[str, dict] = defaultdict(dict)
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        state[name][key] = tensor
    both = {"state": state, "param_groups": groups}
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, both, options=options)
    for p, kept in optimizer.state.items():
        for key, value in kept.items():
            # a fused step reads parameter and moments in the order in which they lie in memory
            if value.shape == p.shape and value.stride() != p.stride():
                kept[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
