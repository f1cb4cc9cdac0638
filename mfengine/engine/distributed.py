"""Distributes a network over ranks: its blocks are compiled, recomputed and sharded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from mfengine.errors import InputError
from mfengine.networks import Network, ShardUnit
from mfengine.ops import Dual
from mfengine.ranks import World

# A block returns the gate of its MLP, which is a view; nothing modifies it in place.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


def num_shards(ranks: int, replicas: int) -> int:
    """The number of shards of each parameter; InputError if `replicas` does not divide the number of ranks."""
    if ranks % replicas:
        raise InputError(f"--replicas must divide the {ranks} rank(s); {replicas} does not")
    return ranks // replicas


def prepare_model(
    model: Network,
    world: World,
    *,
    replicas: int = 1,
    reshard: bool = False,
    compile: bool = False,
    recompute: bool = False,
) -> Network:
    """Compile, recompute and shard the units of `model`, in place.

    Args:
        model: on the host, the same on every rank.
        world: the ranks to shard over. A single one keeps the model whole, unless it has a mesh.
        replicas: copies of the sharded model (HSDP).
        reshard: free gathered parameters after each forward. Otherwise, guidance pass, forward and backward share one
            gathering.
        compile: compile each block.
        recompute: keep only the inputs of each block for the backward.

    Raises:
        InputError: replicas does not divide the number of ranks.
    """
    shards = num_shards(world.size, replicas)
    units = model.shard_units()
    for block in (unit.module for unit in units if unit.block):
        if compile:
            block.forward = torch.compile(block.forward)
        if recompute:
            # The recomputation must call the compiled block as the forward did, to save the same tensors.
            block.forward = _recomputed(block.forward, without_tangents=not compile)
    if not world.sharded:
        return model.to(world.device)

    shape: tuple[int, ...] = (world.size,)
    names: tuple[str, ...] = ("shard",)
    if replicas > 1:
        shape, names = (replicas, shards), ("replicate", "shard")
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    # Inputs are not cast: the model itself keeps times, norms and the residual stream in float32.
    for unit in (*units, ShardUnit(model, model.compute_dtype)):
        dtype = None if unit.dtype == torch.float32 else unit.dtype
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(unit.module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return model.to(world.device)  # moves the buffers; the parameters are there already


def parameter_groups(model: Network) -> list[tuple[ShardUnit, list[nn.Parameter]]]:
    """Groups of parameters that FSDP gathers and reduces together, as `prepare_model` forms them."""
    groups, taken = [], set[nn.Parameter]()
    for unit in (*model.shard_units(), ShardUnit(model, model.compute_dtype)):
        groups.append((unit, [p for p in unit.module.parameters() if p not in taken]))
        taken.update(unit.module.parameters())
    return groups


def reduce_gradients(model: nn.Module, enabled: bool, reshard: bool) -> None:
    """Set whether the next backward reduces gradients over the ranks, or only accumulates them.

    Until the reduction, gathered parameters stay for the next pass, unless `reshard` is to save memory.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_reshard_after_backward(enabled or reshard)


def _recomputed(forward: Callable[..., Any], without_tangents: bool) -> Callable[..., Any]:
    """Activation checkpointing of a block. The recomputation can omit tangents, which no backward needs."""

    def call(*args: Any) -> Any:
        in_backward = False

        @contextmanager
        def backward() -> Iterator[None]:
            nonlocal in_backward
            in_backward = True
            try:
                yield
            finally:
                in_backward = False

        def run(*args: Any) -> Any:
            if in_backward and without_tangents and isinstance(args[0], Dual):
                # Duals with zero tangent rows, so that ops save what they saved the first time.
                args = tuple(Dual(a.primal, a.tangent[:0]) if isinstance(a, Dual) else a for a in args)
            return forward(*args)

        return checkpoint(
            run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), backward())
        )

    return call
