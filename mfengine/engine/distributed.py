"""Ranks and devices: starting them, agreeing between them, and laying the model out over them."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from mfengine.errors import InputError, RankError
from mfengine.model import DiT
from mfengine.ops import Dual, use_attention
from mfengine.ops.backend import fused

T = TypeVar("T")

# A block hands on the gate of its MLP, a view; nothing is done to it in place.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


@dataclass(frozen=True)
class World:
    """This process among all. A single process has no process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, row: list[float]) -> Tensor:
        """Everyone's row of figures, (size, len(row)) float64, by way of the hosts: no device waits for it."""
        mine = torch.tensor(row, dtype=torch.float64)
        if self.size == 1:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows)

    def gather_rows(self, x: Tensor) -> Tensor | None:
        """Everyone's rows, (n, ...) of each rank after those of the ranks before, on the host of rank 0; else None."""
        x = x.cpu()
        if self.size == 1:
            return x
        counts = self.gather([len(x)])[:, 0].long().tolist()
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        everyones = [torch.empty_like(padded) for _ in counts] if self.main else None
        dist.gather(padded, everyones)
        return torch.cat([rows[:n] for rows, n in zip(everyones, counts, strict=True)]) if everyones else None

    def add_up(self, x: Tensor) -> None:
        """Sum of everyone's `x`, in place."""
        if self.size > 1:
            dist.all_reduce(x)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0; every rank gets its result, or its InputError."""
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = action()
            except InputError as error:
                outcome[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]


@contextmanager
def world(device: str, patience: timedelta = timedelta(minutes=10)) -> Iterator[World]:
    """Join the other processes that torchrun started, if it did.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        patience: how long the ranks wait for each other.

    Raises:
        InputError: there is no such device.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("device cuda was asked for, but torch finds no GPU; use --device cpu")
        if local_rank >= torch.cuda.device_count():
            raise RankError(f"local rank {local_rank} has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        here = torch.device("cuda", local_rank)
    else:
        here = torch.device("cpu")
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=patience)
    yield World(rank, size, here)
    if size > 1:  # not after an error: the other ranks may be waiting for this one
        gc.collect()  # sharded modules are in cycles; a group that they hold aborts the interpreter's exit at times
        dist.destroy_process_group()


# ----------------------------------------------------------------------------
# Laying out the model.


def num_shards(ranks: int, replicas: int) -> int:
    """Into how many shards each parameter is divided; InputError unless `replicas` divides the ranks."""
    if ranks % replicas:
        raise InputError(f"replicas {replicas} does not divide the {ranks} rank(s)")
    return ranks // replicas


def prepare_model(
    model: DiT,
    world: World,
    *,
    replicas: int = 1,
    reshard: bool = False,
    compile: bool = False,
    recompute: bool = False,
) -> DiT:
    """Compile, recompute and shard the blocks of `model`, in place.

    Args:
        model: on the host, the same on every rank.
        world: the ranks to shard over.
        replicas: copies of the sharded model (HSDP).
        reshard: free gathered parameters after each forward. If not, one gathering serves the guidance pass, the
            forward and the backward.
        compile: compile each block.
        recompute: keep only the inputs of each block for the backward.

    Raises:
        InputError: replicas does not divide the ranks.
    """
    shards = num_shards(world.size, replicas)
    for block in model.blocks:
        if compile:
            block.forward = torch.compile(block.forward)
        if recompute:
            # A compiled block must be called as in the forward, to save the same tensors.
            block.forward = _recomputed(block.forward, without_tangents=not compile)
    if world.size == 1:
        return model.to(world.device)

    shape: tuple[int, ...] = (world.size,)
    names: tuple[str, ...] = ("shard",)
    if replicas > 1:
        shape, names = (replicas, shards), ("replicate", "shard")
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    # Inputs are not cast: the model itself keeps times, norms and the residual stream in float32.
    half = None if model.compute_dtype == torch.float32 else model.compute_dtype
    full_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for embedder in (model.t_embedder, model.h_embedder, model.y_embedder):
        fully_shard(embedder, mesh=mesh, mp_policy=full_policy, reshard_after_forward=reshard)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return model.to(world.device)  # buffers; the parameters are there already


def reduce_gradients(model: nn.Module, enabled: bool, reshard: bool) -> None:
    """Whether the next backward reduces gradients over the ranks, or only accumulates them.

    In between, gathered parameters stay for the next pass, unless `reshard` is to save memory.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_reshard_after_backward(enabled or reshard)


def free_gathered(model: nn.Module) -> None:
    """Drop gathered parameters, so that the next forward gathers what the shards hold then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _recomputed(forward: Callable[..., Any], without_tangents: bool) -> Callable[..., Any]:
    """Activation checkpointing of a block; its tangents, which no backward needs, can be left out the second time."""

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
                args = tuple(a.primal if isinstance(a, Dual) else a for a in args)
                with use_attention("triton" if fused(args[0]) else "torch"):  # which saves what duals saved
                    return forward(*args)
            return forward(*args)

        return checkpoint(
            run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), backward())
        )

    return call
