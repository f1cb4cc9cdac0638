"""RMSNorm of each head's queries and keys, and rotary position embedding (RoPE; Su et al., arXiv 2104.09864).

n = R(x / rms * w) with rms = sqrt(mean(x^2) + eps) of a head. R rotates the channels (2i, 2i + 1) of a token at
position m by the angle m * 10,000^(-2i / d). It is linear, so the tangent is R of RMSNorm's.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mfengine.ops.dual import A, accumulation_dtype, linear_map, primal_of, push
from mfengine.ops.rmsnorm import rms_normalise, rms_tangent

BASE = 10_000.0  # of the frequencies


def norm_rope(x: A, q_weight: A, k_weight: A, tokens: int, eps: float) -> A:
    """Normalised and rotated queries and keys of x (B, N, 2 * H * d) or (B * N, 2 * H * d), contiguous in x's shape."""
    return _plain(x, q_weight, k_weight, tokens, eps)[0]


# ----------------------------------------------------------------------------
# Plain.


def _plain(x: A, q_weight: A, k_weight: A, tokens: int, eps: float) -> tuple[A]:
    dim = primal_of(q_weight).shape[0]
    shape = primal_of(x).shape[1:]

    def split(x: Tensor) -> Tensor:  # (B, N, 2, H, d)
        return x.reshape(-1, tokens, 2, x.shape[-1] // (2 * dim), dim)

    options = {"tokens": tokens, "eps": eps}
    primal, tangent = partial(_norm_rope, **options), partial(_norm_rope_tangent, **options)
    o = push(primal, tangent, linear_map(split, x), q_weight, k_weight, parameters=2)
    return (linear_map(lambda o: o.reshape(-1, *shape), o),)


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
    """x (B, N, 2, H, d)."""
    cos, sin = angles(tokens, x.shape[-1], x.device)[:, None, None].to(x.dtype).unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def angles(tokens: int, dim: int, device: torch.device) -> Tensor:
    """(N, d / 2, 2) float64: cosine and sine of each position's angles."""
    position = torch.arange(tokens, dtype=torch.float64, device=device)
    frequency = BASE ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / -dim)
    angle = position[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), -1)
