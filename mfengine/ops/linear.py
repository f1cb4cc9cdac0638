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
"""By id, a parameter, its copy, and that transposed; or, by ids and padded sizes, several and their packed copy."""


def linear(x: A, weight: Any, bias: Any = None) -> A:
    """x W^T + b, computed in the dtype of x; the tangent is dx W^T + x dW^T + db.

    Args:
        x: (B, ..., in) float; or a dual, with a tangent (K, ..., in) of its last K rows.
        weight: (out, in), bias: (out,) or None; cast to the dtype of x. Or duals, with tangents of the same shapes.

    Returns:
        (B, ..., out) in the dtype of x; of duals the same with a tangent (K, ..., out).
    """
    dtype = primal_of(x).dtype
    if (tape := recording()) is not None:
        return _in_block(tape, x, weight, bias, dtype)
    weight, bias = (p if p is None else linear_map(lambda p: _cast_with_graph(p, dtype), p) for p in (weight, bias))
    if not isinstance(weight, Dual) and not isinstance(bias, Dual):  # the usual case, and the cheapest
        output = F.linear(primal_of(x), weight, bias)
        if not isinstance(x, Dual):
            return output
        with tangent_graph():
            return Dual(output, F.linear(x.tangent, weight))
    product = push(F.linear, _product_tangent, x, weight, parameters=1)
    return product if bias is None else push(torch.add, _sum_tangent, product, bias, parameters=1)


def packed_linear(x: A, weights: Sequence[Any], multiple: int = 1, in_multiple: int = 1) -> A:
    """x W^T of several linear layers without bias, side by side, by one product.

    The rows of each weight are padded with zeros to a multiple, and the columns to the width of x. Gradients are those
    of the parameters in their own shapes. The packed weight is made once inside `fixed_weights`.

    Args:
        x: (B, ..., in) float; or a dual, with a tangent (K, ..., in) of its last K rows.
        weights: parameters (out_i, in_i), cast to the dtype of x; or duals, with tangents of the same shapes.
        multiple: each layer has its out_i rounded up to this, the last ones zero.
        in_multiple: in is in_i, or in_i rounded up to this.

    Returns:
        (B, ..., sum of the rounded out_i) in the dtype of x; of duals the same with a tangent.

    Raises:
        ValueError: x is not of such a width.

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
            raise ValueError(f"x is {width} wide, and a weight has {columns} columns (rounded to {in_multiple})")
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
    """Parameters do not change inside: in a block that is `one_node`, linear layers cast each only once.

    A context manager or decorator, which may be entered again and again.

    Args:
        copies: of parameters, in the dtype of the products, for those that need not be cast at all. They hold what the
            parameters hold whenever it is entered.
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
    """A parameter without autograd, and its transpose."""
    found = None if _fixed is None else _fixed.get(id(p))
    if found is None or found[1].dtype != dtype:
        copy = p.to(dtype)
        found = p, copy, _transposed(copy)
        if _fixed is not None:
            _fixed[id(p)] = found
    return found[1:]


def _cast_with_graph(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in another dtype; one that takes gradients in that dtype and has a copy need not be cast."""
    # The compiler must not see the look-up: it would compile each block anew, for the identity of its parameters.
    if torch.compiler.is_compiling() or traced() or _fixed is None:
        return p.to(dtype)
    found = _fixed.get(id(p))
    if found is None or found[1].dtype != dtype or p.grad_dtype != dtype:
        return p.to(dtype)
    return _Copied.apply(p, found[1])


class _Copied(torch.autograd.Function):
    """The copy of a parameter, whose gradient is the parameter's."""

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
    """Weights below each other, padded with zeros to `width` columns and to a multiple of rows each."""
    padded = []
    for w in weights:
        rows, columns = (_round_up(len(w), multiple) - len(w), width - w.shape[1])
        padded.append(F.pad(w, (0, columns, 0, rows)) if rows or columns else w)
    return padded[0] if len(padded) == 1 else torch.cat(padded)


def _packed(weights: tuple[Tensor, ...], width: int, multiple: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_pack` in a dtype, without autograd, and its transpose."""
    key = (*map(id, weights), width, multiple)
    found = None if _fixed is None else _fixed.get(key)
    if found is None or found[1].dtype != dtype:
        packed = _pack([_cast(p, dtype)[0] for p in weights], width, multiple)
        found = weights, packed, packed.t()
        if _fixed is not None:
            _fixed[key] = found
    return found[1:]


def _unpack(gradient: Tensor, shapes: Sequence[torch.Size], multiple: int) -> list[Tensor]:
    """Of the gradient of a packed weight, that of each."""
    parts = gradient.split([_round_up(rows, multiple) for rows, _ in shapes])
    return [part[:rows, :columns] for part, (rows, columns) in zip(parts, shapes, strict=True)]


class _Packed(torch.autograd.Function):
    """The packed copy of parameters, whose gradient is theirs."""

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
    """The layer; its backward is put on the tape."""
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
        dim: even.

    Returns:
        (B, dim) float32, or float64 if t is.
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
