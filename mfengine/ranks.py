"""Ranks and devices: process groups, and exchanges between hosts."""

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
    """This rank and the number of ranks. A single process has no process group unless it is a mesh of one rank."""

    rank: int
    size: int
    device: torch.device
    one_rank_mesh: bool = False
    """a single process also shards its model, over itself"""

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether models are sharded over the ranks, which takes a process group."""
        return self.size > 1 or self.one_rank_mesh

    def gather(self, row: list[float]) -> Tensor:
        """The rows of all ranks, (size, len(row)) float64, exchanged between the hosts without waiting for devices.

        Raises:
            TrainingError: a rank has ended, or has not answered within the timeout.
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
        """The rows (n, ...) of all ranks, concatenated in order of rank, on the host of rank 0; None on other ranks."""
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
        """Sum `x` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result on every rank.

        Raises:
            InputError: on every rank, if the action raises an InputError or OSError.
        """
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
    """Join the process group of torchrun, if torchrun started this process.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        timeout: how long the ranks wait for each other.
        one_rank_mesh: a single process also has a process group, and shards its model over itself.

    Raises:
        InputError: the device is unavailable.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda is unavailable: torch finds no GPU; use --device cpu")
        if local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise RankError(f"local rank {local_rank} has no GPU: start at most {count} process(es) on this host")
        expandable_segments()
        torch.cuda.set_device(local_rank)
        here = torch.device("cuda", local_rank)
    else:
        here = torch.device("cpu")
    joined = World(rank, size, here, one_rank_mesh)
    if joined.sharded:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store = dist.HashStore() if size == 1 else None  # a single process needs no server to meet others
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    yield joined
    if joined.sharded:  # not after an error: the other ranks may be waiting for this one
        gc.collect()  # sharded modules are in cycles, and a process group that they hold can abort at exit
        dist.destroy_process_group()
