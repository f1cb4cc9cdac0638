"""What launchers share: the launch itself, configurations, and checks of arguments before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
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


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """Launch on the device of `like`; Triton takes the current one. Axis 0 of a grid takes 2^31 - 1, the others 65,535."""
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def addressing(*tensors: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Strides of tensors (B, H, N, d) of one dtype as kernels take them, and the constants UNIT and INDEX.

    Triton knows of an integer argument only whether it is a multiple of 16, which the strides of heads of 72 columns
    are not. UNIT is the number of elements in 16 bytes where all addresses of rows are multiples of 16 bytes: all
    strides but the last, which is 1, then count units. Elsewhere it is 1. INDEX is the type of offsets within a head.
    """
    unit = 1 if any(x.data_ptr() % 16 for x in tensors) else 16 // tensors[0].element_size()
    return _addressing(unit, tuple(x.stride() for x in tensors), tuple(x.shape[2:] for x in tensors))


@lru_cache(maxsize=4096)
def _addressing(
    unit: int, strides: tuple[tuple[int, ...], ...], shapes: tuple[torch.Size, ...]
) -> tuple[tuple[int, ...], dict[str, Any]]:
    spans = (
        sum((n - 1) * step for n, step in zip(s, x[2:], strict=True)) for s, x in zip(shapes, strides, strict=True)
    )
    wide = max(spans) >= 2**31
    if wide or any(x[3] != 1 or x[0] % unit or x[1] % unit or x[2] % unit for x in strides):
        unit = 1
    counted = tuple(step if i == 3 else step // unit for x in strides for i, step in enumerate(x))
    return counted, {"UNIT": unit, "INDEX": tl.int64 if wide else tl.int32}


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
