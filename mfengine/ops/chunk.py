"""Equal parts of a tensor or a dual, and copies of parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from mfengine.ops.dual import A, Dual, primal_of
from mfengine.ops.node import recording


def chunk(x: A, chunks: int) -> tuple[A, ...]:
    """Split the last dimension into equal parts."""
    parts = primal_of(x).chunk(chunks, -1)
    if (tape := recording()) is not None:
        tape.record(_gradient, (primal_of(x),), parts, ())
    if isinstance(x, Dual):
        return tuple(map(Dual, parts, x.tangent.chunk(chunks, -1)))
    return parts


def clone(p: Tensor) -> Tensor:
    """A copy of a parameter, whose gradient is the parameter's: for what a block returns.

    FSDP2 frees the parameter itself when the block has ended.
    """
    copy = p.clone()
    if (tape := recording()) is not None:
        tape.record(_same, (p,), (copy,), ())
    return copy


def _same(gradient: Tensor) -> tuple[Tensor]:
    return (gradient,)


def _gradient(*gradients: Tensor | None) -> tuple[Tensor]:
    some = next(g for g in gradients if g is not None)
    return (torch.cat([torch.zeros_like(some) if g is None else g for g in gradients], -1),)
