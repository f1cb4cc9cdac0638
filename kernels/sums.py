"""Adds up the partial sums of a kernel's programs in a fixed order: gradients of values that many rows share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Config, Launch, nothing, planned

BLOCK_PARTS, BLOCK_COLS = 16, 128


@triton.jit
def sum_kernel(
    sums_ptr, out0_ptr, out1_ptr, out2_ptr, parts, units,
    UNIT: tl.constexpr, KINDS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Each tensor of `out` (B, width) gets the sum over the parts of one kind in `sums` (B, parts, KINDS, width).

    The width is units * UNIT, which tells Triton that rows of 72 are aligned.
    """
    width = units * UNIT
    batch, kind = (tl.program_id(0) // KINDS).to(tl.int64), tl.program_id(0) % KINDS
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros((BLOCK_COLS,), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        at = ((batch * parts + part) * KINDS + kind)[:, None] * width + cols[None, :]
        total += tl.sum(tl.load(sums_ptr + at, mask=(part < parts)[:, None] & (cols < width)[None, :], other=0.0), 0)
    at = batch * width + cols
    if kind == 0:
        tl.store(out0_ptr + at, total.to(out0_ptr.dtype.element_ty), mask=cols < width)
    elif kind == 1:
        if out1_ptr is not None:
            tl.store(out1_ptr + at, total.to(out1_ptr.dtype.element_ty), mask=cols < width)
    elif out2_ptr is not None:
        tl.store(out2_ptr + at, total.to(out2_ptr.dtype.element_ty), mask=cols < width)


def sum_parts(sums: Tensor, outputs: Sequence[Tensor | None]) -> None:
    """Fill outputs, up to three of (B, D), with the sums over the parts of sums (B, parts, len(outputs), D) float32.

    An output that is None is skipped.
    """
    outputs = (*outputs, None, None)[:3]
    _plan((sums, *outputs), CONFIG)(sums, *outputs)


@planned
def _plan(tensors: Sequence[Tensor | None], config: Config) -> Callable[..., None]:
    sums = tensors[0]
    assert sums is not None
    batch, parts, kinds, width = sums.shape
    if not batch:
        return nothing
    unit = gcd(width, 4)
    return Launch(
        sum_kernel, (batch * kinds, -(-width // BLOCK_COLS)), (parts, width // unit),
        {"UNIT": unit, "KINDS": kinds, "BLOCK_PARTS": BLOCK_PARTS, "BLOCK_COLS": BLOCK_COLS, **config.kwargs},
    )  # fmt: skip


CONFIG = Config(num_warps=1, num_stages=1)
"""One warp, so that a lane stores four columns. Times on a GPU: not measured yet."""
