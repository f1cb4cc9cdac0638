"""Bias and GELU (tanh form) in one pass: primal, dual, and a backward that recomputes.

o = gelu(x + b);  do = gelu'(x + b) * dx. Nothing is stored but x, which the product before it made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Config, check_device, check_dtype, launch

BLOCK_ROWS, BLOCK_COLS = 8, 512  # which divides 4 * 1152
ROWS_PER_PROGRAM = 64  # of the backward, which adds up the bias's gradient over so many rows before writing


@triton.jit
def _gelu_and_slope(x):
    """gelu(x) = x P and its derivative, P + P (1 - P) x i', with i = 2 c (x + 0.044715 x^3), P = 1 / (1 + exp(-i)).

    P is (1 + tanh(i / 2)) / 2. The exponential to base 2 and the polynomials in x^2 take the fewest instructions.
    """
    TWO_C: tl.constexpr = 1.5957691216057308  # c = sqrt(2 / pi)
    LOG2_E: tl.constexpr = 1.4426950408889634
    square = x * x
    below = 1.0 + tl.exp2(x * (-TWO_C * LOG2_E - TWO_C * LOG2_E * 0.044715 * square))
    half = 1.0 / below
    return x / below, half + half * (x * (TWO_C + TWO_C * 3 * 0.044715 * square) * (1.0 - half))


@triton.jit
def forward_kernel(x, bias, dx, o, do, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Dual if there is a dx: without, dx and do are None."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (cols < width)[None, :]
    at = row[:, None] * width + cols[None, :]
    b = tl.load(bias + cols, mask=cols < width, other=0.0).to(tl.float32)
    value, slope = _gelu_and_slope(tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + b[None, :])
    if dx is not None:
        tangent = slope * tl.load(dx + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(do + at, tangent.to(do.dtype.element_ty), mask=mask)
    tl.store(o + at, value.to(o.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, bias, go, gx, sums, rows, width, STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """`sums` (parts, width): this part's gradient of the bias."""
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b = tl.load(bias + cols, mask=cols < width, other=0.0).to(tl.float32)
    gbias = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(STEPS):
        row = ((tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (cols < width)[None, :]
        at = row[:, None] * width + cols[None, :]
        _, slope = _gelu_and_slope(tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + b[None, :])
        gradient = slope * tl.load(go + at, mask=mask, other=0.0).to(tl.float32)
        gbias += gradient
        tl.store(gx + at, gradient.to(gx.dtype.element_ty), mask=mask)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + cols, tl.sum(gbias, 0), mask=cols < width)


# ----------------------------------------------------------------------------
# Launchers. They raise ValueError for arguments that the kernels cannot take, before anything is launched.


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias): x (..., F), bias (F,), float16, bfloat16 or float32, contiguous; returns x's shape and dtype."""
    check_arguments(x, bias)
    o = torch.empty_like(x)
    _launch_forward(x, bias, None, o, None)
    return o


def forward_dual(x: Tensor, bias: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """`forward`, with the tangent of the last K rows of x's first dimension, from theirs, dx (K, ..., F)."""
    check_arguments(x, bias)
    check_device("dx", dx, x)
    check_arguments(dx, bias, prefix="d")
    if dx.shape[1:] != x.shape[1:] or dx.shape[0] > x.shape[0]:
        raise ValueError(
            f"dx must be (K, ...) like x {tuple(x.shape)} with K at most {x.shape[0]}, not {tuple(dx.shape)}"
        )
    first = x.shape[0] - dx.shape[0]
    o, do = torch.empty_like(x), torch.empty_like(dx)
    _launch_forward(x[:first], bias, None, o[:first], None)
    _launch_forward(x[first:], bias, dx, o[first:], do)
    return o, do


def backward(x: Tensor, bias: Tensor, go: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of bias, in their dtypes, from that of the output."""
    check_arguments(x, bias)
    if go.shape != x.shape:
        raise ValueError(f"the gradient must be of shape {tuple(x.shape)}, not {tuple(go.shape)}")
    go = go.contiguous()
    gx = torch.empty_like(x)
    width = bias.shape[0]
    rows = x.numel() // width
    parts = -(-rows // ROWS_PER_PROGRAM)
    sums = torch.empty(parts, width, dtype=torch.float32, device=x.device)
    if x.numel():
        launch(
            backward_kernel, (parts, -(-width // BLOCK_COLS)), x,
            x, bias, go, gx, sums, rows, width,
            ROWS_PER_PROGRAM // BLOCK_ROWS, BLOCK_ROWS, BLOCK_COLS, **CONFIGS["backward"].kwargs,
        )  # fmt: skip
    return gx, sums.sum(0).to(bias.dtype)


def _launch_forward(x: Tensor, bias: Tensor, dx: Tensor | None, o: Tensor, do: Tensor | None) -> None:
    if x.numel():
        width = bias.shape[0]
        rows = x.numel() // width
        config = CONFIGS["forward" if dx is None else "dual"]
        launch(
            forward_kernel, (-(-rows // BLOCK_ROWS), -(-width // BLOCK_COLS)), x,
            x, bias, dx, o, do, rows, width, BLOCK_ROWS, BLOCK_COLS, **config.kwargs,
        )  # fmt: skip


def check_arguments(x: Tensor, bias: Tensor, prefix: str = "") -> None:
    for name, a in ((f"{prefix}x", x), ("bias", bias)):
        check_dtype(name, a)
        if not a.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {a.stride()}")
    if bias.ndim != 1 or x.ndim < 2 or x.shape[-1] != bias.shape[0] or not bias.shape[0]:
        raise ValueError(f"bias must be (F,) for {prefix}x (..., F), not {tuple(bias.shape)} for {tuple(x.shape)}")
    check_device("bias", bias, x)


# Times on a GPU: not measured yet.
CONFIGS = {
    "forward": Config(num_warps=4, num_stages=1),
    "dual": Config(num_warps=4, num_stages=1),
    "backward": Config(num_warps=4, num_stages=1, maxnreg=128),  # or the assembler rather spills for one more program
}
