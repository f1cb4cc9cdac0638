"""Softmax attention: O = P V with P = softmax(a Q K^T).

Tangent: with S' = a (Q' K^T + Q K'^T), O' = (P * S') V + P V' - rowsum(P * S') * O.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.backend import fused, transformed
from mfengine.ops.choice import Implementation, choose
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
        float32, of float64 in float64. Second derivatives need `use_backend("torch")`.

    Raises:
        ValueError: on the fused path, whatever the kernels do not take: a head dim that is not a multiple of 8 up to
            128, a dtype other than float16, bfloat16 and float32, shapes, dtypes or devices that do not go together;
            without a tangent, what the implementation named by `use_attention` does not take.

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
    if not isinstance(q, Dual) and not _in_forward_mode():
        backward_follows = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        name = choose("training" if backward_follows else "forward", q.device, q.dtype, q.shape[-1], q.shape[-2])
        return IMPLEMENTATIONS[name](q, k, v, scale)
    x = primal_of(q)
    if fused(x):
        instant, backward = _beside_duals(x, x.shape[-1], x.shape[-2])
        dual = partial(_fused_dual, scale=scale, instant=instant, backward=backward)
        return push_fused(partial(_fused, scale=scale), dual, q, k, v)[0]
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
    x, heads = primal_of(qkv), num_heads
    dim, tokens = x.shape[-1] // (3 * heads), x.shape[-2]
    if not isinstance(qkv, Dual) and not _in_forward_mode():
        backward_follows = torch.is_grad_enabled() and qkv.requires_grad
        name = choose("training" if backward_follows else "forward", x.device, x.dtype, dim, tokens)
        if name == "triton":
            return _fused_packed(qkv, heads)[0]
        return _merge_heads(IMPLEMENTATIONS[name](*_split_heads(qkv, heads), None))
    if fused(x):
        instant, backward = _beside_duals(x, dim, tokens)
        dual = partial(_fused_packed_dual, heads=heads, instant=instant, backward=backward)
        return push_fused(partial(_fused_packed, heads=heads), dual, qkv)[0]
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


def _in_forward_mode() -> bool:
    """Or under transforms of `torch.func`: not every implementation works there."""
    return fwad._current_level >= 0 or transformed()


def _beside_duals(x: Tensor, dim: int, tokens: int) -> tuple[Implementation, Implementation]:
    """Who does what the dual kernel leaves to others: leading rows, and the backward of all."""
    return (
        choose("instant", x.device, x.dtype, dim, tokens),
        choose("backward", x.device, x.dtype, dim, tokens),
    )


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
# By others. Here too a log-sum-exp (B, H, N) is float32 and of natural logarithms, which is what ours is.


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """By PyTorch's flash attention, whatever `scaled_dot_product_attention` would pick."""
    q, k, v = map(_dense_heads, (q, k, v))
    if q.is_cuda:
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    else:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return o, lse


def _sdpa_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, go: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, o, go = map(_dense_heads, (q, k, v, o, go))
    if not q.is_cuda:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(go, q, k, v, o, lse, 0.0, False, scale=scale)
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)  # the random state, which nothing reads
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        go, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, False, no_dropout, no_dropout, scale=scale
    )


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float | None, **options: Any) -> Any:
    from flash_attn import flash_attn_func

    q, k, v = (_dense_heads(x.transpose(1, 2)) for x in (q, k, v))  # (B, N, H, d)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(q, k, v, softmax_scale=scale, deterministic=deterministic, **options)


def _flash_attn_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    o, lse, _ = _flash_attn(q, k, v, scale, return_attn_probs=True)
    return o.transpose(1, 2), lse


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


IMPLEMENTATIONS: dict[Implementation, Callable[[Tensor, Tensor, Tensor, float | None], Tensor]] = {
    "torch": _plain,
    "triton": lambda *arguments: _fused(*arguments)[0],
    "sdpa": _sdpa,
    "flash-attn": lambda *arguments: _flash_attn(*arguments).transpose(1, 2),
}
WITH_LSE: dict[str, Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]] = {
    "sdpa": _sdpa_with_lse,
    "flash-attn": _flash_attn_with_lse,
}


# ----------------------------------------------------------------------------
# Fused. Each operator is known to PyTorch by name, so that torch.compile and meta tensors see shapes only.


@torch.library.custom_op("mfengine::attention", mutates_args=())
def _attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    from mfengine.kernels import attention as kernel

    return kernel.forward(q, k, v, scale)


