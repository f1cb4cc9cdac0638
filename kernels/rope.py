"""RMSNorm and rotary position embedding of each head's queries and keys in one pass: primal, dual, and backward.

n = x / rms * w with rms = sqrt(mean(x^2) + eps) per head; o = R n, where R rotates the channels (2i, 2i + 1) of the
token at position m by the angle m * 10,000^(-2i / d). Tangent: do = R ((dx - n mean(n dx)) / rms * w + n dw).
Everything is computed in float32. Queries and keys are read in place from the packed product of a query-key-value
projection, and their gradients are written to the same places of its gradient. Sums over heads have a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Launch, check_device, check_dtype, empty_like, nothing, planned
from mfengine.kernels.sums import sum_parts

MAX_DIM = 256
TILE = 512  # elements of heads per warp at a time
STEPS = 16  # tiles per program of the backward, which sums the weights' gradients over them before it writes

# ----------------------------------------------------------------------------
# Kernels. Axis 1 of the grid is 0 for queries and 1 for keys. The rows of a tile are heads: those of one token, then
# those of the next token of the sample. Values are kept as pairs of even and odd channels.


@triton.jit
def _pairs(x_ptr, at, mask, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))


@triton.jit
def _store(x_ptr, at, mask, even, odd, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.reshape(tl.join(even, odd), (ROWS, BLOCK))
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight(q_ptr, k_ptr, cols, inside, BLOCK: tl.constexpr):
    """The weight of queries or keys, whichever this program handles."""
    if tl.program_id(1) == 0:
        even, odd = _pairs(q_ptr, cols, inside, 1, BLOCK)
    else:
        even, odd = _pairs(k_ptr, cols, inside, 1, BLOCK)
    return even, odd


@triton.jit
def _mean_product(even1, odd1, even2, odd2, DIM: tl.constexpr):
    return tl.sum(even1 * even2 + odd1 * odd2, 1, keep_dims=True) / DIM


@triton.jit
def _heads(tile, tokens, x_row, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """For a tile of a sample: offsets in x, in the queries and keys, and in the angles; and the mask."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.max_contiguous(tl.arange(0, BLOCK), 4)[None, :]
    mask = (row < tokens * HEADS) & (cols < DIM)
    token = (row // HEADS).to(tl.int64)
    within = (tl.program_id(1) * HEADS + row % HEADS) * DIM + cols
    return token * x_row + within, token * (2 * HEADS * DIM) + within, token * DIM + cols, mask


@triton.jit
def forward_kernel(
    x_ptr, q_weight_ptr, k_weight_ptr, angles_ptr, dx_ptr, dq_weight_ptr, dk_weight_ptr, o_ptr, do_ptr,
    tokens, x_row, dx_row, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A dual if there is a dx; otherwise dx, dq_weight, dk_weight and do are None. Weights' tangents may be None."""
    tiles = tl.cdiv(tokens * HEADS, ROWS)
    first = (tl.program_id(0) // tiles).to(tl.int64) * tokens
    tile = tl.program_id(0) % tiles
    at, o_at, angle_at, mask = _heads(tile, tokens, x_row, HEADS, DIM, ROWS, BLOCK)
    cols = tl.max_contiguous(tl.arange(0, BLOCK), 4)[None, :]
    inside = cols < DIM
    o_ptr += first * (2 * HEADS * DIM)
    even, odd = _pairs(x_ptr + first * x_row, at, mask, ROWS, BLOCK)
    cos, sin = _pairs(angles_ptr, angle_at, mask, ROWS, BLOCK)
    weight0, weight1 = _weight(q_weight_ptr, k_weight_ptr, cols, inside, BLOCK)
    rstd = 1.0 / tl.sqrt(_mean_product(even, odd, even, odd, DIM) + eps)
    even *= rstd
    odd *= rstd
    if dx_ptr is not None:
        dx_at, _, _, _ = _heads(tile, tokens, dx_row, HEADS, DIM, ROWS, BLOCK)
        deven, dodd = _pairs(dx_ptr + first * dx_row, dx_at, mask, ROWS, BLOCK)
        along = _mean_product(even, odd, deven, dodd, DIM)
        deven = (deven - even * along) * rstd * weight0
        dodd = (dodd - odd * along) * rstd * weight1
        if dq_weight_ptr is not None:
            dweight0, dweight1 = _weight(dq_weight_ptr, dk_weight_ptr, cols, inside, BLOCK)
            deven += even * dweight0
            dodd += odd * dweight1
        do_ptr += first * (2 * HEADS * DIM)
        _store(do_ptr, o_at, mask, deven * cos - dodd * sin, deven * sin + dodd * cos, ROWS, BLOCK)
    even *= weight0
    odd *= weight1
    _store(o_ptr, o_at, mask, even * cos - odd * sin, even * sin + odd * cos, ROWS, BLOCK)


@triton.jit
def backward_kernel(
    x_ptr, q_weight_ptr, k_weight_ptr, angles_ptr, go_ptr, gx_ptr, sums_ptr,
    tokens, x_row, gx_row, eps,
    STEPS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums` (parts, 2, DIM) gets this part's gradients of the weights."""
    tiles = tl.cdiv(tokens * HEADS, STEPS * ROWS)
    first = (tl.program_id(0) // tiles).to(tl.int64) * tokens
    part = tl.program_id(0) % tiles
    x_ptr += first * x_row
    go_ptr += first * (2 * HEADS * DIM)
    gx_ptr += first * gx_row
    cols = tl.max_contiguous(tl.arange(0, BLOCK), 4)[None, :]
    inside = cols < DIM
    weight0, weight1 = _weight(q_weight_ptr, k_weight_ptr, cols, inside, BLOCK)
    gweight0 = tl.zeros((ROWS, BLOCK // 2), tl.float32)
    gweight1 = tl.zeros((ROWS, BLOCK // 2), tl.float32)
    for tile in range(part * STEPS, tl.minimum((part + 1) * STEPS, tl.cdiv(tokens * HEADS, ROWS))):
        at, go_at, angle_at, mask = _heads(tile, tokens, x_row, HEADS, DIM, ROWS, BLOCK)
        gx_at, _, _, _ = _heads(tile, tokens, gx_row, HEADS, DIM, ROWS, BLOCK)
        even, odd = _pairs(x_ptr, at, mask, ROWS, BLOCK)
        cos, sin = _pairs(angles_ptr, angle_at, mask, ROWS, BLOCK)
        go0, go1 = _pairs(go_ptr, go_at, mask, ROWS, BLOCK)
        geven = go0 * cos + go1 * sin
        godd = go1 * cos - go0 * sin
        rstd = 1.0 / tl.sqrt(_mean_product(even, odd, even, odd, DIM) + eps)
        even *= rstd
        odd *= rstd
        gweight0 += geven * even
        gweight1 += godd * odd
        geven *= weight0
        godd *= weight1
        along = _mean_product(geven, godd, even, odd, DIM)
        _store(gx_ptr, gx_at, mask, (geven - even * along) * rstd, (godd - odd * along) * rstd, ROWS, BLOCK)
    sums_ptr += (tl.program_id(0) * 2 + tl.program_id(1)).to(tl.int64) * DIM
    gweight0, gweight1 = tl.sum(gweight0, 0, keep_dims=True), tl.sum(gweight1, 0, keep_dims=True)
    _store(sums_ptr, cols, inside, gweight0, gweight1, 1, BLOCK)


# ----------------------------------------------------------------------------
# Launchers. x begins with queries, then keys: it is the whole packed product, or its first two thirds. Its rows are
# contiguous and evenly spaced. They raise ValueError for arguments that the kernels do not support, before anything is
# launched.


def forward(x: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, tokens: int, eps: float) -> Tensor:
    """Normalised and rotated queries and keys.

    Args:
        x: (B, N, W) or (B * N, W) with W at least 2 * H * d; q_weight, k_weight: (d,), contiguous. Each is float16,
            bfloat16 or float32. d is even, at most 256.
        heads, tokens: H and N.
        eps: added to the mean square.

    Returns:
        (B, N, 2 * H * d) or (B * N, 2 * H * d), queries before keys, in x's dtype.
    """
    launch = _plan_forward((x, q_weight, k_weight), heads, tokens, eps)
    o = _output(x, q_weight, heads)
    launch(x, q_weight, k_weight, angles(tokens, q_weight.shape[0], x.device), None, None, None, o, None)
    return o


def forward_dual(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, dx: Tensor, dq_weight: Tensor | None, dk_weight: Tensor | None,
    heads: int, tokens: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Like `forward`, with the tangent of the last K samples.

    Args:
        x, q_weight, k_weight, heads, tokens, eps: as in `forward`.
        dx: (K, N, W) or (K * N, W); dq_weight, dk_weight: (d,), or both None for zero.
    """
    lead, tail = _plan_dual((x, q_weight, k_weight, dx, dq_weight, dk_weight), heads, tokens, eps)
    o, do = _output(x, q_weight, heads), _output(dx, q_weight, heads)
    table = angles(tokens, q_weight.shape[0], x.device)
    lead(x, q_weight, k_weight, table, None, None, None, o, None)
    tail(x, q_weight, k_weight, table, dx, dq_weight, dk_weight, o, do)
    return o, do


def backward(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, go: Tensor, gx: Tensor, heads: int, tokens: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights, in their dtypes, from the contiguous gradient of the output.

    The gradients of queries and keys are written to gx, which is shaped like x.
    """
    launch, parts = _plan_backward((x, q_weight, k_weight, go, gx), heads, tokens, eps)
    dim = q_weight.shape[0]
    gq_weight, gk_weight = empty_like(q_weight), empty_like(k_weight)
    sums = torch.empty(1, parts, 2, dim, dtype=torch.float32, device=x.device)
    launch(x, q_weight, k_weight, angles(tokens, dim, x.device), go, gx, sums)
    sum_parts(sums, (gq_weight[None], gk_weight[None]))
    return gq_weight, gk_weight


@lru_cache(maxsize=64)
def angles(tokens: int, dim: int, device: torch.device) -> Tensor:
    """(N, d) float32: cosine and sine of each pair of channels at each position."""
    position = torch.arange(tokens, dtype=torch.float64)
    angle = position[:, None] * 10_000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / -dim)
    return torch.stack((angle.cos(), angle.sin()), -1).flatten(1).to(device, torch.float32)


@planned
def _plan_forward(tensors: Sequence[Any], heads: int, tokens: int, eps: float) -> Callable[..., None]:
    x, q_weight, k_weight = tensors
    samples = check_arguments(x, q_weight, k_weight, heads, tokens)
    return _forward(x, x, q_weight.shape[0], heads, tokens, 0, samples, eps)


@planned
def _plan_dual(
    tensors: Sequence[Any], heads: int, tokens: int, eps: float
) -> tuple[Callable[..., None], Callable[..., None]]:
    x, q_weight, k_weight, dx, dq_weight, dk_weight = tensors
    samples = check_arguments(x, q_weight, k_weight, heads, tokens)
    if (dq_weight is None) != (dk_weight is None):
        raise ValueError("dq_weight and dk_weight must be given together")
    dweight, other = (q_weight, k_weight) if dq_weight is None else (dq_weight, dk_weight)
    duals = check_arguments(dx, dweight, other, heads, tokens, prefix="d")
    check_device("dx", dx, x)
    if dx.shape[-1] != x.shape[-1] or dweight.shape != q_weight.shape or duals > samples:
        raise ValueError(f"dx must be like the last samples of x {tuple(x.shape)}, not of shape {tuple(dx.shape)}")
    first, dim = samples - duals, q_weight.shape[0]
    lead = _forward(x, x, dim, heads, tokens, 0, first, eps)
    return lead, _forward(x, dx, dim, heads, tokens, first, samples, eps)


def _forward(
    x: Tensor, dx: Tensor, dim: int, heads: int, tokens: int, first: int, last: int, eps: float
) -> Callable[..., None]:
    """The launch for samples `first` to `last`; tangents cover only these samples."""
    shape = tile(heads, dim)
    programs = (last - first) * -(-tokens * heads // shape["ROWS"])
    if not programs:
        return nothing
    starts = (first * tokens * x.stride(-2), 0, 0, 0, 0, 0, 0, first * tokens * 2 * heads * dim)
    return Launch(forward_kernel, (programs, 2), (tokens, x.stride(-2), dx.stride(-2), eps), shape, starts)


@planned
def _plan_backward(tensors: Sequence[Any], heads: int, tokens: int, eps: float) -> tuple[Callable[..., None], int]:
    """The launch, and the number of parts of the weights' gradients."""
    x, q_weight, k_weight, go, gx = tensors
    samples = check_arguments(x, q_weight, k_weight, heads, tokens)
    check_arguments(gx, q_weight, k_weight, heads, tokens, prefix="g")
    dim = q_weight.shape[0]
    if go.shape != (*x.shape[:-1], 2 * heads * dim) or not go.is_contiguous():
        raise ValueError(f"the gradient must be contiguous, of width {2 * heads * dim}, not {tuple(go.shape)}")
    shape = tile(heads, dim)
    parts = samples * -(-tokens * heads // (STEPS * shape["ROWS"]))
    if not parts:
        return nothing, parts
    if shape["num_warps"] == 1:
        shape["maxnreg"] = 128  # by default, the assembler spills to fit more programs
    scalars = (tokens, x.stride(-2), gx.stride(-2), eps)
    return Launch(backward_kernel, (parts, 2), scalars, {"STEPS": STEPS, **shape}), parts


def _output(x: Tensor, q_weight: Tensor, heads: int) -> Tensor:
    return torch.empty(*x.shape[:-1], 2 * heads * q_weight.shape[0], dtype=x.dtype, device=x.device)


def tile(heads: int, dim: int) -> dict[str, int]:
    """Heads of a token, their channels, rows of a tile, their padded width, and warps.

    For heads wider than 64, several warps would read the weights 4 bytes at a time. Times on a GPU: not measured yet.
    """
    block = triton.next_power_of_2(dim)
    warps = 4 if block <= 64 else 1
    rows = TILE * warps // block
    return {"HEADS": heads, "DIM": dim, "ROWS": rows, "BLOCK": block, "num_warps": warps, "num_stages": 1}


def evenly_spaced(x: Tensor) -> bool:
    """Whether rows of x are contiguous and evenly spaced."""
    return x.stride(-1) == 1 and (x.ndim == 2 or x.stride(0) == x.shape[1] * x.stride(1) or len(x) < 2)


def check_arguments(x: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, tokens: int, prefix: str = "") -> int:
    """The number of samples; ValueError if the kernels do not support the arguments."""
    for name, a in (("x", x), ("q_weight", q_weight), ("k_weight", k_weight)):
        check_dtype(prefix + name, a)
        check_device(prefix + name, a, x)
    dim = q_weight.numel()
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != (dim,) or not weight.is_contiguous() or dim % 2 or not 2 <= dim <= MAX_DIM:
            raise ValueError(
                f"{prefix}{name} must be (d,), contiguous, with an even d from 2 to {MAX_DIM}, not of shape "
                f"{tuple(weight.shape)}"
            )
    if x.ndim not in (2, 3) or x.shape[-1] < 2 * heads * dim or prod(x.shape[:-1]) % max(tokens, 1):
        raise ValueError(
            f"{prefix}x must be (B, N, W) or (B * N, W) with N = {tokens} and W at least {2 * heads * dim}, "
            f"not of shape {tuple(x.shape)}"
        )
    if not evenly_spaced(x):
        raise ValueError(f"rows of {prefix}x must be contiguous and evenly spaced, not of strides {x.stride()}")
    return prod(x.shape[:-1]) // max(tokens, 1)
