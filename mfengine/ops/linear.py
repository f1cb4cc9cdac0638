"""Linear layers and the sinusoidal embedding of a scalar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ContextDecorator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.dual import A, Dual, linear_map, primal_of, push, tangent_graph, tangent_of
from mfengine.ops.node import Tape, recording
from mfengine.torch_private import in_forward_mode, traced

_Fixed = dict[Any, tuple[Any, Tensor, Tensor]]
_fixed: _Fixed | None = None
"""id of a parameter -> it, its copy and the copy's transpose; or ids and padded sizes -> the same of packed weights"""


def linear(x: A, weight: Any, bias: Any = None) -> A:
    """x W^T + b, computed in the dtype of x; the tangent is dx W^T + x dW^T + db.

    Args:
        x: (B, ..., in) float; or a dual, with a tangent (K, ..., in) of its last K rows.
        weight: (out, in), bias: (out,) or None; cast to the dtype of x. Or duals, with tangents of the same shapes.

    Returns:
        (B, ..., out) in the dtype of x; for duals the same with a tangent (K, ..., out).
    """
    dtype = primal_of(x).dtype
    if (tape := recording()) is not None:
        return _in_block(tape, x, weight, bias, dtype)
    weight, bias = (p if p is None else linear_map(lambda p: _cast_with_graph(p, dtype), p) for p in (weight, bias))
    if not isinstance(weight, Dual) and not isinstance(bias, Dual):  # the common case, and the cheapest
        output = F.linear(primal_of(x), weight, bias)
        if not isinstance(x, Dual):
            return output
        with tangent_graph():
            return Dual(output, F.linear(x.tangent, weight))
    product = push(F.linear, _product_tangent, x, weight, parameters=1)
    return product if bias is None else push(torch.add, _sum_tangent, product, bias, parameters=1)


def packed_linear(x: A, weights: Sequence[Any], multiple: int = 1, in_multiple: int = 1) -> A:
    """x W^T of several linear layers without bias, side by side, in one product.

    The rows of each weight are padded with zeros to a multiple, and the columns to the width of x. Gradients have the
    parameters' own shapes. Inside `fixed_weights`, the packed weight is made only once.

    Args:
        x: (B, ..., in) float; or a dual, with a tangent (K, ..., in) of its last K rows.
        weights: parameters (out_i, in_i), cast to the dtype of x; or duals, with tangents of the same shapes.
        multiple: each out_i is rounded up to a multiple of this; the extra outputs are zero.
        in_multiple: in equals in_i, possibly rounded up to a multiple of this.

    Returns:
        (B, ..., sum of the rounded out_i) in the dtype of x; for duals the same with a tangent.

    Raises:
        ValueError: x has another width.

    Example:
        >>> import torch
        >>> from mfengine.ops import packed_linear
        >>> packed_linear(torch.ones(2, 8), [torch.ones(3, 6), torch.ones(4, 6)], multiple=4)[0].tolist()
        [6.0, 6.0, 6.0, 0.0, 6.0, 6.0, 6.0, 6.0]
    """
    primal = primal_of(x)
    weights, width = tuple(weights), primal.shape[-1]
    for weight in weights:
        columns = primal_of(weight).shape[1]
        if width not in (columns, _round_up(columns, in_multiple)):
            raise ValueError(f"x has width {width}, but a weight has {columns} columns (rounded to {in_multiple})")
    if (tape := recording()) is not None:
        packed, packed_t = _packed(weights, width, multiple, primal.dtype)
        output = primal @ packed_t if primal.ndim == 2 else F.linear(primal, packed)
        tape.record(_packed_gradients, (primal, *weights), (output,), (primal, packed), (_shapes(weights), multiple))
        return Dual(output, x.tangent @ packed_t) if isinstance(x, Dual) else output
    primals, tangents = [primal_of(w) for w in weights], [tangent_of(w) for w in weights]
    along = any(t is not None for t in tangents)
    if not along and not (torch.compiler.is_compiling() or traced() or in_forward_mode()):
        return linear(x, _Packed.apply(width, multiple, primal.dtype, *primals))
    w: Any = _pack([p.to(primal.dtype) for p in primals], width, multiple)
    if along:
        whole = [torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)]
        w = Dual(w, _pack(whole, width, multiple))
    return linear(x, w)


class fixed_weights(ContextDecorator):  # noqa: N801 - as `torch.no_grad`
    """Declare that parameters do not change inside; linear layers in a `one_node` block then cast each only once.

    It is a context manager or decorator, and may be entered repeatedly.

    Args:
        copies: parameter -> its copy in the dtype of the products, which saves the cast. The copies must be up to date
            whenever the context is entered.
    """

    def __init__(self, copies: Mapping[Tensor, Tensor] | None = None) -> None:
        self._copies = {id(p): (p, copy, _transposed(copy)) for p, copy in (copies or {}).items()}
        self._outer: list[_Fixed | None] = []

    def __enter__(self) -> None:
        global _fixed
        self._outer.append(_fixed)
        if _fixed is None:
            _fixed = self._copies.copy()

    def __exit__(self, *_: object) -> None:
        global _fixed
        _fixed = self._outer.pop()


def _transposed(weight: Tensor) -> Tensor:
    return weight.t() if weight.ndim == 2 else weight


