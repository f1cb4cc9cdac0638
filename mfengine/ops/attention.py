"""Softmax attention: O = P V with P = softmax(a Q K^T).

Tangent: with S' = a (Q' K^T + Q K'^T), O' = (P * S') V + P V' - rowsum(P * S') * O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.choice import choose
from mfengine.ops.dual import A, Dual, accumulation_dtype, linear_map, primal_of, tangent_graph
from mfengine.ops.lazy import Lazy
from mfengine.ops.node import recording
from mfengine.ops.op import Op
from mfengine.ops.rmsnorm import EPS
from mfengine.ops.rope import norm_rope, norm_rope_backward, norm_rope_dual, norm_rope_forward, plain_norm_rope
from mfengine.torch_private import softmax_backward

if TYPE_CHECKING:
    from mfengine.kernels import attention as kernel
    from mfengine.kernels import attention_tangent as tangent_kernel
else:
    kernel = Lazy("mfengine.kernels.attention")
    tangent_kernel = Lazy("mfengine.kernels.attention_tangent")


def attention(
    q: A, k: A, v: A, scale: float | None = None, is_causal: bool = False, mask: Tensor | None = None
) -> A:  # fmt: skip
    """Softmax attention in the layout of `scaled_dot_product_attention`.

    For duals, output and tangent are computed in one pass.

    Args:
        q: (B, H, N, d) float, with any strides; or a dual, with a tangent (K, H, N, d) of its last K rows.
        k, v: (B, G, M, d) float, same dtype as q; or duals, with tangents (K, G, M, d). G divides H: each group of H /
            G consecutive query heads shares one head of keys and values.
        scale: factor of the scores; None takes 1 / sqrt(d).
        is_causal: query i sees key j if i >= j, even if N differs from M.
        mask: broadcastable to (B, H, N, M). Bool: true where a query sees a key. In the dtype of q or float32: added to
            the scores, with -inf where a query does not see a key. Excludes `is_causal`.

    Returns:
        (B, H, N, d) in the dtype of q; for duals the same with a tangent (K, H, N, d). A query that sees no key has an
        output, a tangent and gradients of zero. The softmax is computed in float32 (float64 for float64). Second
        derivatives need `use_backend("torch")`. A mask with a gradient or a tangent runs on plain PyTorch.

    Raises:
        ValueError: a mask with `is_causal`, or one that requires a gradient inside `one_node`. On the fused path,
            arguments that the kernels do not support: a head dim that is not a multiple of 8 up to 128, a dtype other
            than float16, bfloat16 and float32, or shapes, dtypes or devices that do not match. Without a tangent,
            arguments that the implementation named by `use_attention` does not support.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, attention
        >>> q, k, v = torch.randn(3, 4, 2, 10, 16)
        >>> dq, dk, dv = torch.randn(3, 1, 2, 10, 16)  # of the last sample
        >>> o, do = attention(Dual(q, dq), Dual(k, dk), Dual(v, dv))
        >>> do.shape
        torch.Size([1, 2, 10, 16])
        >>> o, do = torch.func.jvp(lambda q: attention(q, k, v, is_causal=True), (q,), (q,))
        >>> do.shape
        torch.Size([4, 2, 10, 16])
    """
    if mask is not None and is_causal:
        raise ValueError("attention takes is_causal or a mask, not both: put the causal part into the mask")
    name = choose(q, k, v, dim=primal_of(q).shape[-1])
    if name in _LIBRARIES:
        return _LIBRARIES[name](q, k, v, scale, is_causal, mask)
    if mask is not None and _differentiated(mask):
        return ATTENTION.plain(q, k, v, scale, is_causal, mask)[0]
    return _call(ATTENTION, name, (q, k, v), (scale, is_causal, mask))


def attention_varlen(
    q: A, k: A, v: A, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float | None = None, is_causal: bool = False,
) -> A:  # fmt: skip
    """Softmax attention of S sequences of different lengths, concatenated without padding.

    The arguments are those of flash-attn's `flash_attn_varlen_func`, except for `is_causal`, which is that of
    `attention`. The kernels compute it where they run, and plain PyTorch elsewhere, whatever `use_attention` says.

    Args:
        q: (T, H, d) float, with any strides; or a dual, with a tangent (T, H, d).
        k, v: (U, G, d) float, same dtype as q; or duals, with tangents (U, G, d). G divides H.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 on the device of q: where the queries and keys of each sequence
            begin, followed by T and U. The kernels do not check them.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence.
        scale, is_causal: as in `attention`.

    Returns:
        (T, H, d) in the dtype of q; for duals the same with a tangent (T, H, d).

    Raises:
        ValueError: a tangent for only some tokens; or as in `attention`.
    """
    if any(isinstance(x, Dual) and len(x.tangent) != len(x.primal) for x in (q, k, v)):
        raise ValueError("attention of sequences needs tangents of all tokens")
    heads = [linear_map(lambda x: x.transpose(0, 1).unsqueeze(0), x) for x in (q, k, v)]  # (1, H, T, d)
    options = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, is_causal)
    return linear_map(lambda o: o.squeeze(0).transpose(0, 1), ATTENTION_VARLEN(*heads, options=options)[0])


def attention_packed(qkv: A, num_heads: int, num_tokens: int | None = None) -> A:
    """Self-attention over the packed output of one query-key-value projection.

    Args:
        qkv: (B, N, 3 * H * d) or (B * N, 3 * H * d) float; the last dimension is ordered (q, k, v), then head, then
            channel. Or a dual, with a tangent of its last K or K * N rows.
        num_heads: H.
        num_tokens: N, needed for (B * N, 3 * H * d).

    Returns:
        (B, N, H * d) or (B * N, H * d) in the dtype of qkv, heads concatenated; for a dual the same with a tangent.

    Raises:
        ValueError: as in `attention`.
    """
    x = primal_of(qkv)
    name = choose(qkv, dim=x.shape[-1] // (3 * num_heads))
    tokens = x.shape[-2] if num_tokens is None else num_tokens
    if name in _LIBRARIES:
        return _merge_heads(_LIBRARIES[name](*_split_heads(x, num_heads, tokens)), x.ndim)
    return _call(ATTENTION_PACKED, name, (qkv,), (num_heads, tokens))


def rotary_attention(
    qkv: A, q_weight: A, k_weight: A, num_heads: int, num_tokens: int | None = None, eps: float = EPS
) -> A:
    """Self-attention over the packed output of one query-key-value projection, with RMSNorm and RoPE on queries and
    keys.

    The queries and keys of each head are normalised by their root mean square and multiplied by a weight. Then the
    channels (2i, 2i + 1) of the token at position m = 0 ... N - 1 are rotated by the angle m * 10,000^(-2i / d). The
    scale of the scores is 1 / sqrt(d).

    Args:
        qkv, num_heads, num_tokens: as in `attention_packed`.
        q_weight, k_weight: (d,) float; or duals, with tangents (d,).
        eps: added to the mean square.

    Returns:
        As in `attention_packed`.

    Raises:
        ValueError: d is odd, or the weights do not have shape (d,); or as in `attention`.
    """
    x = primal_of(qkv)
    dim = x.shape[-1] // (3 * num_heads)
    if dim % 2:
        raise ValueError(f"RoPE rotates pairs of channels, so heads must have an even number of them, not {dim}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if tuple(primal_of(weight).shape) != (dim,):
            raise ValueError(f"{name} must be of shape ({dim},), not {tuple(primal_of(weight).shape)}")
    tokens = x.shape[-2] if num_tokens is None else num_tokens
    name = choose(qkv, q_weight, k_weight, dim=dim)
    if name in _LIBRARIES:
        weights = primal_of(q_weight), primal_of(k_weight)
        qk, v = _split_values(x)
        qk = norm_rope(qk, *weights, num_heads, tokens, eps)
        return _merge_heads(_LIBRARIES[name](*_rotated_heads(qk, v, num_heads, tokens)), x.ndim)
    return _call(ROTARY_ATTENTION, name, (qkv, q_weight, k_weight), (num_heads, tokens, eps))


def _call(op: Op, name: str, args: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    if name == "auto":
        return op(*args, options=options)[0]
    return op.by_kernels(*args, options=options)[0] if name == "triton" else op.plain(*args, *options)[0]


def _differentiated(mask: Tensor) -> bool:
    """Whether a mask has a gradient or a tangent, which the kernels do not compute.

    Raises:
        ValueError: inside `one_node`, which would drop the gradient.
    """
    if fwad.unpack_dual(mask).tangent is not None:
        return True
    if not mask.requires_grad:
        return False
    if recording() is not None:
        raise ValueError("a mask that requires a gradient is not differentiated inside one_node: compute it outside")
    return torch.is_grad_enabled()


def _split_heads(x: Tensor, num_heads: int, tokens: int, parts: int = 3) -> tuple[Tensor, ...]:
    """Parts (B, H, N, d) of x (B, N, parts * H * d) or (B * N, parts * H * d)."""
    batch = len(x) if x.ndim == 3 else len(x) // tokens
    x = x.view(batch, tokens, parts, num_heads, x.shape[-1] // (parts * num_heads))  # (B, N, parts, H, d)
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def _merge_heads(o: Any, ndim: int) -> Any:
    """(B, H, N, d) to (B, N, H * d) or (B * N, H * d)."""
    o = o.transpose(1, 2).flatten(2)
    return o if ndim == 3 else o.flatten(0, 1)


# ----------------------------------------------------------------------------
# Plain.


def _plain(
    q: A, k: A, v: A, scale: float | None = None, is_causal: bool = False, mask: Tensor | None = None
) -> tuple[A]:
    scale = primal_of(q).shape[-1] ** -0.5 if scale is None else scale
    group = primal_of(q).shape[1] // max(primal_of(k).shape[1], 1)
    if group != 1:
        k, v = (linear_map(lambda x: x.repeat_interleave(group, 1), x) for x in (k, v))
    p = _probabilities(primal_of(q), primal_of(k), scale, is_causal, mask)
    o = p.to(primal_of(v).dtype) @ primal_of(v)
    if not isinstance(q, Dual):
        return (o,)
    with tangent_graph():
        duals = slice(len(p) - len(q.tangent), None)
        q, k, v = (Dual(x.primal[duals], x.tangent) for x in (q, k, v))
        return (Dual(o, _tangent(q, k, v, p[duals], scale)),)


def _plain_varlen(
    q: Any, k: Any, v: Any, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, scale: float | None,
    is_causal: bool,
) -> tuple[Any]:  # fmt: skip
    """Attention of tokens (1, H, T, d)."""

    def parts(x: Any, cu: Tensor) -> Sequence[Any]:
        lengths = cu.diff().tolist()
        pieces = primal_of(x).split(lengths, 2)
        return [*map(Dual, pieces, x.tangent.split(lengths, 2))] if isinstance(x, Dual) else pieces

    triples = zip(parts(q, cu_q), parts(k, cu_k), parts(v, cu_k), strict=True)
    outputs = [_plain(*triple, scale, is_causal)[0] for triple in triples]
    if not isinstance(q, Dual):
        return (torch.cat(outputs, 2),)
    primals, tangents = zip(*outputs, strict=True)
    return (Dual(torch.cat(primals, 2), torch.cat(tangents, 2)),)


def _plain_packed(qkv: Any, heads: int, tokens: int) -> tuple[Any]:
    def merge(o: Tensor) -> Tensor:
        return _merge_heads(o, primal_of(qkv).ndim)

    parts: Any = _split_heads(primal_of(qkv), heads, tokens)
    if isinstance(qkv, Dual):
        parts = map(Dual, parts, _split_heads(qkv.tangent, heads, tokens))
    q, k, v = parts
    return (linear_map(merge, _plain(q, k, v)[0]),)


def _plain_rotary(qkv: Any, q_weight: Any, k_weight: Any, heads: int, tokens: int, eps: float) -> tuple[Any]:
    qk, v = _split_values(qkv)
    qk = plain_norm_rope(qk, q_weight, k_weight, heads, tokens, eps)[0]
    parts: Any = _rotated_heads(primal_of(qk), primal_of(v), heads, tokens)
    if isinstance(qk, Dual):
        dv = v.tangent if isinstance(v, Dual) else torch.zeros_like(v)
        parts = map(Dual, parts, _rotated_heads(qk.tangent, dv, heads, tokens))
    q, k, v = parts
    return (linear_map(partial(_merge_heads, ndim=primal_of(qkv).ndim), _plain(q, k, v)[0]),)


def _split_values(qkv: Any) -> Any:
    """Queries and keys side by side, and values."""
    width = primal_of(qkv).shape[-1] // 3
    sizes = (2 * width, width)
    parts = primal_of(qkv).split(sizes, -1)
    return tuple(map(Dual, parts, qkv.tangent.split(sizes, -1))) if isinstance(qkv, Dual) else parts


def _rotated_heads(qk: Tensor, v: Tensor, heads: int, tokens: int) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, H, N, d) from queries and keys side by side, and values."""
    return *_split_heads(qk, heads, tokens, 2), *_split_heads(v, heads, tokens, 1)


