"""Gated residual, LayerNorm and modulation in one pass over the rows: primal, dual, and backward.

x' = x + g * y;  n = (x' - mean) / sigma;  o = n * (1 + s) + b.
Tangent: dn = (dx' - mean(dx') - n * mean(n * dx')) / sigma;  do = dn * (1 + s) + n * ds + db.
A row is a token; g, s, b belong to its sample. Everything is computed in float32. The backward recomputes mean and
sigma from x' rather than storing them, and sums over a sample's tokens in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Config, Launch, check_device, check_dtype, empty_like, nothing, planned
from mfengine.kernels.sums import sum_parts

MAX_WIDTH = 8192
_NOTHING = (None,) * 5
TOKENS_PER_PROGRAM = 16  # of the backward, which adds up a sample's gradients over so many tokens before writing

# ----------------------------------------------------------------------------
# Kernels. One program is one token, or in the backward a run of tokens of one sample.


@triton.jit
def _moments(x, mask, width, eps):
    """Centred row over its standard deviation, and the reciprocal of that."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * rstd, rstd


@triton.jit
def forward_kernel(
    x, y, gate, shift, scale, dx, dy, dgate, dshift, dscale, x_out, o, dx_out, do,
    x_b, x_n, y_b, y_n, gate_b, shift_b, scale_b, dx_b, dx_n, dy_b, dy_n, dgate_b, dshift_b, dscale_b,
    tokens, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Dual if there is a dx, with a residual if there is a y: what there is not is None."""
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    stream = tl.load(x + b * x_b + n * x_n + cols, mask=mask, other=0.0).to(tl.float32)
    if dx is not None:
        dstream = tl.load(dx + b * dx_b + n * dx_n + cols, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        branch = tl.load(y + b * y_b + n * y_n + cols, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate + b * gate_b + cols, mask=mask, other=0.0).to(tl.float32)
        if dx is not None:
            dbranch = tl.load(dy + b * dy_b + n * dy_n + cols, mask=mask, other=0.0).to(tl.float32)
            dg = tl.load(dgate + b * dgate_b + cols, mask=mask, other=0.0).to(tl.float32)
            dstream += dg * branch + g * dbranch
            tl.store(dx_out + row * width + cols, dstream.to(dx_out.dtype.element_ty), mask=mask)
        stream += g * branch
        tl.store(x_out + row * width + cols, stream.to(x_out.dtype.element_ty), mask=mask)
    normal, rstd = _moments(stream, mask, width, eps)
    s = tl.load(scale + b * scale_b + cols, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(shift + b * shift_b + cols, mask=mask, other=0.0).to(tl.float32)
    if dx is not None:
        along = tl.sum(normal * dstream, 0) / width
        dnormal = tl.where(mask, (dstream - tl.sum(dstream, 0) / width - normal * along) * rstd, 0.0)
        ds = tl.load(dscale + b * dscale_b + cols, mask=mask, other=0.0).to(tl.float32)
        dt = tl.load(dshift + b * dshift_b + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(do + row * width + cols, (dnormal * (1.0 + s) + normal * ds + dt).to(do.dtype.element_ty), mask=mask)
    tl.store(o + row * width + cols, (normal * (1.0 + s) + t).to(o.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, y, gate, scale, gx_out, go, gx, gy, sums,
    x_b, x_n, y_b, y_n, gate_b, scale_b, gx_out_b, gx_out_n, go_b, go_n,
    tokens, width, eps,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x is x' of the forward. `sums` (B, parts, 3, width): this part's gradients of shift, scale and gate.

    Without a gx_out, x' has no gradient but that through o.
    """
    parts = tl.cdiv(tokens, TOKENS)
    b, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    slope = 1.0 + tl.load(scale + b * scale_b + cols, mask=mask, other=0.0).to(tl.float32)
    gshift = tl.zeros((BLOCK,), tl.float32)
    gscale = tl.zeros((BLOCK,), tl.float32)
    if y is not None:
        g = tl.load(gate + b * gate_b + cols, mask=mask, other=0.0).to(tl.float32)
        ggate = tl.zeros((BLOCK,), tl.float32)
    for token in range(part * TOKENS, tl.minimum(part * TOKENS + TOKENS, tokens)):
        n = tl.cast(token, tl.int64)
        row = b * tokens + n
        stream = tl.load(x + b * x_b + n * x_n + cols, mask=mask, other=0.0).to(tl.float32)
        normal, rstd = _moments(stream, mask, width, eps)
        gout = tl.load(go + b * go_b + n * go_n + cols, mask=mask, other=0.0).to(tl.float32)
        gshift += gout
        gscale += gout * normal
        gnormal = gout * slope
        along = tl.sum(gnormal * normal, 0) / width
        gstream = (gnormal - tl.sum(gnormal, 0) / width - normal * along) * rstd
        if gx_out is not None:
            gstream += tl.load(gx_out + b * gx_out_b + n * gx_out_n + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(gx + row * width + cols, gstream.to(gx.dtype.element_ty), mask=mask)
        if y is not None:
            branch = tl.load(y + b * y_b + n * y_n + cols, mask=mask, other=0.0).to(tl.float32)
            ggate += gstream * branch
            tl.store(gy + row * width + cols, (gstream * g).to(gy.dtype.element_ty), mask=mask)
    at = sums + (b * parts + part) * 3 * width + cols
    tl.store(at, gshift, mask=mask)
    tl.store(at + width, gscale, mask=mask)
    if y is not None:
        tl.store(at + 2 * width, ggate, mask=mask)


# ----------------------------------------------------------------------------
# Launchers. `y` and `gate` are both given, or both None: then there is no residual, and x' is x.
# They raise ValueError for arguments that the kernels cannot take, before anything is launched.


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual stream and modulated rows.

    Args:
        x, y: (B, N, D) or (B * N, D); gate, shift, scale: (B, D). float16, bfloat16 or float32, each its own, of any
            strides. D is at most 8192.
        eps: of the LayerNorm.

    Returns:
        x', of x's shape and dtype, which is x itself without a residual, and o in the dtype of scale.
    """
    primals = x, y, gate, shift, scale
    launch = _plan_forward(primals, eps, CONFIGS["forward"])
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
    """`forward`, with the tangents of the last K samples of the batch, K being theirs.

    Returns:
        x', o, and their tangents, dx', which is dx itself without a residual, and do, of dx's shape.
    """
    primals, tangents = (x, y, gate, shift, scale), (dx, dy, dgate, dshift, dscale)
    plan = _plan_dual((*primals, *tangents), eps, CONFIGS["forward"], CONFIGS["dual"])
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
        x_out: x' of the forward.
        y, gate, scale: of the forward.
        gx_out: gradient of x', or None where there is none but that through o.
        go: gradient of o.

    Returns:
        Gradients of x, y, gate, shift and scale, in the dtypes of x', y, gate, scale and scale.
    """
    inputs = x_out, y, gate, scale, gx_out, go
    launch = _plan_backward(inputs, eps, CONFIGS["backward"])
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


# Plans: launches for tensors of one layout, or None if their rows are not contiguous.


@planned
def _plan_forward(primals: Sequence[Any], eps: float, config: Config) -> Callable[..., None] | None:
    primals = _check(*primals)
    if not _rows_are_contiguous(primals):
        return None
    return _forward(primals, _NOTHING, 0, len(primals[0]), eps, config)


@planned
def _plan_dual(
    tensors: Sequence[Any], eps: float, forward: Config, dual: Config
) -> tuple[Callable[..., None], Callable[..., None]] | None:
    primals, tangents = _check(*tensors[:5]), _check(*tensors[5:], prefix="d")
    (x, y), (dx, dy) = primals[:2], tangents[:2]
    check_device("dx", dx, x)
    batch, tokens, width = x.shape
    if len(dx) > batch or (len(dx) and dx.shape[1:] != x.shape[1:]) or (y is None) != (dy is None):
        raise ValueError(f"dx must be (K, {tokens}, {width}) with K at most {batch}, not {tuple(dx.shape)}")
    if not _rows_are_contiguous((*primals, *tangents)):
        return None
    first = batch - len(dx)
    lead = _forward(primals, _NOTHING, 0, first, eps, forward)
    return lead, _forward(primals, tangents, first, batch, eps, dual)


def _forward(
    primals: Sequence[Any], tangents: Sequence[Any], first: int, last: int, eps: float,
    config: Config,
) -> Callable[..., None]:  # fmt: skip
    """The launch for samples `first` to `last`; tangents are of these alone."""
    _, tokens, width = primals[0].shape
    if not (last - first) * tokens:
        return nothing
    starts = [0 if x is None else first * x.stride(0) for x in primals]
    output = first * tokens * width
    strides = [stride for x, y, *rows in (primals, tangents) for stride in (*_strides(2, x, y), *_strides(1, *rows))]
    return Launch(
        forward_kernel, ((last - first) * tokens,), (*strides, tokens, width, eps),
        {"BLOCK": block(width), **config.kwargs},
        (*starts, 0, 0, 0, 0, 0, output if primals[1] is not None else 0, output),
    )  # fmt: skip


@planned
def _plan_backward(tensors: Sequence[Any], eps: float, config: Config) -> Callable[..., None] | None:
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
        {"TOKENS": TOKENS_PER_PROGRAM, "BLOCK": block(width), **config.kwargs},
    )  # fmt: skip


def _outputs(x: Tensor, y: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """For x' and o, or their tangents."""
    x_out = x if y is None else empty_like(x)
    return x_out, empty_like(x, scale.dtype)


def _check(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, *, prefix: str = ""
) -> tuple[Any, ...]:
    """The arguments, tokens as (B, N, D); ValueError for what the kernels do not take."""
    if x.ndim not in (2, 3) or not 1 <= x.shape[-1] <= MAX_WIDTH or (x.ndim == 2 and len(x) % max(len(scale), 1)):
        raise ValueError(
            f"{prefix}x must be (B, N, D) or (B * N, D) with D from 1 to {MAX_WIDTH}, not of shape {tuple(x.shape)}"
        )
    if (y is None) != (gate is None):
        raise ValueError(f"{prefix}y and {prefix}gate go together")
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
    """(B, N, D)."""
    return x if x.ndim == 3 else x.view(batch, len(x) // max(batch, 1), x.shape[1])


def _strides(dims: int, *tensors: Tensor | None) -> list[int]:
    """The first strides of each; zeros for what there is not."""
    return [0 if x is None else x.stride(i) for x in tensors for i in range(dims)]


def block(width: int) -> int:
    return triton.next_power_of_2(width)


# Times on a GPU: not measured yet.
CONFIGS = {
    "forward": Config(num_warps=4, num_stages=1),
    "dual": Config(num_warps=8, num_stages=1),
    "backward": Config(num_warps=8, num_stages=1),
}
