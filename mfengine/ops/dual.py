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
        tangents = complete(primals, [a.tangent if isinstance(a, Dual) else None for a in args], parameters)
        rows = len(primals) - parameters
        duals = len(tangents[0])
        last = [x if len(x) == duals else x[len(x) - duals :] for x in primals[:rows]]
        return Dual(output, tangent_rule(*last, *primals[rows:], *tangents))


def complete(primals: Sequence[Tensor], tangents: Sequence[Tensor | None], parameters: int = 0) -> list[Any]:
    """Tangents of one number of rows, zero for arguments that had none; None stays for parameters, the last arguments.

    Raises:
        ValueError: tangents of different numbers of rows.
    """
    rows = len(primals) - parameters
    counts = {t.shape[0] for t in tangents[:rows] if t is not None} or {primals[0].shape[0]}
    if len(counts) > 1:
        raise ValueError(f"tangents must be of one number of rows, not of {' and '.join(map(str, sorted(counts)))}")
    (duals,) = counts
    pairs = zip(primals[:rows], tangents[:rows], strict=True)
    return [*(x.new_zeros(duals, *x.shape[1:]) if t is None else t for x, t in pairs), *tangents[rows:]]


def linear_map(f: Callable[[Tensor], Tensor], x: A) -> A:
    """Apply a linear function without parameters (a reshape, a cast, a slice): its own JVP."""
    if isinstance(x, Dual):
        with torch.no_grad():
            tangent = f(x.tangent)
        return Dual(f(x.primal), tangent)
    return f(x)


def add(x: A, y: A) -> A:
    """x + y: y in the shape of x, or a tensor that broadcasts to it."""
    if isinstance(x, Dual) and not isinstance(y, Dual):
        return Dual(x.primal + y, x.tangent)
    return push(torch.add, lambda x, y, dx, dy: dx + dy, x, y)


def primal_of(x: Tensor | Dual) -> Tensor:
    return x.primal if isinstance(x, Dual) else x


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which norms, softmax and activations are computed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