def _probabilities(q: Tensor, k: Tensor, scale: float, is_causal: bool, mask: Tensor | None) -> Tensor:
    scores = (q * scale) @ k.mT  # (B, H, N, M)
    dtype = accumulation_dtype(q)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return torch.softmax(scores, dim=-1, dtype=dtype)
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    if mask.dtype != torch.bool:
        scores = scores.to(dtype) + mask.masked_fill(~seen, 0)
    # A softmax over -inf only is NaN, and so is its gradient.
    blind = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~(seen | blind), -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=dtype).masked_fill(blind, 0)


def _tangent(q: Dual, k: Dual, v: Dual, p: Tensor, scale: float) -> Tensor:
    ds = (q.tangent * scale) @ k.primal.mT + (q.primal * scale) @ k.tangent.mT
    # The softmax's Jacobian is symmetric, so PyTorch's backward, P * S' - rowsum(P * S') P, also computes the tangent.
    dp = softmax_backward(ds.to(p.dtype), p, -1, p.dtype)
    return dp.to(v.primal.dtype) @ v.primal + p.to(v.primal.dtype) @ v.tangent


# ----------------------------------------------------------------------------
# Library implementations.


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    from flash_attn import flash_attn_func

    if mask is not None or (is_causal and q.shape[2] != k.shape[2]):
        raise ValueError("attention with flash-attn: it takes no mask, and is_causal only for as many queries as keys")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (x.transpose(1, 2) for x in (q, k, v)))
    deterministic = torch.are_deterministic_algorithms_enabled()
    o = flash_attn_func(q, k, v, softmax_scale=scale, causal=is_causal, deterministic=deterministic)
    return o.transpose(1, 2)  # from (B, N, H, d)


