"""Pointwise activations: GELU (tanh form) with a bias, and SiLU, computed in float32.

o = gelu(w) with w = x + b.  Tangent: do = gelu'(w) * (dx + db).
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
else:
    kernel = Lazy("mfengine.kernels.gelu")


def gelu(x: A, bias: Tensor | Dual | None = None) -> A:
    """GELU of x + bias, in its tanh form.

    Args:
        x: (B, ..., F) float; or a dual, with a tangent (K, ..., F) of its last K rows.
        bias: (F,) float, or None; or a dual, with a tangent (F,).

    Returns:
        Shape and dtype of x; of duals the same with a tangent (K, ..., F). Computed in float32, of float64 in float64.

    Raises:
        ValueError: on the fused path, whatever the kernels do not take: a dtype other than float16, bfloat16 and
            float32, shapes or devices that do not go together.

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


def silu(x: A) -> A:
    """SiLU, x * sigmoid(x), of any shape, in the dtype of x."""
    return push(F.silu, _silu_tangent, x)


# ----------------------------------------------------------------------------
# Plain. Pointwise functions multiply a tangent, like a gradient, by their derivative: PyTorch's backward serves for
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


def _silu_tangent(x: Tensor, dx: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    return torch.ops.aten.silu_backward(dx.to(wide), x.to(wide)).to(x.dtype)


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
