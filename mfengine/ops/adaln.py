"""adaLN: gated residual, LayerNorm without affine parameters, modulation.

x' = x + g * y;  n = (x' - mean) / sigma;  o = n * (1 + s) + b.
Tangent: dn = (dx' - mean(dx') - n * mean(n * dx')) / sigma;  do = dn * (1 + s) + n * ds + db.
The modulation s, b, g is per sample: (B, D) against tokens (B, N, D).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.backend import fused
from mfengine.ops.dual import A, accumulation_dtype, primal_of, push, push_fused

EPS = 1e-6  # of the reference code's LayerNorm


def adaln_modulate(x: A, shift: A, scale: A, eps: float = EPS) -> A:
    """LN(x) * (1 + scale) + shift.

    Args:
        x: (B, N, D) float, the residual stream; or a dual, with a tangent (K, N, D) of its last K rows.
        shift, scale: (B, D) float; or duals, with tangents (K, D).
        eps: of the LayerNorm.

    Returns:
        (B, N, D) in the dtype of scale; of duals the same with a tangent (K, N, D). Computed in float32, of float64 in
        float64.

    Raises:
        ValueError: on the fused path, whatever the kernels do not take: D above 8192, a dtype other than float16,
            bfloat16 and float32, shapes or devices that do not go together.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, adaln_modulate
        >>> x, shift, scale = torch.randn(4, 10, 32), torch.randn(4, 32), torch.randn(4, 32)
        >>> adaln_modulate(x, shift, scale).shape
        torch.Size([4, 10, 32])
        >>> o, do = adaln_modulate(Dual(x, x[2:]), Dual(shift, shift[2:]), Dual(scale, scale[2:]))
        >>> do.shape
        torch.Size([2, 10, 32])
    """
    if fused(primal_of(scale)):
        return push_fused(partial(_fused_modulate, eps=eps), partial(_modulate_dual_op, eps=eps), x, shift, scale)[0]
    return push(partial(_modulate, eps=eps), partial(_modulate_tangent, eps=eps), x, shift, scale)


def gated_residual_adaln(x: A, y: A, gate: A, shift: A, scale: A, eps: float = EPS) -> tuple[A, A]:
    """x' = x + gate * y and LN(x') * (1 + scale) + shift, for shapes as in `adaln_modulate`.

    Args:
        x: (B, N, D) float, the residual stream; y: (B, N, D) float, what a branch adds to it. Or duals, with tangents
            (K, N, D) of their last K rows.
        gate, shift, scale: (B, D) float; or duals, with tangents (K, D).
        eps: of the LayerNorm.

    Returns:
        (x', o), each (B, N, D): the residual stream in the dtype of x, the modulated one in the dtype of scale. Of
        duals two duals.

    Raises:
        ValueError: as `adaln_modulate`.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, gated_residual_adaln
        >>> x, y = torch.randn(2, 4, 10, 32)
        >>> gate, shift, scale = torch.randn(3, 4, 32)
        >>> x_out, o = gated_residual_adaln(x, y, gate, shift, scale)
        >>> x_out, o = gated_residual_adaln(*(Dual(a, a[3:]) for a in (x, y, gate, shift, scale)))
        >>> x_out.primal.shape, o.tangent.shape
        (torch.Size([4, 10, 32]), torch.Size([1, 10, 32]))
    """
    if fused(primal_of(scale)):
        rules = partial(_residual_op, eps=eps), partial(_residual_dual_op, eps=eps)
        x, o = push_fused(*rules, x, y, gate, shift, scale)
        return x, o
    x = push(_residual, _residual_tangent, x, y, gate)
    return x, push(partial(_modulate, eps=eps), partial(_modulate_tangent, eps=eps), x, shift, scale)


# ----------------------------------------------------------------------------
# Reference.


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    wide = accumulation_dtype(x)
    n = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (n * (1 + scale.to(wide)).unsqueeze(1) + shift.to(wide).unsqueeze(1)).to(scale.dtype)


def _modulate_tangent(
    x: Tensor, shift: Tensor, scale: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor, eps: float
) -> Tensor:
    wide = accumulation_dtype(x)
    x, dx = x.to(wide), dx.to(wide)
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = centred * rstd
    dn = (dx - dx.mean(-1, keepdim=True) - n * (n * dx).mean(-1, keepdim=True)) * rstd
    do = dn * (1 + scale.to(wide)).unsqueeze(1) + n * dscale.to(wide).unsqueeze(1) + dshift.to(wide).unsqueeze(1)
    return do.to(scale.dtype)


def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + (gate.unsqueeze(1) * y).to(x.dtype)


def _residual_tangent(x: Tensor, y: Tensor, gate: Tensor, dx: Tensor, dy: Tensor, dgate: Tensor) -> Tensor:
    return dx + (dgate.unsqueeze(1) * y + gate.unsqueeze(1) * dy).to(dx.dtype)


# ----------------------------------------------------------------------------
# Fused, as operators that PyTorch knows by name.


def _rows(*tensors: Tensor) -> list[Any]:
    """As the kernels read them: each row in one piece."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@torch.library.custom_op("mfengine::adaln", mutates_args=())
def _modulate_op(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    from mfengine.kernels import adaln as kernel

    x, shift, scale = _rows(x, shift, scale)
    return kernel.forward(x, None, None, shift, scale, eps)[1]


@torch.library.custom_op("mfengine::adaln_dual", mutates_args=())
def _modulate_dual_op(
    x: Tensor, shift: Tensor, scale: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from mfengine.kernels import adaln as kernel

    x, shift, scale, dx, dshift, dscale = _rows(x, shift, scale, dx, dshift, dscale)
    _, o, _, do = kernel.forward_dual(x, None, None, shift, scale, dx, None, None, dshift, dscale, eps)
    return o, do


@torch.library.custom_op("mfengine::adaln_backward", mutates_args=())
def _modulate_backward_op(x: Tensor, scale: Tensor, go: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from mfengine.kernels import adaln as kernel

    x, scale = _rows(x, scale)
    gx, _, _, gshift, gscale = kernel.backward(x, None, None, scale, None, go, eps)
    return gx, gshift, gscale


@torch.library.custom_op("mfengine::residual_adaln", mutates_args=())
def _residual_op(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from mfengine.kernels import adaln as kernel

    return kernel.forward(*_rows(x, y, gate, shift, scale), eps=eps)


@torch.library.custom_op("mfengine::residual_adaln_dual", mutates_args=())
def _residual_dual_op(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    dx: Tensor, dy: Tensor, dgate: Tensor, dshift: Tensor, dscale: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from mfengine.kernels import adaln as kernel

    return kernel.forward_dual(*_rows(x, y, gate, shift, scale, dx, dy, dgate, dshift, dscale), eps=eps)


@torch.library.custom_op("mfengine::residual_adaln_backward", mutates_args=())
def _residual_backward_op(
    x_out: Tensor, y: Tensor, gate: Tensor, scale: Tensor, gx_out: Tensor, go: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mfengine.kernels import adaln as kernel

    y, gate, scale = _rows(y, gate, scale)
    gx, gy, ggate, gshift, gscale = kernel.backward(x_out, y, gate, scale, gx_out, go, eps)
    assert gy is not None
    assert ggate is not None
    return gx, gy, ggate, gshift, gscale


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@_modulate_op.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _like(x, scale.dtype)


@_modulate_dual_op.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _like(x, scale.dtype), _like(dx, scale.dtype)


@_modulate_backward_op.register_fake
def _(x: Tensor, scale: Tensor, go: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(scale), _like(scale)


@_residual_op.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x, scale.dtype)


@_residual_dual_op.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    dx: Tensor, dy: Tensor, dgate: Tensor, dshift: Tensor, dscale: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(x), _like(x, scale.dtype), _like(dx, x.dtype), _like(dx, scale.dtype)


@_residual_backward_op.register_fake
def _(
    x_out: Tensor, y: Tensor, gate: Tensor, scale: Tensor, gx_out: Tensor, go: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _like(x_out), _like(y), _like(gate), _like(scale), _like(scale)


# The backward is that of the primal, with or without a tangent beside it. Tangents have no gradient, and none is made
# up for them.


def _save_modulate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[2])
    ctx.eps = inputs[-1]
    ctx.tangents = len(inputs) - 4


def _modulate_backward(ctx: Any, go: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*_modulate_backward_op(*ctx.saved_tensors, go, ctx.eps), *[None] * ctx.tangents, None)


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, y, gate, _, scale = inputs[:5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], y, gate, scale)
    ctx.eps = inputs[-1]
    ctx.tangents = len(inputs) - 6


def _residual_backward(ctx: Any, gx_out: Tensor | None, go: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x_out, y, gate, scale = ctx.saved_tensors
    gx_out = torch.zeros_like(x_out) if gx_out is None else gx_out  # of one that nothing used
    go = torch.zeros_like(x_out, dtype=scale.dtype) if go is None else go
    gradients = _residual_backward_op(x_out, y, gate, scale, gx_out, go, ctx.eps)
    return (*gradients, *[None] * ctx.tangents, None)


_modulate_op.register_autograd(_modulate_backward, setup_context=_save_modulate)
_modulate_dual_op.register_autograd(_modulate_backward, setup_context=_save_modulate)
_residual_op.register_autograd(_residual_backward, setup_context=_save_residual)
_residual_dual_op.register_autograd(_residual_backward, setup_context=_save_residual)


def _fused_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor]:
    return (_modulate_op(x, shift, scale, eps),)
