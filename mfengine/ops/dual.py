"""Duals: a primal with its tangent, carried through the network without autograd.

Only interval rows (r < t) need a tangent, and they are the last rows of every batch. A `Dual` therefore holds
the primal of all rows and the tangent of the trailing ones. The tangent is never differentiated, so every
tangent rule runs without a graph and saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class Dual(NamedTuple):
    """A primal of B rows with the tangent of its last K <= B rows."""

    primal: Tensor  # (B, ...)
    tangent: Tensor  # (K, ...), belongs to primal[B - K:]


A = TypeVar("A", Tensor, Dual)
"""What an op takes and returns: tensors give a tensor, duals give a dual."""


def tangent_rows(primal: Tensor, tangent: Tensor) -> Tensor:
    """The trailing rows of `primal` that `tangent` belongs to, without a graph."""
    return primal.detach()[primal.shape[0] - tangent.shape[0] :]


def push(primal_rule: Callable[..., Tensor], tangent_rule: Callable[..., Tensor], *args: Any) -> Any:
    """Apply an op to tensors, or to duals.

    Args:
        primal_rule: (*primals) -> output.
        tangent_rule: (*primals, *tangents) -> output tangent, called on the trailing rows alone.
        *args: all `Tensor` or all `Dual`.
    """
    if not isinstance(args[0], Dual):
        return primal_rule(*args)
    output = primal_rule(*(a.primal for a in args))
    with torch.no_grad():
        rows = [tangent_rows(a.primal, a.tangent) for a in args]
        return Dual(output, tangent_rule(*rows, *(a.tangent for a in args)))


def linear_map(f: Callable[[Tensor], Tensor], x: A) -> A:
    """Apply a linear function without parameters (a reshape, a cast, a slice): its own JVP."""
    if isinstance(x, Dual):
        with torch.no_grad():
            tangent = f(x.tangent)
        return Dual(f(x.primal), tangent)
    return f(x)


def add(x: A, y: A) -> A:
    """x + y."""
    return push(torch.add, lambda x, y, dx, dy: dx + dy, x, y)


def add_constant(x: A, constant: Tensor) -> A:
    """x + constant, whose tangent is that of x."""
    if isinstance(x, Dual):
        return Dual(x.primal + constant, x.tangent)
    return x + constant


def chunk(x: A, chunks: int) -> tuple[A, ...]:
    """Split the last dimension into equal parts."""
    if isinstance(x, Dual):
        return tuple(Dual(*part) for part in zip(x.primal.chunk(chunks, -1), x.tangent.chunk(chunks, -1), strict=True))
    return x.chunk(chunks, -1)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which norms, softmax and activations are computed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
