"""adaLN: gated residual, LayerNorm without affine parameters, modulation.

x' = x + g * y;  n = (x' - mean) / sigma;  o = n * (1 + s) + b.
Tangent: dn = (dx' - mean(dx') - n * mean(n * dx')) / sigma;  do = dn * (1 + s) + n * ds + db.
The modulation s, b, g is per sample: (B, D) for tokens (B, N, D).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.dual import A, accumulation_dtype, linear_map, primal_of, push, through_forward_mode
from mfengine.ops.lazy import Lazy
from mfengine.ops.op import Op

if TYPE_CHECKING:
    from mfengine.kernels import adaln as kernel
else:
    kernel = Lazy("mfengine.kernels.adaln")

EPS = 1e-6  # as in the reference code's LayerNorm


def adaln_modulate(x: A, shift: A, scale: A, eps: float = EPS) -> A:
    """LN(x) * (1 + scale) + shift.

    Args:
        x: (B, N, D) or (B * N, D) float, the residual stream; or a dual, with a tangent (K, N, D) or (K * N, D) of its
            last rows.
        shift, scale: (B, D) float; or duals, with tangents (K, D).
        eps: epsilon of the LayerNorm.

    Returns:
        x's shape in the dtype of scale; for duals the same with a tangent. Computed in float32 (float64 for float64).

    Raises:
        ValueError: on the fused path, if the kernels do not support the arguments: D above 8192, a dtype other than
            float16, bfloat16 and float32, or shapes or devices that do not match.
    """
    return ADALN(x, shift, scale, options=(eps,))[0]


def gated_residual_adaln(x: A, y: A, gate: A, shift: A, scale: A, eps: float = EPS) -> tuple[A, A]:
    """x' = x + gate * y and LN(x') * (1 + scale) + shift, for shapes as in `adaln_modulate`.

    Args:
        x: (B, N, D) or (B * N, D) float, the residual stream; y: likewise, the output of a branch. Or duals, with
            tangents (K, N, D) or (K * N, D) of their last rows.
        gate, shift, scale: (B, D) float; or duals, with tangents (K, D).
        eps: epsilon of the LayerNorm.

    Returns:
        (x', o), each of x's shape: the residual stream in the dtype of x, the modulated one in the dtype of scale. For
        duals, two duals.

    Raises:
        ValueError: as in `adaln_modulate`.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, gated_residual_adaln
        >>> x, y = torch.randn(2, 4, 10, 32)
        >>> gate, shift, scale = torch.randn(3, 4, 32)
        >>> x_out, o = gated_residual_adaln(*(Dual(a, a[3:]) for a in (x, y, gate, shift, scale)))
        >>> x_out.primal.shape, o.tangent.shape
        (torch.Size([4, 10, 32]), torch.Size([1, 10, 32]))
    """
    x, o = RESIDUAL_ADALN(x, y, gate, shift, scale, options=(eps,))
    return x, o


# ----------------------------------------------------------------------------
# Plain.


def _plain(x: A, shift: A, scale: A, eps: float) -> tuple[A]:
    x, restore = _by_sample(x, scale)
    o = push(partial(_modulate, eps=eps), partial(_modulate_tangent, eps=eps), x, shift, scale)
    return (linear_map(restore, o),)


def _plain_residual(x: A, y: A, gate: A, shift: A, scale: A, eps: float) -> tuple[A, A]:
    x, restore = _by_sample(x, scale)
    x = push(_residual, _residual_tangent, x, _by_sample(y, scale)[0], gate)
    return linear_map(restore, x), linear_map(restore, _plain(x, shift, scale, eps)[0])


def _by_sample(x: A, scale: A) -> tuple[A, Callable[[Tensor], Tensor]]:
    """x as (B, N, D), and a function that restores its own shape."""
    if primal_of(x).ndim == 3:
        return x, lambda x: x
    tokens = len(primal_of(x)) // max(len(primal_of(scale)), 1)
    return linear_map(lambda x: x.view(len(x) // max(tokens, 1), tokens, x.shape[1]), x), lambda x: x.flatten(0, 1)


def written_out(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension, and 1 / sigma, from operators with correct derivatives."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    wide = accumulation_dtype(x)
    x = x.to(wide)
    # PyTorch's function has wrong gradients through its tangent (pytorch #196700).
    n = written_out(x, eps)[0] if through_forward_mode() else F.layer_norm(x, x.shape[-1:], eps=eps)
    return (n * (1 + scale.to(wide)).unsqueeze(1) + shift.to(wide).unsqueeze(1)).to(scale.dtype)


def _modulate_tangent(
    x: Tensor, shift: Tensor, scale: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor, eps: float
) -> Tensor:
    wide = accumulation_dtype(x)
    x, dx = x.to(wide), dx.to(wide)
    n, rstd = written_out(x, eps)
    dn = (dx - dx.mean(-1, keepdim=True) - n * (n * dx).mean(-1, keepdim=True)) * rstd
    do = dn * (1 + scale.to(wide)).unsqueeze(1) + n * dscale.to(wide).unsqueeze(1) + dshift.to(wide).unsqueeze(1)
    return do.to(scale.dtype)


def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + (gate.unsqueeze(1) * y).to(x.dtype)


def _residual_tangent(x: Tensor, y: Tensor, gate: Tensor, dx: Tensor, dy: Tensor, dgate: Tensor) -> Tensor:
    return dx + (dgate.unsqueeze(1) * y + gate.unsqueeze(1) * dy).to(dx.dtype)


# ----------------------------------------------------------------------------
# Fused.


def _forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor]:
    return (kernel.forward(x, None, None, shift, scale, eps)[1],)


def _dual(
    x: Tensor, shift: Tensor, scale: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _, o, _, do = kernel.forward_dual(x, None, None, shift, scale, dx, None, None, dshift, dscale, eps)
    return o, do


def _backward(x: Tensor, scale: Tensor, go: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    gx, _, _, gshift, gscale = kernel.backward(x, None, None, scale, None, go, eps)
    return gx, gshift, gscale


ADALN = Op(
    "adaln",
    forward=_forward,
    dual=_dual,
    backward=_backward,
    plain=_plain,
    shapes=lambda x, shift, scale, eps: (scale.new_empty(x.shape),),
    outputs=("o",),
    saved=("x", "scale"),
    like={"shift": "scale"},
)


def _residual_forward(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return kernel.forward(x, y, gate, shift, scale, eps)


def _residual_dual(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    dx: Tensor, dy: Tensor, dgate: Tensor, dshift: Tensor, dscale: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return kernel.forward_dual(x, y, gate, shift, scale, dx, dy, dgate, dshift, dscale, eps)


def _residual_backward(
    x_out: Tensor, y: Tensor, gate: Tensor, scale: Tensor, gx_out: Tensor | None, go: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    go = torch.zeros_like(x_out, dtype=scale.dtype) if go is None else go  # None: the output was not used
    gx, gy, ggate, gshift, gscale = kernel.backward(x_out, y, gate, scale, gx_out, go, eps)
    assert gy is not None
    assert ggate is not None
    return gx, gy, ggate, gshift, gscale


RESIDUAL_ADALN = Op(
    "residual_adaln",
    forward=_residual_forward,
    dual=_residual_dual,
    backward=_residual_backward,
    plain=_plain_residual,
    shapes=lambda x, y, gate, shift, scale, eps: (x.new_empty(x.shape), scale.new_empty(x.shape)),
    outputs=("x_out", "o"),
    saved=("x_out", "y", "gate", "scale"),
    like={"x": "x_out", "shift": "scale"},
)
