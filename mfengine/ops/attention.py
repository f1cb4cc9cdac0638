"""Softmax attention: O = P V with P = softmax(a Q K^T).

Tangent: with S' = a (Q' K^T + Q K'^T), O' = (P * S') V + P V' - rowsum(P * S') * O.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mfengine.ops.backend import fused
from mfengine.ops.dual import A, Dual, accumulation_dtype, linear_map, primal_of, push_fused


def attention(q: A, k: A, v: A, scale: float | None = None) -> A:
    """Non-causal softmax attention in the layout of `scaled_dot_product_attention`.

    Given duals, (output, tangent) in one pass. For masks, causal attention, dropout and grouped queries, call PyTorch's
    function inside `mfengine.jvp_attention()`.

    Args:
        q: (B, H, N, d) float, of any strides; or a dual, with a tangent (K, H, N, d) of its last K rows.
        k, v: (B, H, M, d) float, same dtype as q; or duals, with tangents (K, H, M, d).
        scale: factor of the scores; 1 / sqrt(d) if None.

    Returns:
        (B, H, N, d) in the dtype of q; of duals the same with a tangent (K, H, N, d). The softmax is computed in
        float32, of float64 in float64.

    Raises:
        ValueError: on the fused path, whatever the kernels do not take: a head dim that is not a multiple of 8 up to
            128, a dtype other than float16, bfloat16 and float32, shapes, dtypes or devices that do not go together.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, attention
        >>> q, k, v = torch.randn(3, 4, 2, 10, 16)
        >>> attention(q, k, v).shape
        torch.Size([4, 2, 10, 16])
        >>> dq, dk, dv = torch.randn(3, 1, 2, 10, 16)  # of the last sample
        >>> o, do = attention(Dual(q, dq), Dual(k, dk), Dual(v, dv))
        >>> do.shape
        torch.Size([1, 2, 10, 16])
        >>> o, do = torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))
        >>> do.shape
        torch.Size([4, 2, 10, 16])
    """
    if fused(primal_of(q)):
        return push_fused(partial(_fused, scale=scale), partial(_fused_dual, scale=scale), q, k, v)[0]
    return _plain(q, k, v, scale)


def attention_packed(qkv: A, num_heads: int) -> A:
    """Self-attention over the packed output of one query-key-value projection.

    Args:
        qkv: (B, N, 3 * H * d) float; the last dimension is ordered (q, k, v), then head, then channel. Or a dual, with
            a tangent (K, N, 3 * H * d) of its last K rows.
        num_heads: H.

    Returns:
        (B, N, H * d) in the dtype of qkv, heads concatenated; of a dual the same with a tangent (K, N, H * d).

    Raises:
        ValueError: as `attention`.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, attention_packed
        >>> qkv, dqkv = torch.randn(4, 10, 3 * 2 * 16), torch.randn(1, 10, 3 * 2 * 16)
        >>> o, do = attention_packed(Dual(qkv, dqkv), num_heads=2)
        >>> o.shape, do.shape
        (torch.Size([4, 10, 32]), torch.Size([1, 10, 32]))
    """
    if fused(primal_of(qkv)):
        heads = num_heads
        return push_fused(partial(_fused_packed, heads=heads), partial(_fused_packed_dual, heads=heads), qkv)[0]

    if isinstance(qkv, Dual):
        q, k, v = map(Dual, _split_heads(qkv.primal, num_heads), _split_heads(qkv.tangent, num_heads))
    else:
        q, k, v = _split_heads(qkv, num_heads)
    return linear_map(_merge_heads, _plain(q, k, v))


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    qkv = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads))  # (B, N, 3, H, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, d)
    return q, k, v


def _merge_heads(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)  # (B, H, N, d) -> (B, N, H * d)


# ----------------------------------------------------------------------------
# Reference.


def _plain(q: A, k: A, v: A, scale: float | None = None) -> A:
    scale = primal_of(q).shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(q, Dual):
        return _probabilities(q, k, scale).to(v.dtype) @ v
    p = _probabilities(q.primal, k.primal, scale)
    o = p.to(v.primal.dtype) @ v.primal
    with torch.no_grad():
        duals = slice(len(p) - len(q.tangent), None)
        q, k, v = (Dual(x.primal[duals], x.tangent) for x in (q, k, v))
        return Dual(o, _tangent(q, k, v, p[duals], scale))


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.softmax((q * scale) @ k.mT, dim=-1, dtype=accumulation_dtype(q))  # (B, H, N, M)


def _tangent(q: Dual, k: Dual, v: Dual, p: Tensor, scale: float) -> Tensor:
    ds = (q.tangent * scale) @ k.primal.mT + (q.primal * scale) @ k.tangent.mT
    # The softmax's Jacobian is symmetric: PyTorch's backward, P * S' - rowsum(P * S') P, serves for the tangent.
    dp = torch.ops.aten._softmax_backward_data(ds.to(p.dtype), p, -1, p.dtype)
    return dp.to(v.primal.dtype) @ v.primal + p.to(v.primal.dtype) @ v.tangent


# ----------------------------------------------------------------------------
# Fused. Each operator is known to PyTorch by name, so that torch.compile and meta tensors see shapes only.


@torch.library.custom_op("mfengine::attention", mutates_args=())
def _attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    from mfengine.kernels import attention as kernel

    return kernel.forward(q, k, v, scale)


@torch.library.custom_op("mfengine::attention_dual", mutates_args=())
def _attention_dual_op(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    from mfengine.kernels import attention as kernel

    return kernel.forward_dual(q, k, v, dq, dk, dv, scale)


@torch.library.custom_op("mfengine::attention_backward", mutates_args=())
def _attention_backward_op(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, go: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    from mfengine.kernels import attention as kernel

    gq, gk, gv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    kernel.backward(q, k, v, o, lse, go, gq, gk, gv, scale)
    return gq, gk, gv


@torch.library.custom_op("mfengine::attention_packed", mutates_args=())
def _packed_op(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    from mfengine.kernels import attention as kernel

    o, lse = kernel.forward(*_split_heads(qkv, heads))
    return _merge_heads(o), lse


@torch.library.custom_op("mfengine::attention_packed_dual", mutates_args=())
def _packed_dual_op(qkv: Tensor, dqkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    from mfengine.kernels import attention as kernel

    o, lse, do = kernel.forward_dual(*_split_heads(qkv, heads), *_split_heads(dqkv, heads))
    return _merge_heads(o), lse, _merge_heads(do)


@torch.library.custom_op("mfengine::attention_packed_backward", mutates_args=())
def _packed_backward_op(qkv: Tensor, o: Tensor, lse: Tensor, go: Tensor, heads: int) -> Tensor:
    from mfengine.kernels import attention as kernel

    gqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    o, go = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (o, go))  # (B, H, N, d)
    kernel.backward(*_split_heads(qkv, heads), o, lse, go, *_split_heads(gqkv, heads))
    return gqkv


def _lse_like(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


def _stored_by_token(q: Tensor) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    return _stored_by_token(q), _lse_like(q)


@_attention_dual_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _stored_by_token(q), _lse_like(q), _stored_by_token(dq)


@_attention_backward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, go: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@_packed_op.register_fake
def _(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


@_packed_dual_op.register_fake
def _(qkv: Tensor, dqkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    o, lse = qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    return o, lse, dqkv.new_empty(dqkv.shape[0], tokens, width // 3)


@_packed_backward_op.register_fake
def _(qkv: Tensor, o: Tensor, lse: Tensor, go: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


# The backward is that of the primal, with or without a tangent beside it: tangents are not differentiated, and no
# gradient is made up for them.


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[0], output[1])
    ctx.scale = inputs[-1]
    ctx.tangents = len(inputs) - 4


def _attention_backward(ctx: Any, go: Tensor, *_: Any) -> tuple[Any, ...]:
    q, k, v, o, lse = ctx.saved_tensors
    return (*_attention_backward_op(q, k, v, o, lse, go, ctx.scale), *[None] * ctx.tangents, None)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[0], output[1])
    ctx.heads = inputs[-1]
    ctx.tangents = len(inputs) - 2


def _packed_backward(ctx: Any, go: Tensor, *_: Any) -> tuple[Any, ...]:
    qkv, o, lse = ctx.saved_tensors
    return (_packed_backward_op(qkv, o, lse, go, ctx.heads), *[None] * ctx.tangents, None)


_attention_op.register_autograd(_attention_backward, setup_context=_save_attention)
_attention_dual_op.register_autograd(_attention_backward, setup_context=_save_attention)
_packed_op.register_autograd(_packed_backward, setup_context=_save_packed)
_packed_dual_op.register_autograd(_packed_backward, setup_context=_save_packed)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor]:
    return (_attention_op(q, k, v, scale)[0],)


def _fused_dual(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    o, _, do = _attention_dual_op(q, k, v, dq, dk, dv, scale)
    return o, do


def _fused_packed(qkv: Tensor, heads: int) -> tuple[Tensor]:
    return (_packed_op(qkv, heads)[0],)


def _fused_packed_dual(qkv: Tensor, dqkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    o, _, do = _packed_dual_op(qkv, dqkv, heads)
    return o, do
