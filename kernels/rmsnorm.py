"""RMSNorm with a weight, in one pass over the rows: primal, dual, and a backward that recomputes.

n = x / rms with rms = sqrt(mean(x^2) + eps);  o = n * w.  Tangent: dn = (dx - n * mean(n * dx)) / rms;
do = dn * w + n * dw. Everything is computed in float32. Nothing is stored but x, and sums over rows have a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Config, Launch, check_device, check_dtype, empty_like, nothing, planned
from mfengine.kernels.sums import sum_parts

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
    launch = _plan_forward((x, weight), eps, CONFIGS["forward"])
    o = empty_like(x)
    launch(x, weight, None, None, o, None)
    return o


def forward_dual(x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`forward`, with the tangent of the last K rows of x's first dimension.

    Args:
        x, weight, eps: as `forward`.
        dx: (K, ..., D), dweight: (D,), or None for zero.
    """
    lead, tail = _plan_dual((x, weight, dx, dweight), eps, CONFIGS["forward"], CONFIGS["dual"])
    o, do = empty_like(x), empty_like(dx, x.dtype)
    lead(x, weight, None, None, o, None)
    tail(x, weight, dx, dweight, o, do)
    return o, do


def backward(x: Tensor, weight: Tensor, go: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, in their dtypes, from that of the output."""
    go = go.contiguous()
    launch, parts = _plan_backward((x, weight, go), eps, CONFIGS["backward"])
    gx = empty_like(x)
    sums = torch.empty(1, parts, 1, weight.shape[0], dtype=torch.float32, device=x.device)
    gweight = empty_like(weight)
    launch(x, weight, go, gx, sums)
    sum_parts(sums, (gweight[None],))
    return gx, gweight


@planned
def _plan_forward(tensors: tuple[Tensor, Tensor], eps: float, config: Config) -> Callable[..., None]:
    check_arguments(*tensors)
    return _forward(*tensors, 0, len(tensors[0]), eps, config)


@planned
def _plan_dual(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None], eps: float, forward: Config, dual: Config
) -> tuple[Callable[..., None], Callable[..., None]]:
    x, weight, dx, dweight = tensors
    check_arguments(x, weight)
    check_arguments(dx, weight if dweight is None else dweight, prefix="d")
    check_device("dx", dx, x)
    if dx.shape[1:] != x.shape[1:] or len(dx) > len(x):
        raise ValueError(f"dx must be (K, ...) like x {tuple(x.shape)} with K at most {len(x)}, not {tuple(dx.shape)}")
    first = len(x) - len(dx)
    return _forward(x, weight, 0, first, eps, forward), _forward(x, weight, first, len(x), eps, dual)


def _forward(x: Tensor, weight: Tensor, first: int, last: int, eps: float, config: Config) -> Callable[..., None]:
    """The launch for `first` to `last` of x's first dimension."""
    width, start = weight.shape[0], first * x.stride(0)
    rows = (last - first) * x[0].numel() // width if last > first else 0
    if not rows:
        return nothing
    tile = tile_shape(width)
    return Launch(
        forward_kernel, (-(-rows // tile["ROWS"]),), (rows, width // tile["UNIT"], eps), {**tile, **config.kwargs},
        (start, 0, 0, 0, start),
    )  # fmt: skip


@planned
def _plan_backward(
    tensors: tuple[Tensor, Tensor, Tensor], eps: float, config: Config
) -> tuple[Callable[..., None], int]:
    """The launch, and how many parts there are of the weight's gradient."""
    x, weight, go = tensors
    check_arguments(x, weight)
    if go.shape != x.shape:
        raise ValueError(f"the gradient must be of shape {tuple(x.shape)}, not {tuple(go.shape)}")
    width = weight.shape[0]
    rows, tile = x.numel() // width, tile_shape(width)
    parts = -(-rows // (STEPS * tile["ROWS"]))
    if not rows:
        return nothing, parts
    launch = Launch(
        backward_kernel, (parts,), (rows, width // tile["UNIT"], eps), {"STEPS": STEPS, **tile, **config.kwargs}
    )  # fmt: skip
    return launch, parts


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
