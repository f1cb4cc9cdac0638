"""SwiGLU in one pass: primal, dual, and a backward that recomputes.

x holds two halves, [g, w].  o = silu(g) * w;  do = silu'(g) * dg * w + silu(g) * dw. Only x is stored, which the
preceding product has written anyway. The backward writes one packed gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Config, Launch, check_device, check_dtype, empty_like, nothing, planned

BLOCK_ROWS, BLOCK_COLS = 8, 256  # 11 blocks hold 2752 columns, 8 hold 2048


@triton.jit
def _tile(rows, units, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets in rows of two halves and in rows of one, the width of a half, and the mask of a tile.

    The width is units * UNIT, which tells Triton that both halves of a row of 2752 are aligned.
    """
    width = units * UNIT
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    return row * (2 * width) + cols, row * width + cols, width, (row < rows) & (cols < width)


@triton.jit
def _load(x_ptr, at, mask):
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x_ptr, at, mask, value):
    tl.store(x_ptr + at, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_and_slope(g):
    """silu(g) = g P and its derivative, P + g P (1 - P), with P = 1 / (1 + exp(-g))."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    half = 1.0 / (1.0 + tl.exp2(-LOG2_E * g))
    value = g * half
    return value, half + value * (1.0 - half)


@triton.jit
def forward_kernel(
    x_ptr, dx_ptr, o_ptr, do_ptr, rows, units, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """A dual if there is a dx; otherwise dx and do are None."""
    pair, at, width, mask = _tile(rows, units, UNIT, ROWS, COLS)
    value, slope = _silu_and_slope(_load(x_ptr, pair, mask))
    w = _load(x_ptr, pair + width, mask)
    if dx_ptr is not None:
        tangent = slope * w * _load(dx_ptr, pair, mask) + value * _load(dx_ptr, pair + width, mask)
        _store(do_ptr, at, mask, tangent)
    _store(o_ptr, at, mask, value * w)


@triton.jit
def backward_kernel(
    x_ptr, go_ptr, gx_ptr, rows, units, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    pair, at, width, mask = _tile(rows, units, UNIT, ROWS, COLS)
    value, slope = _silu_and_slope(_load(x_ptr, pair, mask))
    go = _load(go_ptr, at, mask)
    _store(gx_ptr, pair, mask, go * slope * _load(x_ptr, pair + width, mask))
    _store(gx_ptr, pair + width, mask, go * value)


# ----------------------------------------------------------------------------
# Launchers. They raise ValueError for arguments that the kernels do not support, before anything is launched.


def forward(x: Tensor) -> Tensor:
    """silu(g) * w: x (..., 2 * F), float16, bfloat16 or float32, contiguous; returns (..., F) in x's dtype."""
    launch = _plan_forward((x,), CONFIGS["forward"])
    o = _output(x)
    launch(x, None, o, None)
    return o


def forward_dual(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Like `forward`, with the tangent of the last K entries of x's first dimension, from dx (K, ..., 2 * F)."""
    lead, tail = _plan_dual((x, dx), CONFIGS["forward"], CONFIGS["dual"])
    o, do = _output(x), _output(dx)
    lead(x, None, o, None)
    tail(x, dx, o, do)
    return o, do


def backward(x: Tensor, go: Tensor) -> Tensor:
    """Gradient of x, in its shape and dtype, from that of the output."""
    go = go.contiguous()
    launch = _plan_backward((x, go), CONFIGS["backward"])
    gx = empty_like(x)
    launch(x, go, gx)
    return gx


@planned
def _plan_forward(tensors: tuple[Tensor], config: Config) -> Callable[..., None]:
    (x,) = tensors
    check_arguments(x)
    return _forward(x, 0, len(x), config)


@planned
def _plan_dual(
    tensors: tuple[Tensor, Tensor], forward: Config, dual: Config
) -> tuple[Callable[..., None], Callable[..., None]]:
    x, dx = tensors
    check_arguments(x)
    check_arguments(dx, prefix="d")
    check_device("dx", dx, x)
    if dx.shape[1:] != x.shape[1:] or len(dx) > len(x):
        raise ValueError(f"dx must be (K, ...) like x {tuple(x.shape)} with K at most {len(x)}, not {tuple(dx.shape)}")
    first = len(x) - len(dx)
    return _forward(x, 0, first, forward), _forward(x, first, len(x), dual)


def _forward(x: Tensor, first: int, last: int, config: Config) -> Callable[..., None]:
    """The launch for entries `first` to `last` of x's first dimension."""
    start = first * x.stride(0)
    return _launch(forward_kernel, x[first:last], config, (start, 0, start // 2))


@planned
def _plan_backward(tensors: tuple[Tensor, Tensor], config: Config) -> Callable[..., None]:
    x, go = tensors
    check_arguments(x)
    if go.shape != (*x.shape[:-1], x.shape[-1] // 2):
        raise ValueError(f"the gradient must have half the width of x {tuple(x.shape)}, not {tuple(go.shape)}")
    return _launch(backward_kernel, x, config)


def _launch(kernel: object, x: Tensor, config: Config, starts: tuple[int, ...] = ()) -> Callable[..., None]:
    if not x.numel():
        return nothing
    width = x.shape[-1] // 2
    rows, unit = x.numel() // (2 * width), gcd(width, 8)
    return Launch(
        kernel, (-(-rows // BLOCK_ROWS), -(-width // BLOCK_COLS)), (rows, width // unit),
        {"UNIT": unit, "ROWS": BLOCK_ROWS, "COLS": BLOCK_COLS, **config.kwargs}, starts,
    )  # fmt: skip


def _output(x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)


def check_arguments(x: Tensor, prefix: str = "") -> None:
    check_dtype(f"{prefix}x", x)
    if not x.is_contiguous():
        raise ValueError(f"{prefix}x must be contiguous, not of strides {x.stride()}")
    if x.ndim < 2 or x.shape[-1] % 2 or not x.shape[-1]:
        raise ValueError(f"{prefix}x must be (..., 2 * F), not of shape {tuple(x.shape)}")


# Times on a GPU: not measured yet.
CONFIGS = {
    "forward": Config(num_warps=4, num_stages=1),
    "dual": Config(num_warps=4, num_stages=1),
    "backward": Config(num_warps=4, num_stages=1),
}
