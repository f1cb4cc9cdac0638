"""RMSNorm with a weight, in one pass over the rows: primal, dual, and a backward that recomputes.

n = x / rms with rms = sqrt(mean(x^2) + eps);  o = n * w.  Tangent: dn = (dx - n * mean(n * dx)) / rms;
do = dn * w + n * dw. Everything is computed in float32. Nothing is stored but x, and sums over rows have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Config, check_device, check_dtype, launch

MAX_WIDTH = 8192
TILE = 4096  # elements of a program's rows at a time, as a power of two; wider rows come one at a time
STEPS = 8  # tiles of a program of the backward, which adds up the weight's gradient over them before writing


@triton.jit
def _normalise(x, width, eps):
    """Rows over their root mean square, and the reciprocal of that."""
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    return x * rstd[:, None], rstd


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, dx_ptr, dweight_ptr, o_ptr, do_ptr, rows, units, eps,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dual if there is a dx: without, dx, dweight and do are None. A weight without a tangent has None too.

    The width is units * UNIT, which tells Triton that rows of 72 are aligned.
    """
    width = units * UNIT
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (cols < width)[None, :]
    at = row[:, None] * width + cols[None, :]
    normal, rstd = _normalise(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), width, eps)
    weight = tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    if dx_ptr is not None:
        dx = tl.load(dx_ptr + at, mask=mask, other=0.0).to(tl.float32)
        along = tl.sum(normal * dx, 1) / width
        do = (dx - normal * along[:, None]) * rstd[:, None] * weight
        if dweight_ptr is not None:
            do += normal * tl.load(dweight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
        tl.store(do_ptr + at, do.to(do_ptr.dtype.element_ty), mask=mask)
    tl.store(o_ptr + at, (normal * weight).to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x_ptr, weight_ptr, go_ptr, gx_ptr, sums_ptr, rows, units, eps,
    STEPS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums` (parts, width): this part's gradient of the weight."""
    width = units * UNIT
    cols = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    gweight = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        row = ((tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (cols < width)[None, :]
        at = row[:, None] * width + cols[None, :]
        normal, rstd = _normalise(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), width, eps)
        go = tl.load(go_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gweight += tl.sum(go * normal, 0)
        gnormal = go * weight
        along = tl.sum(gnormal * normal, 1) / width
        gx = (gnormal - normal * along[:, None]) * rstd[:, None]
        tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * width + cols, gweight, mask=cols < width)


# ----------------------------------------------------------------------------
# Launchers. They raise ValueError for arguments that the kernels cannot take, before anything is launched.


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each row of x over its root mean square, times the weight.

    Args:
        x: (..., D), weight: (D,); float16, bfloat16 or float32, each its own, contiguous. D is at most 8192.
        eps: added to the mean square.

    Returns:
        Shape and dtype of x.
    """
    check_arguments(x, weight)
    o = torch.empty_like(x)
    _launch_forward(x, weight, None, None, o, None, eps)
    return o


def forward_dual(x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`forward`, with the tangent of the last K rows of x's first dimension.

    Args:
        x, weight, eps: as `forward`.
        dx: (K, ..., D), dweight: (D,), or None for zero.
    """
    check_arguments(x, weight)
    check_arguments(dx, weight if dweight is None else dweight, prefix="d")
    check_device("dx", dx, x)
    if dx.shape[1:] != x.shape[1:] or dx.shape[0] > x.shape[0]:
        raise ValueError(
            f"dx must be (K, ...) like x {tuple(x.shape)} with K at most {x.shape[0]}, not {tuple(dx.shape)}"
        )
    first = x.shape[0] - dx.shape[0]
    o, do = torch.empty_like(x), torch.empty(dx.shape, dtype=x.dtype, device=x.device)
    _launch_forward(x[:first], weight, None, None, o[:first], None, eps)
    _launch_forward(x[first:], weight, dx, dweight, o[first:], do, eps)
    return o, do


def backward(x: Tensor, weight: Tensor, go: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, in their dtypes, from that of the output."""
    check_arguments(x, weight)
    if go.shape != x.shape:
        raise ValueError(f"the gradient must be of shape {tuple(x.shape)}, not {tuple(go.shape)}")
    go = go.contiguous()
    gx = torch.empty_like(x)
    width = weight.shape[0]
    rows = x.numel() // width
    tile = tile_shape(width)
    parts = -(-rows // (STEPS * tile["ROWS"]))
    sums = torch.empty(parts, width, dtype=torch.float32, device=x.device)
    if x.numel():
        launch(
            backward_kernel, (parts,), x,
            x, weight, go, gx, sums, rows, width // tile["UNIT"], eps, STEPS=STEPS, **tile,
            **CONFIGS["backward"].kwargs,
        )  # fmt: skip
    return gx, sums.sum(0).to(weight.dtype)


def _launch_forward(
    x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None, o: Tensor, do: Tensor | None, eps: float
) -> None:
    if x.numel():
        width = weight.shape[0]
        rows = x.numel() // width
        tile, options = tile_shape(width), CONFIGS["forward" if dx is None else "dual"].kwargs
        launch(
            forward_kernel, (-(-rows // tile["ROWS"]),), x,
            x, weight, dx, dweight, o, do, rows, width // tile["UNIT"], eps, **tile, **options,
        )  # fmt: skip


def tile_shape(width: int) -> dict[str, int]:
    """What divides the width, rows of a tile and their padded width."""
    block = triton.next_power_of_2(width)
    return {"UNIT": 1 if width % 8 else 8, "ROWS": max(1, TILE // block), "BLOCK": block}


def check_arguments(x: Tensor, weight: Tensor, prefix: str = "") -> None:
    for name, a in ((f"{prefix}x", x), (f"{prefix}weight", weight)):
        check_dtype(name, a)
        if not a.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {a.stride()}")
    if x.ndim < 2 or not 1 <= x.shape[-1] <= MAX_WIDTH or tuple(weight.shape) != tuple(x.shape[-1:]):
        raise ValueError(
            f"{prefix}weight must be (D,) for {prefix}x (..., D) with D from 1 to {MAX_WIDTH}, "
            f"not {tuple(weight.shape)} for {tuple(x.shape)}"
        )
    check_device(f"{prefix}weight", weight, x)


# Times on a GPU: not measured yet.
CONFIGS = {
    "forward": Config(num_warps=8, num_stages=1),
    "dual": Config(num_warps=8, num_stages=1),
    "backward": Config(num_warps=8, num_stages=1),
}
