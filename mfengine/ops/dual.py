"""Duals: a primal with its tangent, carried through the network without autograd.

Only interval rows (r < t) need a tangent, and they are the last rows of every batch. A `Dual` therefore holds
the primal of all rows and the tangent of the trailing ones. The tangent is never differentiated, so every
tangent rule runs without a graph and saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor


class Dual(NamedTuple):
    """A primal of B rows with the tangent of its last K <= B rows.

    Ops take duals where they take tensors, all arguments or none, with one K, and return duals: the output, with
    autograd's graph, and its tangent, without.

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


def push(primal_rule: Callable[..., Tensor], tangent_rule: Callable[..., Tensor], *args: Any) -> Any:
    """Apply an op to tensors, or to duals, with plain PyTorch.

    Args:
        primal_rule: (*primals) -> output.
        tangent_rule: (*primals, *tangents) -> output tangent, called on the trailing rows alone.
        *args: all `Tensor` or all `Dual`.
    """
    if not isinstance(args[0], Dual):
        return primal_rule(*args)
    output = primal_rule(*(a.primal for a in args))
    with torch.no_grad():
        rows = [a.primal.detach()[a.primal.shape[0] - a.tangent.shape[0] :] for a in args]
        return Dual(output, tangent_rule(*rows, *(a.tangent for a in args)))


def push_fused(
    primal: Callable[..., tuple[Tensor, ...]], dual: Callable[..., tuple[Tensor, ...]], *args: Any
) -> tuple[Any, ...]:
    """Apply an op to tensors, or to duals, with kernels that compute output and tangent in one pass.

    Under `torch.func.jvp` and `torch.autograd.forward_ad` plain tensors may be duals of PyTorch's own: they are
    taken apart, go through the dual kernel, and are put together again.

    Args:
        primal: (*primals) -> outputs.
        dual: (*primals, *tangents) -> (*outputs, *output tangents).
        *args: all `Tensor` or all `Dual`.

    Returns:
        The outputs, each a `Tensor` or a `Dual` as the arguments are.
    """
    if isinstance(args[0], Dual):
        outputs = dual(*(a.primal for a in args), *(a.tangent.detach() for a in args))
        half = len(outputs) // 2
        return tuple(Dual(o, do.detach()) for o, do in zip(outputs[:half], outputs[half:], strict=True))
    if fwad._current_level < 0:
        return primal(*args)
    pairs = [fwad.unpack_dual(a) for a in args]
    if all(pair.tangent is None for pair in pairs):
        return primal(*args)
    tangents = [torch.zeros_like(p.primal) if p.tangent is None else p.tangent.contiguous() for p in pairs]
    outputs = dual(*(p.primal for p in pairs), *tangents)
    half = len(outputs) // 2
    return tuple(fwad.make_dual(o, do.detach()) for o, do in zip(outputs[:half], outputs[half:], strict=True))


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


def primal_of(x: Tensor | Dual) -> Tensor:
    return x.primal if isinstance(x, Dual) else x


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which norms, softmax and activations are computed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
