"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) with a weight.

n = x / rms with rms = sqrt(mean(x^2) + eps);  o = n * w.
Tangent: dn = (dx - n * mean(n * dx)) / rms;  do = dn * w + n * dw.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from mfengine.ops.dual import A, Dual, accumulation_dtype, push
from mfengine.ops.lazy import Lazy
from mfengine.ops.op import Op

if TYPE_CHECKING:
    from mfengine.kernels import rmsnorm as kernel
else:
    kernel = Lazy("mfengine.kernels.rmsnorm")

EPS = 1e-6


def rms_norm(x: A, weight: Tensor | Dual, eps: float = EPS) -> A:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        x: (B, ..., D) float; or a dual, with a tangent (K, ..., D) of its last K rows.
        weight: (D,) float; or a dual, with a tangent (D,).
        eps: added to the mean square.

    Returns:
        Shape and dtype of x; of duals the same with a tangent (K, ..., D). Computed in float32, of float64 in float64.

    Raises:
        ValueError: on the fused path, whatever the kernels do not take: D above 8192, a dtype other than float16,
            bfloat16 and float32, shapes or devices that do not go together.
    """
    return RMS_NORM(x, weight, options=(eps,))[0]


# ----------------------------------------------------------------------------
# Plain.


def _plain(x: A, weight: A, eps: float) -> tuple[A]:
    return (push(partial(_normalise, eps=eps), partial(_tangent, eps=eps), x, weight, parameters=1),)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(accumulation_dtype(x))
    return (wide * _reciprocal_rms(wide, eps) * weight.to(wide.dtype)).to(x.dtype)


def _tangent(x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor | None, eps: float) -> Tensor:
    dtype, wide = x.dtype, accumulation_dtype(x)
    x, dx = x.to(wide), dx.to(wide)
    rstd = _reciprocal_rms(x, eps)
    n = x * rstd
    do = (dx - n * (n * dx).mean(-1, keepdim=True)) * rstd * weight.to(wide)
    return (do if dweight is None else do + n * dweight.to(wide)).to(dtype)


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


# ----------------------------------------------------------------------------
# Fused.


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor]:
    return (kernel.forward(x.contiguous(), weight.contiguous(), eps),)


def _dual(x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    dweight = None if dweight is None else dweight.contiguous()
    return kernel.forward_dual(x.contiguous(), weight.contiguous(), dx.contiguous(), dweight, eps)


def _backward(x: Tensor, weight: Tensor, go: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return kernel.backward(x.contiguous(), weight.contiguous(), go, eps)


RMS_NORM = Op(
    "rms_norm",
    forward=_forward,
    dual=_dual,
    backward=_backward,
    plain=_plain,
    shapes=lambda x, weight, eps: (x.new_empty(x.shape),),
    outputs=("o",),
    saved=("x", "weight"),
    parameters=1,
)
