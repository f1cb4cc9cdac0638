"""RMSNorm of each head's queries and keys, and rotary position embedding (RoPE; Su et al., arXiv 2104.09864).

n = R(x / rms * w) with rms = sqrt(mean(x^2) + eps) per head. R rotates the channels (2i, 2i + 1) of a token at
position m by the angle m * 10,000^(-2i / d). R is linear, so the tangent is R of RMSNorm's tangent.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfengine.ops.dual import A, accumulation_dtype, linear_map, primal_of, push
from mfengine.ops.lazy import Lazy
from mfengine.ops.op import Op
from mfengine.ops.rmsnorm import rms_normalise, rms_tangent

if TYPE_CHECKING:
    from mfengine.kernels import rope as kernel
else:
    kernel = Lazy("mfengine.kernels.rope")


def norm_rope(x: A, q_weight: A, k_weight: A, heads: int, tokens: int, eps: float) -> A:
    """Normalised and rotated queries and keys of x (B, N, 2 * H * d) or (B * N, 2 * H * d): contiguous, same shape."""
    return NORM_ROPE(x, q_weight, k_weight, options=(heads, tokens, eps))[0]


# ----------------------------------------------------------------------------
# Plain.


def plain_norm_rope(x: A, q_weight: A, k_weight: A, heads: int, tokens: int, eps: float) -> tuple[A]:
    shape = primal_of(x).shape[1:]
    primal, tangent = partial(_norm_rope, tokens=tokens, eps=eps), partial(_norm_rope_tangent, tokens=tokens, eps=eps)
    by_head = (tokens, 2, heads, shape[-1] // (2 * heads))
    x = linear_map(lambda x: x.reshape(x[..., 0].numel() // max(tokens, 1), *by_head), x)
    o = push(primal, tangent, x, q_weight, k_weight, parameters=2)
    return (linear_map(lambda o: o.reshape(o.numel() // max(shape.numel(), 1), *shape), o),)


def _norm_rope(x: Tensor, q_weight: Tensor, k_weight: Tensor, tokens: int, eps: float) -> Tensor:
    normal = rms_normalise(x, _weights(q_weight, k_weight), eps, accumulation_dtype(x))
    return _rotate(normal, tokens).to(x.dtype)


def _norm_rope_tangent(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, dx: Tensor, dq_weight: Tensor | None, dk_weight: Tensor | None,
    tokens: int, eps: float,
) -> Tensor:  # fmt: skip
    dweight = None
    if dq_weight is not None or dk_weight is not None:
        pairs = ((q_weight, dq_weight), (k_weight, dk_weight))
        dweight = _weights(*(torch.zeros_like(w) if dw is None else dw for w, dw in pairs))
    dnormal = rms_tangent(x, _weights(q_weight, k_weight), dx, dweight, eps, accumulation_dtype(x))
    return _rotate(dnormal, tokens).to(x.dtype)


def _weights(q_weight: Tensor, k_weight: Tensor) -> Tensor:
    return torch.stack((q_weight, k_weight))[:, None]  # (2, 1, d)


def _rotate(x: Tensor, tokens: int) -> Tensor:
    """Rotate x (B, N, 2, H, d)."""
    turn = angles(tokens, x.shape[-1], x.device).to(x.dtype)[:, None, None]
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # Inductor does not fuse complex products, which are faster without it
        (cos, sin), (even, odd) = turn.unbind(-1), pairs.unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn)).flatten(-2)


def angles(tokens: int, dim: int, device: torch.device) -> Tensor:
    """(N, d / 2, 2) float64: cosine and sine of each position's angles."""
    position = torch.arange(tokens, dtype=torch.float64, device=device)
    frequency = 10_000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / -dim)
    angle = position[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), -1)


# ----------------------------------------------------------------------------
# Fused. Queries and keys may be slices of a packed product, so their rows need not be dense.


def _evenly_spaced(x: Tensor) -> Tensor:
    return x if kernel.evenly_spaced(x) else x.contiguous()


def norm_rope_dual(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, dx: Tensor, dq_weight: Tensor | None, dk_weight: Tensor | None,
    heads: int, tokens: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Normalised and rotated queries and keys, and their tangents."""
    if dq_weight is not None or dk_weight is not None:
        pairs = ((q_weight, dq_weight), (k_weight, dk_weight))
        dq_weight, dk_weight = (torch.zeros_like(w) if dw is None else dw.contiguous() for w, dw in pairs)
    weights = q_weight.contiguous(), k_weight.contiguous()
    x, dx = _evenly_spaced(x), _evenly_spaced(dx)
    return kernel.forward_dual(x, *weights, dx, dq_weight, dk_weight, heads, tokens, eps)


def norm_rope_forward(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, tokens: int, eps: float
) -> tuple[Tensor]:
    """Normalised and rotated queries and keys."""
    return (kernel.forward(_evenly_spaced(x), q_weight.contiguous(), k_weight.contiguous(), heads, tokens, eps),)


def norm_rope_backward(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, go: Tensor, gx: Tensor, heads: int, tokens: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights. The gradient of x is written to gx."""
    weights = q_weight.contiguous(), k_weight.contiguous()
    return kernel.backward(_evenly_spaced(x), *weights, go.contiguous(), gx, heads, tokens, eps)


def _backward(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, go: Tensor, heads: int, tokens: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return gx, *norm_rope_backward(x, q_weight, k_weight, go, gx, heads, tokens, eps)


NORM_ROPE = Op(
    "norm_rope",
    forward=norm_rope_forward,
    dual=norm_rope_dual,
    backward=_backward,
    plain=plain_norm_rope,
    shapes=lambda x, q_weight, k_weight, heads, tokens, eps: (x.new_empty(x.shape),),
    outputs=("o",),
    saved=("x", "q_weight", "k_weight"),
    parameters=2,
)
