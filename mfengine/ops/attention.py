"""Softmax attention: O = P V with P = softmax(a Q K^T).

Tangent: with S' = a (Q' K^T + Q K'^T),
O' = (P * S') V + P V' - rowsum(P * S') * O.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mfengine.ops.dual import A, accumulation_dtype, push


def attention(q: A, k: A, v: A, scale: float | None = None) -> A:
    """Non-causal softmax attention in the layout of `scaled_dot_product_attention`.

    Args:
        q: (B, H, N, d) float.
        k, v: (B, H, M, d) float, same dtype as q.
        scale: factor of the scores; 1 / sqrt(d) if None.

    Returns:
        (B, H, N, d) in the dtype of q; the softmax is computed in float32.
    """
    return push(partial(_primal, scale=scale), partial(_tangent, scale=scale), q, k, v)


def attention_packed(qkv: A, num_heads: int) -> A:
    """Self-attention over the packed output of one query-key-value projection.

    Args:
        qkv: (B, N, 3 * H * d) float; the last dimension is ordered (q, k, v), then head, then channel.
        num_heads: H.

    Returns:
        (B, N, H * d), heads concatenated.
    """

    def primal(qkv: Tensor) -> Tensor:
        return _merge_heads(_primal(*_split_heads(qkv, num_heads)))

    def tangent(qkv: Tensor, dqkv: Tensor) -> Tensor:
        return _merge_heads(_tangent(*_split_heads(qkv, num_heads), *_split_heads(dqkv, num_heads)))

    return push(primal, tangent, qkv)


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    qkv = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads))  # (B, N, 3, H, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, d)
    return q, k, v


def _merge_heads(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)  # (B, H, N, d) -> (B, N, H * d)


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.softmax((q * scale) @ k.mT, dim=-1, dtype=accumulation_dtype(q))  # (B, H, N, M)


def _primal(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _probabilities(q, k, scale).to(v.dtype) @ v


def _tangent(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = _probabilities(q, k, scale)
    ds = (dq * scale) @ k.mT + (q * scale) @ dk.mT
    pds = p * ds
    # (P * S') V - rowsum(P * S') O = (P * S' - rowsum(P * S') P) V: the softmax's own JVP, then two products.
    dp = pds - p * pds.sum(-1, keepdim=True)
    return dp.to(v.dtype) @ v + p.to(v.dtype) @ dv
