"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) with a weight, with or without a preceding gated residual update.

x' = x + g * y;  n = x' / rms with rms = sqrt(mean(x'^2) + eps);  o = n * w.
Tangent: dx' = dx + g * dy + dg * y;  dn = (dx' - n * mean(n * dx')) / rms;  do = dn * w + n * dw.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfengine.ops.dual import A, Dual, accumulation_dtype, primal_of, push
from mfengine.ops.lazy import Lazy
from mfengine.ops.op import Op

if TYPE_CHECKING:
    from mfengine.kernels import rmsnorm as kernel
else:
    kernel = Lazy("mfengine.kernels.rmsnorm")

EPS = 1e-6


def rms_norm(x: A, weight: Tensor | Dual, eps: float = EPS, dtype: torch.dtype | None = None) -> A:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        x: (B, ..., D) float; or a dual, with a tangent (K, ..., D) of its last K rows.
        weight: (D,) float; or a dual, with a tangent (D,).
        eps: added to the mean square.
        dtype: dtype of the output; None takes that of x.

    Returns:
        Shape of x; for duals the same with a tangent (K, ..., D). Computed in float32 (float64 for float64).

    Raises:
        ValueError: on the fused path, if the kernels do not support the arguments: D above 8192, a dtype other than
            float16, bfloat16 and float32, or shapes or devices that do not match.
    """
    return RMS_NORM(x, weight, options=(eps, dtype))[0]


def gated_residual_rms_norm(x: A, y: A, gate: Tensor | Dual, weight: Tensor | Dual, eps: float = EPS) -> tuple[A, A]:
    """x' = x + gate * y and x' / sqrt(mean(x'^2) + eps) * weight.

    Args:
        x: (B, ..., D) float, the residual stream; y: likewise, the output of a branch. Or duals, with tangents (K, ...,
            D) of their last K rows.
        gate, weight: (D,) float; or duals, with tangents (D,).
        eps: added to the mean square.

    Returns:
        (x', o), each of x's shape: the residual stream in the dtype of x, the normalised one in the dtype of y. For
        duals, two duals. Computed in float32 (float64 for float64).

    Raises:
        ValueError: as in `rms_norm`.
    """
    x, o = RESIDUAL_RMS_NORM(x, y, gate, weight, options=(eps,))
    return x, o


# ----------------------------------------------------------------------------
# Plain.


def _plain(x: A, weight: A, eps: float, dtype: torch.dtype | None) -> tuple[A]:
    dtype = dtype or primal_of(x).dtype
    primal, tangent = (partial(f, eps=eps, dtype=dtype) for f in (rms_normalise, rms_tangent))
    return (push(primal, tangent, x, weight, parameters=1),)


def _plain_residual(x: A, y: A, gate: A, weight: A, eps: float) -> tuple[A, A]:
    x = push(_residual, _residual_tangent, x, y, gate, parameters=1)
    return x, _plain(x, weight, eps, primal_of(y).dtype)[0]


def rms_normalise(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = x.to(accumulation_dtype(x))
    return (wide * _reciprocal_rms(wide, eps) * weight.to(wide.dtype)).to(dtype)


def rms_tangent(
    x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    wide = accumulation_dtype(x)
    x, dx = x.to(wide), dx.to(wide)
    rstd = _reciprocal_rms(x, eps)
    n = x * rstd
    do = (dx - n * (n * dx).mean(-1, keepdim=True)) * rstd * weight.to(wide)
    return (do if dweight is None else do + n * dweight.to(wide)).to(dtype)


def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    return torch.addcmul(x.to(wide), gate.to(wide), y.to(wide)).to(x.dtype)


def _residual_tangent(x: Tensor, y: Tensor, gate: Tensor, dx: Tensor, dy: Tensor, dgate: Tensor | None) -> Tensor:
    along = _residual(dx, dy, gate)
    return along if dgate is None else _residual(along, y, dgate)


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


# ----------------------------------------------------------------------------
# Fused.


def _dense(x: Any) -> Any:
    return None if x is None else x.contiguous()


def _forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None) -> tuple[Tensor]:
    return (kernel.forward(x.contiguous(), None, None, weight.contiguous(), eps, dtype or x.dtype)[1],)


def _dual(
    x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor | None, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    x, weight, dx, dweight = map(_dense, (x, weight, dx, dweight))
    _, o, _, do = kernel.forward_dual(x, None, None, weight, dx, None, None, dweight, eps, dtype or x.dtype)
    return o, do


def _backward(x: Tensor, weight: Tensor, go: Tensor, eps: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    gx, _, _, gweight = kernel.backward(x.contiguous(), None, None, weight.contiguous(), None, go.contiguous(), eps)
    return gx, gweight


RMS_NORM = Op(
    "rms_norm",
    forward=_forward,
    dual=_dual,
    backward=_backward,
    plain=_plain,
    shapes=lambda x, weight, eps, dtype: (x.new_empty(x.shape, dtype=dtype),),
    outputs=("o",),
    saved=("x", "weight"),
    parameters=1,
)


def _residual_forward(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, y, gate, weight = map(_dense, (x, y, gate, weight))
    return kernel.forward(x, y, gate, weight, eps, y.dtype)


def _residual_dual(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor,
    dx: Tensor, dy: Tensor, dgate: Tensor | None, dweight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, y, gate, weight, dx, dy, dgate, dweight = map(_dense, (x, y, gate, weight, dx, dy, dgate, dweight))
    return kernel.forward_dual(x, y, gate, weight, dx, dy, dgate, dweight, eps, y.dtype)


def _residual_backward(
    x_out: Tensor, y: Tensor, gate: Tensor, weight: Tensor, gx_out: Tensor | None, go: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    go = torch.zeros_like(y) if go is None else go  # None: the output was not used
    x_out, y, gate, weight, gx_out, go = map(_dense, (x_out, y, gate, weight, gx_out, go))
    gx, gy, ggate, gweight = kernel.backward(x_out, y, gate, weight, gx_out, go, eps)
    assert gy is not None
    assert ggate is not None
    return gx, gy, ggate, gweight


RESIDUAL_RMS_NORM = Op(
    "residual_rms_norm",
    forward=_residual_forward,
    dual=_residual_dual,
    backward=_residual_backward,
    plain=_plain_residual,
    shapes=lambda x, y, gate, weight, eps: (x.new_empty(x.shape), y.new_empty(x.shape)),
    outputs=("x_out", "o"),
    saved=("x_out", "y", "gate", "weight"),
    like={"x": "x_out"},
    parameters=2,
)
