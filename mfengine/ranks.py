"""Ranks and devices: starting them, and agreeing between them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mfengine.device import expandable_segments
from mfengine.errors import InputError, RankError, TrainingError, reason

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all. A single process has no process group, unless it is a mesh of its own."""

    rank: int
    size: int
    device: torch.device
    one_rank_mesh: bool = False
    """a single process shards its model too, over itself"""

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether models are sharded over the ranks, which takes a process group."""
        return self.size > 1 or self.one_rank_mesh

    def gather(self, row: list[float]) -> Tensor:
        """Everyone's row of figures, (size, len(row)) float64, by way of the hosts: no device waits for it.

        Raises:
            TrainingError: a rank has ended, or has not come within the timeout.
        """
        mine = torch.tensor(row, dtype=torch.float64)
        if self.size == 1:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(rows, mine)
        except RuntimeError as error:  # gloo's errors have no class of their own
            raise TrainingError(f"another rank has ended or does not answer: {error}") from None
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
        """Run `action` on rank 0; every rank gets its result, or its InputError or OSError as an InputError."""
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = action()
            except InputError as error:
                outcome[1] = str(error)
            except OSError as error:
                outcome[1] = reason(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]


@contextmanager
def world(device: str, timeout: timedelta = timedelta(minutes=10), one_rank_mesh: bool = False) -> Iterator[World]:
    """Join the other processes that torchrun started, if it did.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        timeout: how long the ranks wait for each other.
        one_rank_mesh: a single process has a process group as well, and shards its model over itself.

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
        expandable_segments()
        torch.cuda.set_device(local_rank)
        here = torch.device("cuda", local_rank)
    else:
        here = torch.device("cpu")
    joined = World(rank, size, here, one_rank_mesh)
    if joined.sharded:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store = dist.HashStore() if size == 1 else None  # in this process's memory: there is nobody to meet
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    yield joined
    if joined.sharded:  # not after an error: the other ranks may be waiting for this one
        gc.collect()  # sharded modules are in cycles; a group that they hold aborts the interpreter's exit at times
        dist.destroy_process_group()
