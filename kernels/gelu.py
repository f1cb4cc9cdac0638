"""Bias and GELU (tanh form) in one pass: primal, dual, and a backward that recomputes.

o = gelu(x + b);  do = gelu'(x + b) * dx. Only x is stored, which the preceding product has written anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Config, Launch, check_device, check_dtype, empty_like, nothing, planned
from mfengine.kernels.sums import sum_parts

BLOCK_ROWS, BLOCK_COLS = 8, 512  # 512 divides 4 * 1152
ROWS_PER_PROGRAM = 64  # in the backward: a program sums the bias's gradient over this many rows before it writes


@triton.jit
def _gelu_and_slope(x):
    """gelu(x) = x P and its derivative, P + P (1 - P) x i', with i = 2 c (x + 0.044715 x^3), P = 1 / (1 + exp(-i)).

    P is (1 + tanh(i / 2)) / 2. An exponential to base 2 and polynomials in x^2 take the fewest instructions.
    """
    TWO_C: tl.constexpr = 1.5957691216057308  # c = sqrt(2 / pi)
    LOG2_E: tl.constexpr = 1.4426950408889634
    square = x * x
    below = 1.0 + tl.exp2(x * (-TWO_C * LOG2_E - TWO_C * LOG2_E * 0.044715 * square))
    half = 1.0 / below
    return x / below, half + half * (x * (TWO_C + TWO_C * 3 * 0.044715 * square) * (1.0 - half))


@triton.jit
def forward_kernel(x, bias, dx, o, do, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A dual if there is a dx; otherwise dx and do are None."""
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
    """`sums` (parts, width) gets this part's gradient of the bias."""
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
# Launchers. They raise ValueError for arguments that the kernels do not support, before anything is launched.


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias): x (..., F), bias (F,), float16, bfloat16 or float32, contiguous; returns x's shape and dtype."""
    launch = _plan_forward((x, bias), CONFIGS["forward"])
    o = empty_like(x)
    launch(x, bias, None, o, None)
    return o


def forward_dual(x: Tensor, bias: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Like `forward`, with the tangent of the last K entries of x's first dimension, from dx (K, ..., F)."""
    lead, tail = _plan_dual((x, bias, dx), CONFIGS["forward"], CONFIGS["dual"])
    o, do = empty_like(x), empty_like(dx)
    lead(x, bias, None, o, None)
    tail(x, bias, dx, o, do)
    return o, do


def backward(x: Tensor, bias: Tensor, go: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias, in their dtypes, from that of the output."""
    go = go.contiguous()
    launch, parts = _plan_backward((x, bias, go), CONFIGS["backward"])
    gx = empty_like(x)
    sums = torch.empty(1, parts, 1, bias.shape[0], dtype=torch.float32, device=x.device)
    gbias = empty_like(bias)
    launch(x, bias, go, gx, sums)
    sum_parts(sums, (gbias[None],))
    return gx, gbias


@planned
def _plan_forward(tensors: tuple[Tensor, Tensor], config: Config) -> Callable[..., None]:
    check_arguments(*tensors)
    return _forward(*tensors, 0, len(tensors[0]), config)


@planned
def _plan_dual(
    tensors: tuple[Tensor, Tensor, Tensor], forward: Config, dual: Config
) -> tuple[Callable[..., None], Callable[..., None]]:
    x, bias, dx = tensors
    check_arguments(x, bias)
    check_device("dx", dx, x)
    check_arguments(dx, bias, prefix="d")
    if dx.shape[1:] != x.shape[1:] or len(dx) > len(x):
        raise ValueError(f"dx must be (K, ...) like x {tuple(x.shape)} with K at most {len(x)}, not {tuple(dx.shape)}")
    first = len(x) - len(dx)
    return _forward(x, bias, 0, first, forward), _forward(x, bias, first, len(x), dual)


def _forward(x: Tensor, bias: Tensor, first: int, last: int, config: Config) -> Callable[..., None]:
    """The launch for entries `first` to `last` of x's first dimension."""
    width, start = bias.shape[0], first * x.stride(0)
    rows = (last - first) * x[0].numel() // width if last > first else 0
    if not rows:
        return nothing
    return Launch(
        forward_kernel, (-(-rows // BLOCK_ROWS), -(-width // BLOCK_COLS)), (rows, width),
        {"ROWS": BLOCK_ROWS, "COLS": BLOCK_COLS, **config.kwargs}, (start, 0, 0, start),
    )  # fmt: skip


@planned
def _plan_backward(tensors: tuple[Tensor, Tensor, Tensor], config: Config) -> tuple[Callable[..., None], int]:
    """The launch, and the number of parts of the bias's gradient."""
    x, bias, go = tensors
    check_arguments(x, bias)
    if go.shape != x.shape:
        raise ValueError(f"the gradient must be of shape {tuple(x.shape)}, not {tuple(go.shape)}")
    width = bias.shape[0]
    rows = x.numel() // width
    parts = -(-rows // ROWS_PER_PROGRAM)
    if not rows:
        return nothing, parts
    launch = Launch(
        backward_kernel, (parts, -(-width // BLOCK_COLS)), (rows, width),
        {"STEPS": ROWS_PER_PROGRAM // BLOCK_ROWS, "ROWS": BLOCK_ROWS, "COLS": BLOCK_COLS, **config.kwargs},
    )  # fmt: skip
    return launch, parts


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
    "backward": Config(num_warps=4, num_stages=1, maxnreg=128),  # by default, the assembler spills for one more program
}
