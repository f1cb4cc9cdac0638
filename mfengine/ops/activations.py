"""Pointwise activations: GELU (tanh form) and SiLU, computed in float32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.dual import A, accumulation_dtype, push

_C = math.sqrt(2 / math.pi)
_CUBIC = 0.044715  # gelu(x) ~ x / 2 (1 + tanh(_C (x + _CUBIC x^3))), Hendrycks and Gimpel, arXiv 1606.08415


def gelu(x: A) -> A:
    """GELU in its tanh form, of any shape, in the dtype of x."""
    return push(_gelu, _gelu_tangent, x)


def silu(x: A) -> A:
    """SiLU, x * sigmoid(x), of any shape, in the dtype of x."""
    return push(F.silu, _silu_tangent, x)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tangent(x: Tensor, dx: Tensor) -> Tensor:
    w = x.to(accumulation_dtype(x))
    tanh = torch.tanh(_C * (w + _CUBIC * w**3))
    slope = 0.5 * (1 + tanh) + 0.5 * w * (1 - tanh.square()) * _C * (1 + 3 * _CUBIC * w.square())
    return (slope * dx).to(x.dtype)


def _silu_tangent(x: Tensor, dx: Tensor) -> Tensor:
    w = x.to(accumulation_dtype(x))
    sigmoid = torch.sigmoid(w)
    return (sigmoid * (1 + w * (1 - sigmoid)) * dx).to(x.dtype)
