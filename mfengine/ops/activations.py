"""Pointwise activations: GELU (tanh form) with a bias, SiLU, and SwiGLU (Shazeer, arXiv 2002.05202), in float32.

GELU: o = gelu(w) with w = x + b.  Tangent: do = gelu'(w) * (dx + db).
SwiGLU: o = silu(g) * w.  Tangent: do = silu'(g) * dg * w + silu(g) * dw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.dual import A, Dual, accumulation_dtype, primal_of, push
from mfengine.ops.lazy import Lazy
from mfengine.ops.op import Op

if TYPE_CHECKING:
    from mfengine.kernels import gelu as kernel
    from mfengine.kernels import swiglu as swiglu_kernel
else:
    kernel = Lazy("mfengine.kernels.gelu")
    swiglu_kernel = Lazy("mfengine.kernels.swiglu")


def gelu(x: A, bias: Tensor | Dual | None = None) -> A:
    """GELU of x + bias, in its tanh form.

    Args:
        x: (B, ..., F) float; or a dual, with a tangent (K, ..., F) of its last K rows.
        bias: (F,) float, or None; or a dual, with a tangent (F,).

    Returns:
        Shape and dtype of x; for duals the same with a tangent (K, ..., F). Computed in float32 (float64 for float64).

    Raises:
        ValueError: on the fused path, if the kernels do not support the arguments: a dtype other than float16, bfloat16
            and float32, or shapes or devices that do not match.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, gelu
        >>> x, bias = torch.randn(4, 10, 32), torch.randn(32)
        >>> o, do = gelu(Dual(x, torch.ones(1, 10, 32)), bias)
        >>> do.shape
        torch.Size([1, 10, 32])
    """
    if bias is None:
        bias = primal_of(x).new_zeros(primal_of(x).shape[-1])
    return GELU(x, bias)[0]


def swiglu(x: A) -> A:
    """silu(g) * w of two packed halves, x = [g, w].

    Args:
        x: (B, ..., 2 * F) float; or a dual, with a tangent (K, ..., 2 * F) of its last K rows.

    Returns:
        (B, ..., F) in the dtype of x; for a dual the same with a tangent. Computed in float32 (float64 for float64).

    Raises:
        ValueError: the last dimension of x is odd; on the fused path, a dtype other than float16, bfloat16 and float32.
    """
    if primal_of(x).shape[-1] % 2:
        raise ValueError(f"the last dimension of x must be two halves, not {primal_of(x).shape[-1]} channels")
    return SWIGLU(x)[0]


def silu(x: A) -> A:
    """SiLU, x * sigmoid(x), of any shape, in the dtype of x."""
    return push(F.silu, _silu_tangent, x)


# ----------------------------------------------------------------------------
# Plain. A pointwise function multiplies a tangent, like a gradient, by its derivative, so PyTorch's backward computes
# both.


def _plain(x: A, bias: A) -> tuple[A]:
    return (push(_gelu, _gelu_tangent, x, bias, parameters=1),)


def _gelu(x: Tensor, bias: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    return F.gelu(x.to(wide) + bias.to(wide), approximate="tanh").to(x.dtype)


def _gelu_tangent(x: Tensor, bias: Tensor, dx: Tensor, dbias: Tensor | None) -> Tensor:
    wide = accumulation_dtype(x)
    w, dw = x.to(wide) + bias.to(wide), dx.to(wide)
    dw = dw if dbias is None else dw + dbias.to(wide)
    return torch.ops.aten.gelu_backward(dw, w, approximate="tanh").to(x.dtype)


def _plain_swiglu(x: A) -> tuple[A]:
    return (push(_swiglu, _swiglu_tangent, x),)


def _swiglu(x: Tensor) -> Tensor:
    g, w = x.to(accumulation_dtype(x)).chunk(2, -1)
    return (F.silu(g) * w).to(x.dtype)


def _swiglu_tangent(x: Tensor, dx: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    (g, w), (dg, dw) = x.to(wide).chunk(2, -1), dx.to(wide).chunk(2, -1)
    return torch.addcmul(_silu_backward(dg * w, g), F.silu(g), dw).to(x.dtype)


def _silu_tangent(x: Tensor, dx: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    return _silu_backward(dx.to(wide), x.to(wide)).to(x.dtype)


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # PyTorch's backward is not differentiable
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))
    return torch.ops.aten.silu_backward(gradient, x)


# ----------------------------------------------------------------------------
# Fused.


def _forward(x: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (kernel.forward(x.contiguous(), bias.contiguous()),)


def _dual(x: Tensor, bias: Tensor, dx: Tensor, dbias: Tensor | None) -> tuple[Tensor, Tensor]:
    if dbias is not None:
        dx = (dx + dbias).to(dx.dtype)
    return kernel.forward_dual(x.contiguous(), bias.contiguous(), dx.contiguous())


def _backward(x: Tensor, bias: Tensor, go: Tensor) -> tuple[Tensor, Tensor]:
    return kernel.backward(x.contiguous(), bias.contiguous(), go)


GELU = Op(
    "gelu",
    forward=_forward,
    dual=_dual,
    backward=_backward,
    plain=_plain,
    shapes=lambda x, bias: (x.new_empty(x.shape),),
    outputs=("o",),
    saved=("x", "bias"),
    parameters=1,
)


def _swiglu_forward(x: Tensor) -> tuple[Tensor]:
    return (swiglu_kernel.forward(x.contiguous()),)


def _swiglu_dual(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_kernel.forward_dual(x.contiguous(), dx.contiguous())


def _swiglu_backward(x: Tensor, go: Tensor) -> tuple[Tensor]:
    return (swiglu_kernel.backward(x.contiguous(), go),)


SWIGLU = Op(
    "swiglu",
    forward=_swiglu_forward,
    dual=_swiglu_dual,
    backward=_swiglu_backward,
    plain=_plain_swiglu,
    shapes=lambda x: (x.new_empty(*x.shape[:-1], x.shape[-1] // 2),),
    outputs=("o",),
    saved=("x",),
)
