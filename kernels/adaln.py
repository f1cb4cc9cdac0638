"""Gated residual, LayerNorm and modulation in one pass over the rows: primal, dual, and backward.

x' = x + g * y;  n = (x' - mean) / sigma;  o = n * (1 + s) + b.
Tangent: dn = (dx' - mean(dx') - n * mean(n * dx')) / sigma;  do = dn * (1 + s) + n * ds + db.
A row is a token; g, s, b belong to its sample. Everything is computed in float32. The backward recomputes mean and
sigma from x' rather than storing them, and sums over a sample's tokens in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Launch, check_device, check_dtype, empty_like, nothing, planned
from mfengine.kernels.sums import sum_parts

MAX_WIDTH = 8192
_NOTHING = (None,) * 5
TOKENS_PER_PROGRAM = 16  # in the backward: a program sums gradients over this many tokens of a sample before it writes

# ----------------------------------------------------------------------------
# Kernels. One program takes a few tokens of one sample; in the backward, a run of them. A row is split into HEAD
# columns, the largest power of two in its width, and a TAIL for the rest: a row of 1152 occupies 1152 columns, not
# 2048. Names end in 1 for the head and in 2 for the tail. `inside` says which columns of the tail exist; None for the
# head.


@triton.jit
def _columns(FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Column numbers (1, WIDTH). A lane takes four columns for every dtype: 16 bytes of float32, 8 of half precision.

    The compiler would choose eight for half precision, and move rows between the two layouts through shared memory.
    """
    return (FIRST + tl.max_contiguous(tl.arange(0, WIDTH), 4))[None, :]


