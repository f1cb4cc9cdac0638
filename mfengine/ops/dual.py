"""Duals: a primal with its tangent, carried through the network without autograd.

Only interval rows (r < t) need a tangent, and they are the last rows of every batch. A `Dual` therefore holds
the primal of all rows and the tangent of the last ones. MeanFlow never differentiates the tangent, so every
tangent rule runs without a graph and saves nothing, unless inside `differentiable_tangents`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mfengine.torch_private import in_forward_mode


class Dual(NamedTuple):
    """A primal of B rows with the tangent of its last K <= B rows.

    Rows are samples. In (B * N, D), each token is a row, and the tangent is (K * N, D).
    Ops take duals instead of tensors, all with the same K, and return a dual if any argument is one: the output, with
    autograd's graph, and its tangent, a constant unless inside `differentiable_tangents`. A tensor argument has no
    tangent. Parameters, such as a bias, have no rows; their tangents have their full shape.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, silu
        >>> x = torch.randn(4, 8, requires_grad=True)
        >>> y, dy = silu(Dual(x, torch.ones(1, 8)))
        >>> y.requires_grad, dy.requires_grad
        (True, False)
    """

    primal: Tensor  # (B, ...)
    tangent: Tensor  # (K, ...), for primal[B - K:]


_differentiable: bool | None = None


@contextmanager
def differentiable_tangents(mode: bool = True) -> Iterator[None]:
    """Choose whether gradients flow through the tangents that ops return, inside the context.

    Outside of it, tangents of explicit duals are constants, and those of PyTorch's forward mode are differentiable. The
    context of the op's call counts, not that of the backward. An op that is to be differentiated also saves its
    tangents.

    Args:
        mode: True makes tangents of explicit duals differentiable. False keeps fused ops from saving tangents in
            forward mode; a gradient that reaches one raises a `RuntimeError`.

    Example:
        >>> import torch
        >>> from mfengine.ops import Dual, differentiable_tangents, silu
        >>> x = torch.randn(4, 8, requires_grad=True)
        >>> with differentiable_tangents():
        ...     y, dy = silu(Dual(x, torch.ones(4, 8)))
        >>> dy.square().mean().backward()
        >>> x.grad.shape
        torch.Size([4, 8])
    """
    global _differentiable
    before, _differentiable = _differentiable, mode
    try:
        yield
    finally:
        _differentiable = before


def differentiable(explicit: bool) -> bool:
    """Whether autograd differentiates the tangents of explicit duals, or of PyTorch's forward mode."""
    return not explicit if _differentiable is None else _differentiable


def through_forward_mode() -> bool:
    """Whether a gradient may reach a tangent of PyTorch's forward mode."""
    return in_forward_mode() and torch.is_grad_enabled() and differentiable(explicit=False)


def tangent_graph() -> AbstractContextManager[Any]:
    """Wraps the computation of an explicit dual's tangent: it keeps a graph only if one was requested."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and differentiable(explicit=True))


A = TypeVar("A", Tensor, Dual)
"""Arguments and results of an op: tensors give a tensor, duals give a dual."""


def push(
    primal_rule: Callable[..., Tensor], tangent_rule: Callable[..., Tensor], *args: Any, parameters: int = 0
) -> Any:
    """Apply an op to tensors, or to tensors and duals, with plain PyTorch.

    Args:
        primal_rule: (*primals) -> output.
        tangent_rule: (*primals, *tangents) -> output tangent. It gets only the last rows, and tangents from `complete`.
        *args: `Tensor` or `Dual`.
        parameters: how many of the last arguments are parameters.
    """
    if not any(isinstance(a, Dual) for a in args):
        return primal_rule(*args)
    primals = [primal_of(a) for a in args]
    output = primal_rule(*primals)
    with tangent_graph():
        tangents = complete(primals, [tangent_of(a) for a in args], parameters)
        rows = len(primals) - parameters
        pairs = zip(primals[:rows], tangents[:rows], strict=True)
        last = [x if len(x) == len(dx) else x[len(x) - len(dx) :] for x, dx in pairs]
        return Dual(output, tangent_rule(*last, *primals[rows:], *tangents))


def complete(primals: Sequence[Tensor], tangents: Sequence[Tensor | None], parameters: int = 0) -> list[Any]:
    """Tangents of the same share of the rows: zeros if an argument has none, but None for parameters, which come last.

    Raises:
        ValueError: tangents have different shares of the rows.
    """
    rows = len(primals) - parameters
    pairs = [*zip(primals[:rows], tangents[:rows], strict=True)]
    whole, part = next(((len(x), len(t)) for x, t in pairs if t is not None), (1, 1))
    for x, t in pairs:
        if t is not None and len(t) * whole != len(x) * part:
            raise ValueError(f"tangents must have the same number of rows, not {part} and {len(t)}")

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(len(x) * part // max(whole, 1), *x.shape[1:])

    return [*(zeros(x) if t is None else t for x, t in pairs), *tangents[rows:]]


def linear_map(f: Callable[[Tensor], Tensor], x: A) -> A:
    """Apply a linear function without parameters (a reshape, a cast, a slice): its own JVP."""
    if isinstance(x, Dual):
        with tangent_graph():
            tangent = f(x.tangent)
        return Dual(f(x.primal), tangent)
    return f(x)


def add(x: A, y: A) -> A:
    """x + y, where y has the shape of x, or is a tensor that broadcasts to it. The wider dtype wins."""
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