_LIBRARIES: dict[str, Callable[..., Any]] = {"sdpa": _sdpa, "flash-attn": _flash_attn}


# ----------------------------------------------------------------------------
# Fused. Besides the output, the backward reads the log-sum-exp (B, H, N), float32.


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return kernel.forward(q, k, v, scale, is_causal, mask)


def _dual(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, *options: Any, mean: bool = False
) -> tuple[Tensor, ...]:
    return kernel.forward_dual(q, k, v, dq, dk, dv, *options, mean=mean)


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    return kernel.backward(*inputs)


def _backward_dual(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, do: Tensor,
    mean: Tensor, go: Tensor | None, gdo: Tensor, scale: float | None, is_causal: bool, mask: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The first rows, which have no tangent, take the ordinary backward."""
    go = torch.zeros_like(o) if go is None else go
    first = len(q) - len(dq)
    if not first:
        return tangent_kernel.backward_dual(q, k, v, o, lse, dq, dk, dv, do, mean, go, gdo, scale, is_causal, mask)
    of_lead, of_last = mask, mask
    if mask is not None and mask.ndim == 4 and len(mask) > 1:
        of_lead, of_last = mask[:first], mask[first:]
    (q, q1), (k, k1), (v, v1), (o, o1), (lse, lse1), (go, go1) = ((x[:first], x[first:]) for x in (q, k, v, o, lse, go))
    lead = kernel.backward(q, k, v, o, lse, go, scale, is_causal, of_lead)
    last = tangent_kernel.backward_dual(
        q1, k1, v1, o1, lse1, dq, dk, dv, do, mean, go1, gdo, scale, is_causal, of_last
    )  # fmt: skip
    return *(torch.cat(pair) for pair in zip(lead, last[:3], strict=True)), *last[3:]


def _shapes(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2), q.new_empty(q.shape[:3], dtype=torch.float32)


def _flops(
    q: Any, k: Any, v: Any, scale: float | None = None, is_causal: bool = False, mask: Any = None
) -> tuple[int, int, int]:
    """Without savings for a mask."""
    batch, heads, queries, dim = q
    keys = k[2]
    first = min(queries, keys)  # in these first rows, each query sees one key more than the previous one
    pairs = first * (first + 1) // 2 + (queries - first) * keys if is_causal else queries * keys
    product = 2 * batch * heads * pairs * dim
    return 2 * product, 4 * product, 7 * product  # the backward computes the scores twice


def _backward_dual_flops(q: Any, k: Any, v: Any, dq: Any, dk: Any, dv: Any, *options: Any) -> int:
    """A lower bound: 12 products for keys and values, 9 for queries."""
    lead = (q[0] - dq[0], *q[1:])
    return _flops(lead, k, v, *options)[2] + 21 * _flops(dq, dk, dv, *options)[0] // 2


ATTENTION = Op(
    "attention",
    forward=_forward,
    dual=_dual,
    differentiable_dual=partial(_dual, mean=True),
    backward=_backward,
    backward_dual=_backward_dual,
    backward_dual_flops=_backward_dual_flops,
    auxiliary_dual={"mean": "lse"},
    plain=_plain,
    shapes=_shapes,
    flops=_flops,
    outputs=("o",),
    auxiliary=("lse",),
    saved=("q", "k", "v", "o", "lse"),
)


def _varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, longest_q: int, longest_k: int,
    scale: float | None, is_causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert cu_q is not None
    assert cu_k is not None
    sequences = kernel.Sequences(cu_q, cu_k, longest_q, longest_k)
    return kernel.forward(q, k, v, scale, is_causal, None, sequences)


def _varlen_dual(*inputs: Any, mean: bool = False) -> tuple[Tensor, ...]:
    q, k, v, dq, dk, dv, *sequences, scale, is_causal = inputs
    return kernel.forward_dual(q, k, v, dq, dk, dv, scale, is_causal, None, kernel.Sequences(*sequences), mean=mean)


def _varlen_backward(*inputs: Any) -> tuple[Tensor, ...]:
    q, k, v, o, lse, go, *sequences, scale, is_causal = inputs
    return kernel.backward(q, k, v, o, lse, go, scale, is_causal, None, kernel.Sequences(*sequences))


def _longest(k: Any, cu_q: Any, cu_k: Any, longest_q: int, longest_k: int, *_: Any) -> Any:
    """Shape of the keys as if every query saw as many as the longest sequence has: shapes do not tell more."""
    return (*k[:2], longest_k, k[3])


def _varlen_flops(q: Any, k: Any, v: Any, *options: Any) -> Any:
    return _flops(q, _longest(k, *options), v)


def _varlen_backward_dual(*inputs: Any) -> tuple[Tensor, ...]:
    q, k, v, o, lse, dq, dk, dv, do, mean, go, gdo, *sequences, scale, is_causal = inputs
    go = torch.zeros_like(gdo) if go is None else go
    options = scale, is_causal, None, kernel.Sequences(*sequences)
    return tangent_kernel.backward_dual(q, k, v, o, lse, dq, dk, dv, do, mean, go, gdo, *options)


def _varlen_backward_dual_flops(q: Any, k: Any, v: Any, dq: Any, dk: Any, dv: Any, *options: Any) -> int:
    return _backward_dual_flops(q, _longest(k, *options), v, dq, _longest(dk, *options), dv)


ATTENTION_VARLEN = Op(
    "attention_varlen",
    forward=_varlen_forward,
    dual=_varlen_dual,
    differentiable_dual=partial(_varlen_dual, mean=True),
    backward=_varlen_backward,
    backward_dual=_varlen_backward_dual,
    backward_dual_flops=_varlen_backward_dual_flops,
    auxiliary_dual={"mean": "lse"},
    plain=_plain_varlen,
    shapes=_shapes,
    flops=_varlen_flops,
    outputs=("o",),
    auxiliary=("lse",),
    saved=("q", "k", "v", "o", "lse"),
)


def _packed_forward(qkv: Tensor, heads: int, tokens: int) -> tuple[Tensor, Tensor]:
    return kernel.forward_packed(qkv, heads, tokens)


def _packed_dual(qkv: Tensor, dqkv: Tensor, heads: int, tokens: int, mean: bool = False) -> tuple[Tensor, ...]:
    return kernel.forward_dual_packed(qkv, dqkv, heads, tokens, mean=mean)


def _packed_backward(qkv: Tensor, o: Tensor, lse: Tensor, go: Tensor, heads: int, tokens: int) -> tuple[Tensor]:
    return kernel.backward_packed(qkv, o, lse, go, heads, tokens)[:1]


def _packed_backward_dual(
    qkv: Tensor, o: Tensor, lse: Tensor, dqkv: Tensor, do: Tensor, mean: Tensor, go: Tensor | None, gdo: Tensor,
    heads: int, tokens: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    go = torch.zeros_like(o) if go is None else go
    first = len(qkv) - len(dqkv)
    samples = len(lse) - len(mean)
    gqkv, gdqkv = (torch.empty_like(dqkv, memory_format=torch.contiguous_format) for _ in range(2))
    qkv_heads, dqkv_heads, *gradients = (
        _split_heads(x.contiguous(), heads, tokens) for x in (qkv[first:], dqkv, gqkv, gdqkv)
    )
    o_heads, do_heads, go_heads, gdo_heads = (
        _split_heads(x.contiguous(), heads, tokens, 1)[0] for x in (o[first:], do, go[first:], gdo)
    )
    (q, k, v), (dq, dk, dv) = qkv_heads, dqkv_heads
    tangent_kernel.backward_dual(
        q, k, v, o_heads, lse[samples:], dq, dk, dv, do_heads, mean, go_heads, gdo_heads,
        gradients=(*gradients[0], *gradients[1]),
    )  # fmt: skip
    if first:
        lead = kernel.backward_packed(qkv[:first], o[:first], lse[:samples], go[:first], heads, tokens)[0]
        gqkv = torch.cat((lead, gqkv))
    return gqkv, gdqkv


def _packed_backward_dual_flops(qkv: Any, dqkv: Any, heads: int, tokens: int) -> int:
    head, dhead = (_head_shape(x, heads, tokens) for x in (qkv, dqkv))
    return _backward_dual_flops(head, head, head, dhead, dhead, dhead)


def _packed_shapes(qkv: Tensor, heads: int, tokens: int) -> tuple[Tensor, Tensor]:
    *rows, width = qkv.shape
    batch = rows[0] if len(rows) == 2 else rows[0] // tokens
    return qkv.new_empty(*rows, width // 3), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


def _packed_flops(qkv: Any, heads: int, tokens: int) -> tuple[int, int, int]:
    head = _head_shape(qkv, heads, tokens)
    return _flops(head, head, head)


def _head_shape(qkv: Any, heads: int, tokens: int) -> tuple[int, ...]:
    """(B, H, N, d), the shape of queries, keys and values."""
    *rows, width = qkv
    return math.prod(rows) // tokens, heads, tokens, width // (3 * heads)


ATTENTION_PACKED = Op(
    "attention_packed",
    forward=_packed_forward,
    dual=_packed_dual,
    differentiable_dual=partial(_packed_dual, mean=True),
    backward=_packed_backward,
    backward_dual=_packed_backward_dual,
    backward_dual_flops=_packed_backward_dual_flops,
    auxiliary_dual={"mean": "lse"},
    plain=_plain_packed,
    shapes=_packed_shapes,
    flops=_packed_flops,
    outputs=("o",),
    auxiliary=("lse",),
    saved=("qkv", "o", "lse"),
)


def _rotary_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, tokens: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    (qk,) = norm_rope_forward(_split_values(qkv)[0], q_weight, k_weight, heads, tokens, eps)
    o, lse = kernel.forward_packed(qkv, heads, tokens, qk)
    return o, qk, lse


def _rotary_dual(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, dqkv: Tensor, dq_weight: Tensor | None, dk_weight: Tensor | None,
    heads: int, tokens: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    first, dfirst = _split_values(qkv)[0], _split_values(dqkv)[0]
    qk, dqk = norm_rope_dual(first, q_weight, k_weight, dfirst, dq_weight, dk_weight, heads, tokens, eps)
    o, lse, do = kernel.forward_dual_packed(qkv, dqkv, heads, tokens, qk, dqk)
    return o, qk, lse, do


def _rotary_backward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, qk: Tensor, o: Tensor, lse: Tensor, go: Tensor,
    heads: int, tokens: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention writes the values' part of the gradient of qkv, and the norm's backward writes the other two."""
    gqkv, gqk = kernel.backward_packed(qkv, o, lse, go, heads, tokens, qk)
    first, gfirst = _split_values(qkv)[0], _split_values(gqkv)[0]
    return gqkv, *norm_rope_backward(first, q_weight, k_weight, gqk, gfirst, heads, tokens, eps)


def _rotary_shapes(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, tokens: int, eps: float) -> Any:
    o, lse = _packed_shapes(qkv, heads, tokens)
    return o, qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3 * 2), lse


ROTARY_ATTENTION = Op(
    "rotary_attention",
    forward=_rotary_forward,
    dual=_rotary_dual,
    backward=_rotary_backward,
    plain=_plain_rotary,
    shapes=_rotary_shapes,
    flops=lambda qkv, q_weight, k_weight, heads, tokens, eps: _packed_flops(qkv, heads, tokens),
    outputs=("o",),
    auxiliary=("qk", "lse"),
    saved=("qkv", "q_weight", "k_weight", "qk", "o", "lse"),
    parameters=2,
)
