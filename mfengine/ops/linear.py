"""Linear layers and the sinusoidal embedding of a scalar."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.dual import A, primal_of, push


def linear(x: A, weight: Tensor, bias: Tensor | None = None) -> A:
    """x W^T + b, computed in the dtype of x; the tangent is the same product without the bias.

    Args:
        x: (..., in) float.
        weight: (out, in), bias: (out,) or None; cast to the dtype of x.

    Returns:
        (..., out) in the dtype of x.
    """
    dtype = primal_of(x).dtype
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return push(lambda x: F.linear(x, weight, bias), lambda x, dx: F.linear(dx, weight), x)


def sinusoid(t: A, dim: int, max_period: float = 10_000.0) -> A:
    """[cos(t f), sin(t f)] with f_i = max_period^(-i / (dim / 2)), as in GLIDE and DiT.

    Args:
        t: (B,) float, not scaled.
        dim: even.

    Returns:
        (B, dim) float32, or float64 if t is.
    """

    def frequencies(t: Tensor) -> Tensor:
        half = dim // 2
        return torch.exp(-math.log(max_period) * torch.arange(half, dtype=t.dtype, device=t.device) / half)

    def primal(t: Tensor) -> Tensor:
        angle = t[:, None] * frequencies(t)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def tangent(t: Tensor, dt: Tensor) -> Tensor:
        angle, dangle = t[:, None] * frequencies(t), dt[:, None] * frequencies(t)
        return torch.cat([-angle.sin() * dangle, angle.cos() * dangle], dim=-1)

    return push(primal, tangent, t)
