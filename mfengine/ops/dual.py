"""Duals: a primal with its tangent, carried through the network without autograd.

Only interval rows (r < t) need a tangent, and they are the last rows of every batch. A `Dual` therefore holds
the primal of all rows and the tangent of the trailing ones. The tangent is never differentiated, so every
tangent rule runs without a graph and saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class Dual(NamedTuple):
    """A primal of B rows with the tangent of its last K <= B rows.

    Rows are samples; where tokens are rows, each counts, so that (B * N, D) has a tangent (K * N, D).

    Ops take duals where they take tensors, all with one K, and return a dual if any argument is one: the output, with
    autograd's graph, and its tangent, a constant without. An argument that is a tensor has no tangent. Parameters, such
    as a bias, have no rows: the tangent of theirs is whole.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, silu
        >>> x = torch.randn(4, 8, requires_grad=True)
        >>> y, dy = silu(Dual(x, torch.ones(1, 8)))
        >>> y.requires_grad, dy.requires_grad
        (True, False)
    """

    primal: Tensor  # (B, ...)
    tangent: Tensor  # (K, ...), belongs to primal[B - K:]


A = TypeVar("A", Tensor, Dual)
"""What an op takes and returns: tensors give a tensor, duals give a dual."""


def push(
    primal_rule: Callable[..., Tensor], tangent_rule: Callable[..., Tensor], *args: Any, parameters: int = 0
) -> Any:
    """Apply an op to tensors, or to tensors and duals, with plain PyTorch.

    Args:
        primal_rule: (*primals) -> output.
        tangent_rule: (*primals, *tangents) -> output tangent, called on the trailing rows alone. Tangents are as
            `complete` makes them.
        *args: `Tensor` or `Dual`.
        parameters: how many of the last arguments are parameters.
    """
    if not any(isinstance(a, Dual) for a in args):
        return primal_rule(*args)
    primals = [primal_of(a) for a in args]
    output = primal_rule(*primals)
    with torch.no_grad():
        tangents = complete(primals, [tangent_of(a) for a in args], parameters)
        rows = len(primals) - parameters
        pairs = zip(primals[:rows], tangents[:rows], strict=True)
        last = [x if len(x) == len(dx) else x[len(x) - len(dx) :] for x, dx in pairs]
        return Dual(output, tangent_rule(*last, *primals[rows:], *tangents))


def complete(primals: Sequence[Tensor], tangents: Sequence[Tensor | None], parameters: int = 0) -> list[Any]:
    """Tangents of one share of the rows, zero for arguments that had none; None stays for parameters, which come last.

    Raises:
        ValueError: tangents of different shares of the rows.
    """
    rows = len(primals) - parameters
    pairs = [*zip(primals[:rows], tangents[:rows], strict=True)]
    whole, part = next(((len(x), len(t)) for x, t in pairs if t is not None), (1, 1))
    for x, t in pairs:
        if t is not None and len(t) * whole != len(x) * part:
            raise ValueError(f"tangents must be of one number of rows, not of {part} and {len(t)}")

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(len(x) * part // max(whole, 1), *x.shape[1:])

    return [*(zeros(x) if t is None else t for x, t in pairs), *tangents[rows:]]


def linear_map(f: Callable[[Tensor], Tensor], x: A) -> A:
    """Apply a linear function without parameters (a reshape, a cast, a slice): its own JVP."""
    if isinstance(x, Dual):
        with torch.no_grad():
            tangent = f(x.tangent)
        return Dual(f(x.primal), tangent)
    return f(x)


def add(x: A, y: A) -> A:
    """x + y: y in the shape of x, or a tensor that broadcasts to it. Of two dtypes the wider."""
    if isinstance(x, Dual) and not isinstance(y, Dual):
        total = x.primal + y
        return Dual(total, x.tangent.to(total.dtype))
    return push(torch.add, lambda x, y, dx, dy: dx + dy, x, y)


def primal_of(x: Tensor | Dual) -> Tensor:
    return x.primal if isinstance(x, Dual) else x


def tangent_of(x: Tensor | Dual) -> Tensor | None:
    return x.tangent if isinstance(x, Dual) else None


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which norms, softmax and activations are computed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