def _cast(p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A cast parameter without autograd, and its transpose."""
    found = None if _fixed is None else _fixed.get(id(p))
    if found is None or found[1].dtype != dtype:
        copy = p.to(dtype)
        found = p, copy, _transposed(copy)
        if _fixed is not None:
            _fixed[id(p)] = found
    return found[1:]


def _cast_with_graph(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in another dtype. A copy replaces the cast if the parameter takes gradients in that dtype."""
    # Hidden from the compiler, which would compile each block again for the identity of its parameters.
    if torch.compiler.is_compiling() or traced() or _fixed is None:
        return p.to(dtype)
    found = _fixed.get(id(p))
    if found is None or found[1].dtype != dtype or p.grad_dtype != dtype:
        return p.to(dtype)
    return _Copied.apply(p, found[1])


class _Copied(torch.autograd.Function):
    """The copy of a parameter; the copy's gradient goes to the parameter."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, copy: Tensor) -> Tensor:
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _shapes(weights: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(w.shape for w in weights)


def _pack(weights: Sequence[Tensor], width: int, multiple: int) -> Tensor:
    """Weights stacked by rows, padded with zeros to `width` columns and to a multiple of rows each."""
    padded = []
    for w in weights:
        rows, columns = (_round_up(len(w), multiple) - len(w), width - w.shape[1])
        padded.append(F.pad(w, (0, columns, 0, rows)) if rows or columns else w)
    return padded[0] if len(padded) == 1 else torch.cat(padded)


def _packed(weights: tuple[Tensor, ...], width: int, multiple: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result of `_pack` in a dtype, without autograd, and its transpose."""
    key = (*map(id, weights), width, multiple)
    found = None if _fixed is None else _fixed.get(key)
    if found is None or found[1].dtype != dtype:
        packed = _pack([_cast(p, dtype)[0] for p in weights], width, multiple)
        found = weights, packed, packed.t()
        if _fixed is not None:
            _fixed[key] = found
    return found[1:]


def _unpack(gradient: Tensor, shapes: Sequence[torch.Size], multiple: int) -> list[Tensor]:
    """Each weight's part of the gradient of a packed weight."""
    parts = gradient.split([_round_up(rows, multiple) for rows, _ in shapes])
    return [part[:rows, :columns] for part, (rows, columns) in zip(parts, shapes, strict=True)]


class _Packed(torch.autograd.Function):
    """The packed copy of parameters; the copy's gradient goes to them."""

    @staticmethod
    def forward(ctx: Any, width: int, multiple: int, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        ctx.shapes, ctx.multiple = _shapes(weights), multiple
        return _packed(weights, width, multiple, dtype)[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None, None, None, *_unpack(gradient, ctx.shapes, ctx.multiple))


def _packed_gradients(
    x: Tensor, packed: Tensor, go: Tensor, shapes: Sequence[torch.Size], multiple: int
) -> list[Tensor]:
    gx, gw, _ = _gradients(x, packed, go, has_bias=False)
    return [gx, *_unpack(gw, shapes, multiple)]


def _in_block(tape: Tape, x: A, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> A:
    """The layer inside a block; its backward is recorded on the tape."""
    primal, (w, w_t) = primal_of(x), _cast(weight, dtype)
    b = None if bias is None else _cast(bias, dtype)[0]
    if primal.ndim == 2:
        output = primal @ w_t if b is None else torch.addmm(b, primal, w_t)
    else:
        output = F.linear(primal, w, b)
    gradient_dtype = None
    if bias is not None:
        gradient_dtype = bias.grad_dtype if bias.is_leaf else bias.dtype
    tape.record(_gradients, (primal, weight, bias), (output,), (primal, w), (bias is not None, gradient_dtype))
    return Dual(output, x.tangent @ w_t) if isinstance(x, Dual) else output


def _gradients(
    x: Tensor, weight: Tensor, go: Tensor, has_bias: bool, bias_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    gx = go @ weight
    if x.ndim > 2:
        x, go = x.flatten(0, -2), go.flatten(0, -2)
    return gx, go.t() @ x, go.sum(0, dtype=bias_dtype) if has_bias else None


def _product_tangent(x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor | None) -> Tensor:
    return F.linear(dx, weight) if dweight is None else F.linear(dx, weight) + F.linear(x, dweight)


def _sum_tangent(x: Tensor, bias: Tensor, dx: Tensor, dbias: Tensor | None) -> Tensor:
    return dx if dbias is None else dx + dbias


def sinusoid(t: A, dim: int) -> A:
    """[cos(t f), sin(t f)] with f_i = 10,000^(-i / (dim / 2)), as in GLIDE and DiT.

    Args:
        t: (B,) float, not scaled.
        dim: an even number.

    Returns:
        (B, dim) float32; float64 for float64.
    """

    x, half = primal_of(t), dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = x[:, None] * frequencies
    cos, sin = angle.cos(), angle.sin()
    primal = torch.cat([cos, sin], dim=-1)
    if not isinstance(t, Dual):
        return primal
    with tangent_graph():
        dangle, first = t.tangent[:, None] * frequencies, len(x) - len(t.tangent)
        return Dual(primal, torch.cat([-sin[first:] * dangle, cos[first:] * dangle], dim=-1))
