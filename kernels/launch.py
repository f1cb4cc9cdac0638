"""What launchers share: configurations, and checks of arguments before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Config:
    """Tile sizes, warps and pipeline stages of a kernel."""

    def __init__(self, num_warps: int, num_stages: int, **blocks: int) -> None:
        self.blocks = blocks
        self.options = {"num_warps": num_warps, "num_stages": num_stages}

    @property
    def kwargs(self) -> dict[str, Any]:
        return {**self.blocks, **self.options}

    def grid(self, rows: int, others: int, block: str = "BLOCK_M") -> tuple[int, int]:
        return -(-rows // self.blocks[block]), others


def widths(dim: int, least: int = 16) -> tuple[int, int]:
    """A head dim as a power of two and a tail padded to one; `least` columns are the fewest of a tail."""
    head = max(16, 1 << (dim.bit_length() - 1))
    rest = dim - head
    return head, max(least, 1 << (rest - 1).bit_length()) if rest > 0 else 0


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}; accepted are float16, bfloat16 and float32")


def check_like(name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """ValueError unless x has this shape, and the dtype and device of `like`."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be of shape {tuple(shape)}, not {tuple(x.shape)}")
    if x.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype}, not {x.dtype}")
    check_device(name, x, like)


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, not {x.device}")
