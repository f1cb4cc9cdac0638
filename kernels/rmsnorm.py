"""Gated residual and RMSNorm with a weight in one pass over the rows: primal, dual, and a backward that recomputes.

x' = x + g * y;  n = x' / rms with rms = sqrt(mean(x'^2) + eps);  o = n * w.
Tangent: dx' = dx + g * dy + dg * y;  dn = (dx' - n * mean(n * dx')) / rms;  do = dn * w + n * dw.
All rows share g and w; without a residual, x' is x. Everything is computed in float32. Only x' is stored, and sums over
rows have a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Launch, check_device, check_dtype, empty_like, nothing, planned
from mfengine.kernels.sums import sum_parts

MAX_WIDTH = 8192
PROGRAM = 16384  # elements per program of the backward, which sums gradients over its rows before it writes


@triton.jit
def _columns(width, BLOCK: tl.constexpr):
    """Column numbers (1, BLOCK), and which of them exist. A lane takes four columns for every dtype.

    The compiler would choose eight for half precision, and move rows between the two layouts through shared memory.
    """
    cols = tl.max_contiguous(tl.arange(0, BLOCK), 4)[None, :]
    return cols, cols < width


@triton.jit
def _load(x_ptr, at, mask):
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x_ptr, at, mask, value):
    tl.store(x_ptr + at, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mean_product(a, b, width):
    return tl.sum(a * b, 1, keep_dims=True) / width


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, gate_ptr, weight_ptr, dx_ptr, dy_ptr, dgate_ptr, dweight_ptr, x_out_ptr, o_ptr, dx_out_ptr, do_ptr,
    rows, units, eps,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A dual if there is a dx, with a residual if there is a y. Missing tensors are None, and dgate, dweight may be
    None.

    The width is units * UNIT, which tells Triton that rows of 72 are aligned.
    """
    width = units * UNIT
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols, inside = _columns(width, BLOCK)
    mask = (row < rows) & inside
    at = row * width + cols
    x = _load(x_ptr, at, mask)
    if dx_ptr is not None:
        dx = _load(dx_ptr, at, mask)
    if y_ptr is not None:
        y = _load(y_ptr, at, mask)
        gate = _load(gate_ptr, cols, inside)
        x += gate * y
        _store(x_out_ptr, at, mask, x)
        if dx_ptr is not None:
            dx += gate * _load(dy_ptr, at, mask)
            if dgate_ptr is not None:
                dx += _load(dgate_ptr, cols, inside) * y
            _store(dx_out_ptr, at, mask, dx)
    rstd = 1.0 / tl.sqrt(_mean_product(x, x, width) + eps)
    normal = x * rstd
    weight = _load(weight_ptr, cols, inside)
    if dx_ptr is not None:
        do = (dx - normal * _mean_product(normal, dx, width)) * rstd * weight
        if dweight_ptr is not None:
            do += normal * _load(dweight_ptr, cols, inside)
        _store(do_ptr, at, mask, do)
    _store(o_ptr, at, mask, normal * weight)


