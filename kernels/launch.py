"""What launchers share: the launch itself, configurations, and checks of arguments before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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

    def grid(self, rows: int, heads: int, block: str = "BLOCK_M") -> tuple[int]:
        return (-(-rows // self.blocks[block]) * heads,)

    def even(self, keys: int) -> bool:
        return keys % self.blocks["BLOCK_N"] == 0


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """Launch on the device of `like`, where Triton takes the current one. Axes 1 and 2 of a grid end at 65,535."""
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def aligned(x: Tensor) -> Tensor:
    """x (B, H, N, d) as kernels take it, or a copy.

    Rows begin at multiples of 16 bytes and are contiguous; offsets within a head are below 2^31.
    """
    if x.data_ptr() % 16 == 0 and _layout_is_aligned(x.shape[2:], x.stride(), 16 // x.element_size()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=1024)
def _layout_is_aligned(shape: torch.Size, strides: tuple[int, ...], unit: int) -> bool:
    return strides[3] == 1 and not any(step % unit for step in strides[:3]) and shape[0] * strides[2] < 2**31


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