@torch.library.custom_op("mfengine::attention_dual", mutates_args=())
def _attention_dual_op(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    scale: float | None, instant: str, backward: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward_dual(q, k, v, dq, dk, dv, scale, instant)


@torch.library.custom_op("mfengine::attention_backward", mutates_args=())
def _attention_backward_op(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, go: Tensor, scale: float | None, backward: str
) -> tuple[Tensor, Tensor, Tensor]:
    from mfengine.kernels import attention as kernel

    if backward == "sdpa":
        gq, gk, gv = (g.contiguous() for g in _sdpa_backward(q, k, v, o, lse, go, scale))
        return gq, gk, gv
    gq, gk, gv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    kernel.backward(q, k, v, o, lse, go, gq, gk, gv, scale)
    return gq, gk, gv


@torch.library.custom_op("mfengine::attention_packed", mutates_args=())
def _packed_op(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    from mfengine.kernels import attention as kernel

    o, lse = kernel.forward(*_split_heads(qkv, heads))
    return _merge_heads(o), lse


@torch.library.custom_op("mfengine::attention_packed_dual", mutates_args=())
def _packed_dual_op(
    qkv: Tensor, dqkv: Tensor, heads: int, instant: str, backward: str
) -> tuple[Tensor, Tensor, Tensor]:
    o, lse, do = _forward_dual(*_split_heads(qkv, heads), *_split_heads(dqkv, heads), None, instant)
    return _merge_heads(o), lse, _merge_heads(do)


@torch.library.custom_op("mfengine::attention_packed_backward", mutates_args=())
def _packed_backward_op(qkv: Tensor, o: Tensor, lse: Tensor, go: Tensor, heads: int, backward: str) -> Tensor:
    from mfengine.kernels import attention as kernel

    o, go = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (o, go))  # (B, H, N, d)
    if backward == "sdpa":
        gradients = _sdpa_backward(*_split_heads(qkv, heads), o, lse, go, None)
        return torch.stack([g.transpose(1, 2) for g in gradients], 2).flatten(2)  # (B, N, 3 * H * d)
    gqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    kernel.backward(*_split_heads(qkv, heads), o, lse, go, *_split_heads(gqkv, heads))
    return gqkv


def _forward_dual(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float | None, instant: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and log-sum-exp, and the output's tangent of trailing rows; leading rows by `instant`.

    It computes all rows, and the dual kernel writes over its own: a quarter more of its work, where two halves of one
    output would have to be copied together.
    """
    from mfengine.kernels import attention as kernel

    outputs = None
    if instant != "triton" and len(dq) < len(q):
        o, lse = WITH_LSE[instant](q, k, v, scale)
        outputs = o.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    return kernel.forward_dual(q, k, v, dq, dk, dv, scale, outputs)


def _lse_like(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


def _stored_by_token(q: Tensor) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    return _stored_by_token(q), _lse_like(q)


@_attention_dual_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    scale: float | None, instant: str, backward: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _stored_by_token(q), _lse_like(q), _stored_by_token(dq)


@_attention_backward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, go: Tensor, scale: float | None, backward: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@_packed_op.register_fake
def _(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


@_packed_dual_op.register_fake
def _(qkv: Tensor, dqkv: Tensor, heads: int, instant: str, backward: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    o, lse = qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    return o, lse, dqkv.new_empty(dqkv.shape[0], tokens, width // 3)


@_packed_backward_op.register_fake
def _(qkv: Tensor, o: Tensor, lse: Tensor, go: Tensor, heads: int, backward: str) -> Tensor:
    return qkv.new_empty(qkv.shape)


# The backward is that of the primal, with or without a tangent beside it: tangents are not differentiated, and no
# gradient is made up for them.


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    (q, k, v), ctx.number = inputs[:3], len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[0], output[1])
    ctx.scale, ctx.backward = (inputs[3], "triton") if len(inputs) == 4 else (inputs[6], inputs[8])


def _attention_backward(ctx: Any, go: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = _attention_backward_op(*ctx.saved_tensors, go, ctx.scale, ctx.backward)
    return (*gradients, *[None] * (ctx.number - 3))


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.number = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[0], output[1])
    ctx.heads, ctx.backward = (inputs[1], "triton") if len(inputs) == 2 else (inputs[2], inputs[4])


def _packed_backward(ctx: Any, go: Tensor, *_: Any) -> tuple[Any, ...]:
    gradient = _packed_backward_op(*ctx.saved_tensors, go, ctx.heads, ctx.backward)
    return (gradient, *[None] * (ctx.number - 1))


_attention_op.register_autograd(_attention_backward, setup_context=_save_attention)
_attention_dual_op.register_autograd(_attention_backward, setup_context=_save_attention)
_packed_op.register_autograd(_packed_backward, setup_context=_save_packed)
_packed_dual_op.register_autograd(_packed_backward, setup_context=_save_packed)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor]:
    return (_attention_op(q, k, v, scale)[0],)


def _fused_dual(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    scale: float | None, instant: str, backward: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, _, do = _attention_dual_op(q, k, v, dq, dk, dv, scale, instant, backward)
    return o, do


def _fused_packed(qkv: Tensor, heads: int) -> tuple[Tensor]:
    return (_packed_op(qkv, heads)[0],)


def _fused_packed_dual(qkv: Tensor, dqkv: Tensor, heads: int, instant: str, backward: str) -> tuple[Tensor, Tensor]:
    o, _, do = _packed_dual_op(qkv, dqkv, heads, instant, backward)
    return o, do