@triton.jit
def backward_kernel(
    x_ptr, y_ptr, gate_ptr, weight_ptr, gx_out_ptr, go_ptr, gx_ptr, gy_ptr, sums_ptr, rows, units, eps,
    STEPS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x is the forward's x'. `sums` (parts, 1 or 2, width) gets this part's gradients of the weight and the gate.

    Without a gx_out, x' has a gradient only through o.
    """
    width = units * UNIT
    cols, inside = _columns(width, BLOCK)
    weight = _load(weight_ptr, cols, inside)
    gweight = tl.zeros((ROWS, BLOCK), tl.float32)
    kinds = 1
    if y_ptr is not None:
        kinds = 2
        gate = _load(gate_ptr, cols, inside)
        ggate = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0) * STEPS
    for block in range(first, tl.minimum(first + STEPS, tl.cdiv(rows, ROWS))):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & inside
        at = row * width + cols
        x = _load(x_ptr, at, mask)
        go = _load(go_ptr, at, mask)
        rstd = 1.0 / tl.sqrt(_mean_product(x, x, width) + eps)
        normal = x * rstd
        gnormal = go * weight
        gweight += go * normal
        gx = (gnormal - normal * _mean_product(gnormal, normal, width)) * rstd
        if gx_out_ptr is not None:
            gx += _load(gx_out_ptr, at, mask)
        _store(gx_ptr, at, mask, gx)
        if y_ptr is not None:
            ggate += gx * _load(y_ptr, at, mask)
            _store(gy_ptr, at, mask, gx * gate)
    sums_ptr += tl.program_id(0).to(tl.int64) * kinds * width
    tl.store(sums_ptr + cols, tl.sum(gweight, 0, keep_dims=True), mask=inside)
    if y_ptr is not None:
        tl.store(sums_ptr + width + cols, tl.sum(ggate, 0, keep_dims=True), mask=inside)


# ----------------------------------------------------------------------------
# Launchers. `y` and `gate` are given together; without them there is no residual, and x' is x.
# They raise ValueError for arguments that the kernels do not support, before anything is launched.


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Residual stream, and its rows divided by their root mean squares, times the weight.

    Args:
        x, y: (..., D); gate, weight: (D,). Each is float16, bfloat16 or float32, contiguous. D is at most 8192.
        eps: added to the mean square.
        dtype: dtype of o.

    Returns:
        x', in x's shape and dtype (x itself without a residual), and o, in the same shape.
    """
    launch = _plan_forward((x, y, gate, weight), eps)
    x_out, o = _outputs(x, y, dtype)
    launch(x, y, gate, weight, None, None, None, None, x_out, o, None, None)
    return x_out, o


def forward_dual(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor,
    dx: Tensor, dy: Tensor | None, dgate: Tensor | None, dweight: Tensor | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Like `forward`, with the tangents of the last K entries of x's first dimension.

    Args:
        x, y, gate, weight, eps, dtype: as in `forward`.
        dx, dy: (K, ..., D); dgate, dweight: (D,), or None for zero.

    Returns:
        x', o, and their tangents.
    """
    primals, tangents = (x, y, gate, weight), (dx, dy, dgate, dweight)
    lead, tail = _plan_dual((*primals, *tangents), eps)
    x_out, o = _outputs(x, y, dtype)
    dx_out, do = _outputs(dx, dy, dtype)
    lead(*primals, None, None, None, None, x_out, o, None, None)
    tail(*primals, *tangents, x_out, o, dx_out, do)
    return x_out, o, dx_out, do


def backward(
    x_out: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, gx_out: Tensor | None, go: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, y, gate and weight, in their dtypes, from contiguous gradients of x' (None is zero) and o."""
    launch, parts = _plan_backward((x_out, y, gate, weight, gx_out, go), eps)
    gx, gweight = empty_like(x_out), empty_like(weight)
    gy, ggate = (None if x is None else empty_like(x) for x in (y, gate))
    outputs = [gweight[None]] if ggate is None else [gweight[None], ggate[None]]
    sums = torch.empty(1, parts, len(outputs), weight.shape[0], dtype=torch.float32, device=x_out.device)
    launch(x_out, y, gate, weight, gx_out, go, gx, gy, sums)
    sum_parts(sums, outputs)
    return gx, gy, ggate, gweight


@planned
def _plan_forward(tensors: Sequence[Any], eps: float) -> Callable[..., None]:
    check_arguments(*tensors)
    return _forward(tensors[0], tensors[3].shape[0], "forward", 0, eps)


@planned
def _plan_dual(tensors: Sequence[Any], eps: float) -> tuple[Callable[..., None], Callable[..., None]]:
    x, y, gate, weight, dx, dy, dgate, dweight = tensors
    check_arguments(x, y, gate, weight)
    check_arguments(
        dx, dy, gate if dgate is None else dgate, weight if dweight is None else dweight, prefix="d"
    )  # fmt: skip
    check_device("dx", dx, x)
    if dx.shape[1:] != x.shape[1:] or len(dx) > len(x):
        raise ValueError(f"dx must be (K, ...) like x {tuple(x.shape)} with K at most {len(x)}, not {tuple(dx.shape)}")
    first, width = len(x) - len(dx), weight.shape[0]
    return _forward(x[:first], width, "forward", 0, eps), _forward(dx, width, "dual", first * x.stride(0), eps)


def _forward(x: Tensor, width: int, kernel: str, start: int, eps: float) -> Callable[..., None]:
    """The launch for as many rows as x has, starting at element `start` of the tensors; tangents cover only these."""
    rows = x.numel() // width
    if not rows:
        return nothing
    shape = tile(kernel, width)
    return Launch(
        forward_kernel, (-(-rows // shape["ROWS"]),), (rows, width // shape["UNIT"], eps), shape,
        (start, start, 0, 0, 0, 0, 0, 0, start, start),
    )  # fmt: skip


@planned
def _plan_backward(tensors: Sequence[Any], eps: float) -> tuple[Callable[..., None], int]:
    """The launch, and the number of parts of the gradients of gate and weight."""
    x, y, gate, weight, gx_out, go = tensors
    check_arguments(x, y, gate, weight)
    for gradient in (gx_out, go):
        if gradient is not None and (gradient.shape != x.shape or not gradient.is_contiguous()):
            raise ValueError(f"gradients must be contiguous, of shape {tuple(x.shape)}, not {tuple(gradient.shape)}")
    width = weight.shape[0]
    shape, rows = tile("backward", width), x.numel() // width
    steps = max(16, PROGRAM // shape["BLOCK"]) // shape["ROWS"]
    parts = -(-rows // (steps * shape["ROWS"]))
    if not rows:
        return nothing, parts
    return Launch(backward_kernel, (parts,), (rows, width // shape["UNIT"], eps), {"STEPS": steps, **shape}), parts


def _outputs(x: Tensor, y: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Empty tensors for x' and o, or for their tangents."""
    return x if y is None else empty_like(x), empty_like(x, dtype)


def check_arguments(x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, prefix: str = "") -> None:
    if (y is None) != (gate is None):
        raise ValueError(f"{prefix}y and {prefix}gate must be given together")
    if x.ndim < 2 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{prefix}x must be (..., D) with D from 1 to {MAX_WIDTH}, not of shape {tuple(x.shape)}")
    for name, a, shape in (
        ("x", x, x.shape),
        ("y", y, x.shape),
        ("gate", gate, x.shape[-1:]),
        ("weight", weight, x.shape[-1:]),
    ):
        if a is None:
            continue
        check_dtype(prefix + name, a)
        if not a.is_contiguous():
            raise ValueError(f"{prefix}{name} must be contiguous, not of strides {a.stride()}")
        if a.shape != shape:
            raise ValueError(f"{prefix}{name} must be of shape {tuple(shape)}, not {tuple(a.shape)}")
        check_device(prefix + name, a, x)


# Most elements of a row that a lane holds. One warp holds a whole row of 1024, so its sums need no barrier; in the
# backward, two warps do. Times on a GPU: not measured yet.
ELEMENTS = {"forward": 64, "dual": 32, "backward": 16}


@lru_cache(maxsize=1024)
def tile(kernel: str, width: int) -> dict[str, int]:
    """A divisor of the width, rows of a tile, their padded width, and warps."""
    block = triton.next_power_of_2(width)
    warps = max(1, block // (32 * ELEMENTS[kernel]))
    rows = max(1, 32 * warps * ELEMENTS[kernel] // block)
    return {"UNIT": gcd(width, 8), "ROWS": rows, "BLOCK": block, "num_warps": warps, "num_stages": 1}
