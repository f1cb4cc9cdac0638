"""Pointwise activations: GELU (tanh form) with a bias, and SiLU, computed in float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.backend import fused
from mfengine.ops.dual import A, accumulation_dtype, primal_of, push, push_fused


def gelu(x: A, bias: Tensor | None = None) -> A:
    """GELU of x + bias, in its tanh form.

    Args:
        x: (B, ..., F) float; or a dual, with a tangent (K, ..., F) of its last K rows.
        bias: (F,) float, or None. It has no tangent.

    Returns:
        Shape and dtype of x; of a dual the same with a tangent (K, ..., F). Computed in float32, of float64 in float64.

    Raises:
        ValueError: on the fused path, whatever the kernels do not take: a dtype other than float16, bfloat16 and
            float32, shapes or devices that do not go together.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, gelu
        >>> x, bias = torch.randn(4, 10, 32), torch.randn(32)
        >>> gelu(x, bias).shape
        torch.Size([4, 10, 32])
        >>> o, do = gelu(Dual(x, torch.ones(1, 10, 32)), bias)
        >>> do.shape
        torch.Size([1, 10, 32])
    """
    primal = primal_of(x)
    if bias is None:
        bias = primal.new_zeros(primal.shape[-1])
    if fused(primal):
        return push_fused(partial(_fused, bias=bias), partial(_fused_dual, bias=bias), x)[0]
    return push(partial(_gelu, bias=bias), partial(_gelu_tangent, bias=bias), x)


def silu(x: A) -> A:
    """SiLU, x * sigmoid(x), of any shape, in the dtype of x."""
    return push(F.silu, _silu_tangent, x)


# ----------------------------------------------------------------------------
# Reference.


def _gelu(x: Tensor, bias: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    return F.gelu(x.to(wide) + bias.to(wide), approximate="tanh").to(x.dtype)


# Pointwise functions multiply a tangent, like a gradient, by their derivative: PyTorch's backward serves for both.


def _gelu_tangent(x: Tensor, dx: Tensor, bias: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    w = x.to(wide) + bias.to(wide)
    return torch.ops.aten.gelu_backward(dx.to(wide), w, approximate="tanh").to(x.dtype)


def _silu_tangent(x: Tensor, dx: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    return torch.ops.aten.silu_backward(dx.to(wide), x.to(wide)).to(x.dtype)


# ----------------------------------------------------------------------------
# Fused, as operators that PyTorch knows by name.


@torch.library.custom_op("mfengine::gelu", mutates_args=())
def _gelu_op(x: Tensor, bias: Tensor) -> Tensor:
    from mfengine.kernels import gelu as kernel

    return kernel.forward(x.contiguous(), bias.contiguous())


@torch.library.custom_op("mfengine::gelu_dual", mutates_args=())
def _gelu_dual_op(x: Tensor, bias: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    from mfengine.kernels import gelu as kernel

    return kernel.forward_dual(x.contiguous(), bias.contiguous(), dx.contiguous())


@torch.library.custom_op("mfengine::gelu_backward", mutates_args=())
def _gelu_backward_op(x: Tensor, bias: Tensor, go: Tensor) -> tuple[Tensor, Tensor]:
    from mfengine.kernels import gelu as kernel

    return kernel.backward(x.contiguous(), bias.contiguous(), go)


@_gelu_op.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_gelu_dual_op.register_fake
def _(x: Tensor, bias: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), dx.new_empty(dx.shape)


@_gelu_backward_op.register_fake
def _(x: Tensor, bias: Tensor, go: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _save_gelu(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)  # a tangent has no gradient, and none is made up for it
    ctx.save_for_backward(*inputs[:2])
    ctx.tangents = len(inputs) - 2


def _gelu_backward(ctx: Any, go: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*_gelu_backward_op(*ctx.saved_tensors, go), *[None] * ctx.tangents)


_gelu_op.register_autograd(_gelu_backward, setup_context=_save_gelu)
_gelu_dual_op.register_autograd(_gelu_backward, setup_context=_save_gelu)


def _fused(x: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (_gelu_op(x, bias),)


def _fused_dual(x: Tensor, dx: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _gelu_dual_op(x, bias, dx)