@triton.jit
def _load(row, cols, mask):
    if mask is None:
        return tl.load(row + cols).to(tl.float32)
    else:
        return tl.load(row + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(row, cols, mask, value):
    tl.store(row + cols, value.to(row.dtype.element_ty), mask=mask)


@triton.jit
def _mean(a1, a2, width):
    total = tl.sum(a1, 1, keep_dims=True)
    if a2 is not None:
        total += tl.sum(a2, 1, keep_dims=True)
    return total / width


@triton.jit
def _mean_product(a1, a2, b1, b2, width):
    total = tl.sum(a1 * b1, 1, keep_dims=True)
    if a2 is not None:
        total += tl.sum(a2 * b2, 1, keep_dims=True)
    return total / width


@triton.jit
def _moments(x1, x2, inside2, width, eps):
    """Means of rows, and reciprocals of their standard deviations."""
    mean = _mean(x1, x2, width)
    x1 -= mean
    if x2 is not None:
        x2 = tl.where(inside2, x2 - mean, 0.0)
    return mean, 1.0 / tl.sqrt(_mean_product(x1, x2, x1, x2, width) + eps)


@triton.jit
def _residual(x, y, gate, dx, dy, dgate, x_out, dx_out, cols, mask, inside):
    """x' and its tangent, stored if there is a y. Without a dx, both are x'."""
    stream = _load(x, cols, mask)
    dstream = stream
    if dx is not None:
        dstream = _load(dx, cols, mask)
    if y is not None:
        branch = _load(y, cols, mask)
        g = _load(gate, cols, inside)
        stream += g * branch
        _store(x_out, cols, mask, stream)
        if dx is not None:
            dstream += _load(dgate, cols, inside) * branch + g * _load(dy, cols, mask)
            _store(dx_out, cols, mask, dstream)
    return stream, dstream


@triton.jit
def _modulate(normal, dstream, dmean, along, rstd, shift, scale, dshift, dscale, o, do, cols, mask, inside):
    slope = 1.0 + _load(scale, cols, inside)
    if do is not None:
        dnormal = (dstream - dmean - normal * along) * rstd
        dout = dnormal * slope + normal * _load(dscale, cols, inside) + _load(dshift, cols, inside)
        _store(do, cols, mask, dout)
    _store(o, cols, mask, normal * slope + _load(shift, cols, inside))


@triton.jit
def forward_kernel(
    x, y, gate, shift, scale, dx, dy, dgate, dshift, dscale, x_out, o, dx_out, do,
    x_b, x_n, y_b, y_n, gate_b, shift_b, scale_b, dx_b, dx_n, dy_b, dy_n, dgate_b, dshift_b, dscale_b,
    tokens, width, eps,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A dual if there is a dx, with a residual if there is a y. Missing tensors are None."""
    parts = tl.cdiv(tokens, ROWS)
    b = (tl.program_id(0) // parts).to(tl.int64)
    n = (tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    row = (b * tokens + n) * width
    x += b * x_b + n * x_n
    o += row
    shift += b * shift_b
    scale += b * scale_b
    if y is not None:
        y += b * y_b + n * y_n
        gate += b * gate_b
        x_out += row
    if dx is not None:
        dx += b * dx_b + n * dx_n
        do += row
        dshift += b * dshift_b
        dscale += b * dscale_b
        if y is not None:
            dy += b * dy_b + n * dy_n
            dgate += b * dgate_b
            dx_out += row

    mask = n < tokens
    cols1 = _columns(0, HEAD)
    x1, dx1 = _residual(x, y, gate, dx, dy, dgate, x_out, dx_out, cols1, mask, None)
    x2 = None
    dx2 = None
    inside2 = None
    if TAIL:
        cols2 = _columns(HEAD, TAIL)
        inside2 = cols2 < width
        x2, dx2 = _residual(x, y, gate, dx, dy, dgate, x_out, dx_out, cols2, mask & inside2, inside2)
    mean, rstd = _moments(x1, x2, inside2, width, eps)
    x1 = (x1 - mean) * rstd
    if TAIL:
        x2 = tl.where(inside2, (x2 - mean) * rstd, 0.0)
    dmean = None
    along = None
    if dx is not None:
        dmean = _mean(dx1, dx2, width)
        along = _mean_product(x1, x2, dx1, dx2, width)
    _modulate(x1, dx1, dmean, along, rstd, shift, scale, dshift, dscale, o, do, cols1, mask, None)
    if TAIL:
        _modulate(x2, dx2, dmean, along, rstd, shift, scale, dshift, dscale, o, do, cols2, mask & inside2, inside2)


@triton.jit
def _load_row(x, y, gx_out, go, cols, inside):
    """x', y and the gradients of x' and o. Missing tensors are replaced by x'."""
    stream = _load(x, cols, inside)
    branch = stream
    gstream = stream
    if y is not None:
        branch = _load(y, cols, inside)
    if gx_out is not None:
        gstream = _load(gx_out, cols, inside)
    return stream, branch, gstream, _load(go, cols, inside)


@triton.jit
def _store_gradients(gnormal, normal, gmean, along, rstd, gstream, g, gx, gy, gx_out, cols, inside):
    """Store the gradients of x and y; returns the gradient of x."""
    gradient = (gnormal - gmean - normal * along) * rstd
    if gx_out is not None:
        gradient += gstream
    _store(gx, cols, inside, gradient)
    if gy is not None:
        _store(gy, cols, inside, gradient * g)
    return gradient


@triton.jit
def _store_sums(sums, gshift, gscale, ggate, width, cols, inside):
    _store(sums, cols, inside, gshift)
    _store(sums + width, cols, inside, gscale)
    if ggate is not None:
        _store(sums + 2 * width, cols, inside, ggate)


@triton.jit
def backward_kernel(
    x, y, gate, scale, gx_out, go, gx, gy, sums,
    x_b, x_n, y_b, y_n, gate_b, scale_b, gx_out_b, gx_out_n, go_b, go_n,
    tokens, width, eps,
    TOKENS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """x is the forward's x'. `sums` (B, parts, 3, width) gets this part's gradients of shift, scale and gate.

    Without a gx_out, x' has a gradient only through o.
    """
    parts = tl.cdiv(tokens, TOKENS)
    b, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    first = tl.cast(part * TOKENS, tl.int64)
    x += b * x_b + first * x_n
    go += b * go_b + first * go_n
    gx += (b * tokens + first) * width
    sums += (b * parts + part) * 3 * width
    cols1 = _columns(0, HEAD)
    slope1 = 1.0 + _load(scale + b * scale_b, cols1, None)
    gshift1 = tl.zeros((1, HEAD), tl.float32)
    gscale1 = tl.zeros((1, HEAD), tl.float32)
    g1 = None
    ggate1 = None
    inside2 = None
    if y is not None:
        y += b * y_b + first * y_n
        gy += (b * tokens + first) * width
        g1 = _load(gate + b * gate_b, cols1, None)
        ggate1 = tl.zeros((1, HEAD), tl.float32)
    if gx_out is not None:
        gx_out += b * gx_out_b + first * gx_out_n
    if TAIL:
        cols2 = _columns(HEAD, TAIL)
        inside2 = cols2 < width
        slope2 = 1.0 + _load(scale + b * scale_b, cols2, inside2)
        gshift2 = tl.zeros((1, TAIL), tl.float32)
        gscale2 = tl.zeros((1, TAIL), tl.float32)
        g2 = None
        ggate2 = None
        if y is not None:
            g2 = _load(gate + b * gate_b, cols2, inside2)
            ggate2 = tl.zeros((1, TAIL), tl.float32)

    for _ in range(tl.minimum(TOKENS, tokens - part * TOKENS)):
        x1, y1, gx1, go1 = _load_row(x, y, gx_out, go, cols1, None)
        gnormal1 = go1 * slope1
        x2 = None
        gnormal2 = None
        if TAIL:
            x2, y2, gx2, go2 = _load_row(x, y, gx_out, go, cols2, inside2)
            gnormal2 = go2 * slope2
        mean, rstd = _moments(x1, x2, inside2, width, eps)
        x1 = (x1 - mean) * rstd
        if TAIL:
            x2 = tl.where(inside2, (x2 - mean) * rstd, 0.0)
        gmean = _mean(gnormal1, gnormal2, width)
        along = _mean_product(gnormal1, gnormal2, x1, x2, width)
        gx1 = _store_gradients(gnormal1, x1, gmean, along, rstd, gx1, g1, gx, gy, gx_out, cols1, None)
        gshift1 += go1
        gscale1 += go1 * x1
        if y is not None:
            ggate1 += gx1 * y1
        if TAIL:
            gx2 = _store_gradients(gnormal2, x2, gmean, along, rstd, gx2, g2, gx, gy, gx_out, cols2, inside2)
            gshift2 += go2
            gscale2 += go2 * x2
            if y is not None:
                ggate2 += gx2 * y2
        x += x_n
        go += go_n
        gx += width
        if y is not None:
            y += y_n
            gy += width
        if gx_out is not None:
            gx_out += gx_out_n
    _store_sums(sums, gshift1, gscale1, ggate1, width, cols1, None)
    if TAIL:
        _store_sums(sums, gshift2, gscale2, ggate2, width, cols2, inside2)


# ----------------------------------------------------------------------------
# Launchers. `y` and `gate` are given together; without them there is no residual, and x' is x.
# They raise ValueError for arguments that the kernels do not support, before anything is launched.


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual stream and modulated rows.

    Args:
        x, y: (B, N, D) or (B * N, D); gate, shift, scale: (B, D). Each is float16, bfloat16 or float32, with any
            strides. D is at most 8192.
        eps: epsilon of the LayerNorm.

    Returns:
        x', in x's shape and dtype (x itself without a residual), and o in the dtype of scale.
    """
    primals = x, y, gate, shift, scale
    launch = _plan_forward(primals, eps)
    if launch is None:
        x, y, gate, shift, scale = map(_rows, primals)
        return forward(x, y, gate, shift, scale, eps)
    x_out, o = _outputs(x, y, scale)
    launch(*primals, *_NOTHING, x_out, o, None, None)
    return x_out, o


def forward_dual(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor,
    dx: Tensor, dy: Tensor | None, dgate: Tensor | None, dshift: Tensor, dscale: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Like `forward`, with tangents of the last K samples; the tangents' size gives K.

    Returns:
        x', o, and their tangents: dx' (dx itself without a residual), and do in dx's shape.
    """
    primals, tangents = (x, y, gate, shift, scale), (dx, dy, dgate, dshift, dscale)
    plan = _plan_dual((*primals, *tangents), eps)
    if plan is None:
        x, y, gate, shift, scale = map(_rows, primals)
        dx, dy, dgate, dshift, dscale = map(_rows, tangents)
        return forward_dual(x, y, gate, shift, scale, dx, dy, dgate, dshift, dscale, eps)
    lead, tail = plan
    x_out, o = _outputs(x, y, scale)
    dx_out, do = _outputs(dx, y, scale)
    lead(*primals, *_NOTHING, x_out, o, None, None)
    tail(*primals, *tangents, x_out, o, dx_out, do)
    return x_out, o, dx_out, do


def backward(
    x_out: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, gx_out: Tensor | None, go: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of the primal.

    Args:
        x_out: the forward's x'.
        y, gate, scale: arguments of the forward.
        gx_out: gradient of x'; None if x' has a gradient only through o.
        go: gradient of o.

    Returns:
        Gradients of x, y, gate, shift and scale, in the dtypes of x', y, gate, scale and scale.
    """
    inputs = x_out, y, gate, scale, gx_out, go
    launch = _plan_backward(inputs, eps)
    if launch is None:
        x_out, y, gate, scale, gx_out, go = map(_rows, inputs)
        return backward(x_out, y, gate, scale, gx_out, go, eps)
    batch, width = scale.shape
    tokens = x_out.numel() // max(scale.numel(), 1)
    gx = empty_like(x_out)
    gy = None if y is None else empty_like(y)
    parts = -(-tokens // TOKENS_PER_PROGRAM)
    sums = torch.empty(batch, parts, 3, width, dtype=torch.float32, device=x_out.device)
    launch(*inputs, gx, gy, sums)
    gshift, gscale = (empty_like(scale) for _ in range(2))
    ggate = None if gate is None else empty_like(gate)
    sum_parts(sums, (gshift, gscale, ggate))
    return gx, gy, ggate, gshift, gscale


# Plans: launches for tensors of a given layout, or None if their rows are not contiguous.


@planned
def _plan_forward(primals: Sequence[Any], eps: float) -> Callable[..., None] | None:
    primals = _check(*primals)
    if not _rows_are_contiguous(primals):
        return None
    return _forward(primals, _NOTHING, 0, len(primals[0]), eps)


@planned
def _plan_dual(tensors: Sequence[Any], eps: float) -> tuple[Callable[..., None], Callable[..., None]] | None:
    primals, tangents = _check(*tensors[:5]), _check(*tensors[5:], prefix="d")
    (x, y), (dx, dy) = primals[:2], tangents[:2]
    check_device("dx", dx, x)
    batch, tokens, width = x.shape
    if len(dx) > batch or (len(dx) and dx.shape[1:] != x.shape[1:]) or (y is None) != (dy is None):
        raise ValueError(f"dx must be (K, {tokens}, {width}) with K at most {batch}, not {tuple(dx.shape)}")
    if not _rows_are_contiguous((*primals, *tangents)):
        return None
    first = batch - len(dx)
    lead = _forward(primals, _NOTHING, 0, first, eps)
    return lead, _forward(primals, tangents, first, batch, eps)


def _forward(
    primals: Sequence[Any], tangents: Sequence[Any], first: int, last: int, eps: float
) -> Callable[..., None]:  # fmt: skip
    """The launch for samples `first` to `last`; tangents cover only these samples."""
    _, tokens, width = primals[0].shape
    if not (last - first) * tokens:
        return nothing
    starts = [0 if x is None else first * x.stride(0) for x in primals]
    output = first * tokens * width
    strides = [stride for x, y, *rows in (primals, tangents) for stride in (*_strides(2, x, y), *_strides(1, *rows))]
    shape = tile("forward" if tangents[0] is None else "dual", width)
    return Launch(
        forward_kernel, ((last - first) * -(-tokens // shape["ROWS"]),), (*strides, tokens, width, eps), shape,
        (*starts, 0, 0, 0, 0, 0, output if primals[1] is not None else 0, output),
    )  # fmt: skip


@planned
def _plan_backward(tensors: Sequence[Any], eps: float) -> Callable[..., None] | None:
    x_out, y, gate, scale, gx_out, go = tensors
    for gradient in (go, gx_out):
        if gradient is not None and gradient.shape != x_out.shape:
            raise ValueError(f"gradients must be of shape {tuple(x_out.shape)}")
    x_out, y, gate, _, scale = _check(x_out, y, gate, scale, scale)
    batch, tokens, width = x_out.shape
    gx_out, go = (None if g is None else _by_sample(g, batch) for g in (gx_out, go))
    if not _rows_are_contiguous((x_out, y, gate, scale, gx_out, go)):
        return None
    if not x_out.numel():
        return nothing
    parts = -(-tokens // TOKENS_PER_PROGRAM)
    return Launch(
        backward_kernel, (parts * batch,),
        (*_strides(2, x_out, y), *_strides(1, gate, scale), *_strides(2, gx_out, go), tokens, width, eps),
        {"TOKENS": TOKENS_PER_PROGRAM, **tile("backward", width)},
    )  # fmt: skip


def _outputs(x: Tensor, y: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors for x' and o, or for their tangents."""
    x_out = x if y is None else empty_like(x)
    return x_out, empty_like(x, scale.dtype)


def _check(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, *, prefix: str = ""
) -> tuple[Any, ...]:
    """The arguments, with tokens as (B, N, D); ValueError if the kernels do not support them."""
    if x.ndim not in (2, 3) or not 1 <= x.shape[-1] <= MAX_WIDTH or (x.ndim == 2 and len(x) % max(len(scale), 1)):
        raise ValueError(
            f"{prefix}x must be (B, N, D) or (B * N, D) with D from 1 to {MAX_WIDTH}, not of shape {tuple(x.shape)}"
        )
    if (y is None) != (gate is None):
        raise ValueError(f"{prefix}y and {prefix}gate must be given together")
    batch, width = len(scale) if x.ndim == 2 else len(x), x.shape[-1]
    for name, a, shape in (
        ("x", x, x.shape), ("y", y, x.shape), ("gate", gate, (batch, width)), ("shift", shift, (batch, width)),
        ("scale", scale, (batch, width)),
    ):  # fmt: skip
        if a is None:
            continue
        check_dtype(prefix + name, a)
        if tuple(a.shape) != tuple(shape):
            raise ValueError(f"{prefix}{name} must be of shape {tuple(shape)}, not {tuple(a.shape)}")
        check_device(prefix + name, a, x)
    return _by_sample(x, batch), None if y is None else _by_sample(y, batch), gate, shift, scale


def _rows_are_contiguous(tensors: Sequence[Tensor | None]) -> bool:
    return all(x is None or x.stride(-1) == 1 or x.shape[-1] == 1 for x in tensors)


def _rows(x: Any) -> Any:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _by_sample(x: Tensor, batch: int) -> Tensor:
    """Tokens as (B, N, D)."""
    return x if x.ndim == 3 else x.view(batch, len(x) // max(batch, 1), x.shape[1])


def _strides(dims: int, *tensors: Tensor | None) -> list[int]:
    """The first `dims` strides of each tensor; zeros for a missing one."""
    return [0 if x is None else x.stride(i) for x in tensors for i in range(dims)]


# Most elements of a row that a lane holds. They fit into the registers for rows up to 4096 wide. One warp holds a whole
# row of XL/2, so its sums need no barrier. Times on a GPU: not measured yet.
ELEMENTS = {"forward": 80, "dual": 40, "backward": 24}


@lru_cache(maxsize=1024)
def tile(kernel: str, width: int) -> dict[str, int]:
    """Columns and warps for a kernel of this name, and the rows of a program if it takes several at a time."""
    head = 1 << (width.bit_length() - 1)
    warps = 1
    while True:
        # A tail has at least four columns per lane: fewer would mean accesses of less than 8 bytes.
        tail = max(triton.next_power_of_2(width - head), 128 * warps) if width > head else 0
        if head + tail <= 32 * warps * ELEMENTS[kernel]:
            break
        warps *= 2
    shape = {"HEAD": head, "TAIL": tail, "num_warps": warps, "num_stages": 1}
    if kernel == "backward":
        shape["maxnreg"] = min(255, 2048 // warps)  # by default, the assembler spills to fit one more program
    else:
        shape["ROWS"] = 1 << ((32 * warps * ELEMENTS[kernel] // (head + tail)).bit_length() - 1)
    return shape
