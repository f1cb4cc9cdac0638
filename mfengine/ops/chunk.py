"""Parts of a tensor or a dual, and copies of parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.dual import A, Dual, linear_map, primal_of
from mfengine.ops.node import recording


def chunk(x: A, chunks: int) -> tuple[A, ...]:
    """Split the last dimension into equal parts."""
    parts = primal_of(x).chunk(chunks, -1)
    if (tape := recording()) is not None:
        tape.record(_gradient, (primal_of(x),), parts, ())
    if isinstance(x, Dual):
        return tuple(map(Dual, parts, x.tangent.chunk(chunks, -1)))
    return parts


def last_tokens(x: A, num_tokens: int, count: int) -> A:
    """The last tokens of each sample.

    Args:
        x: (B * num_tokens, D); or a dual, with a tangent (K * num_tokens, D) of its last K samples.
        num_tokens: tokens of a sample.
        count: how many to keep, at most num_tokens.

    Returns:
        (B * count, D); for a dual the same with a tangent. x itself if all are kept.
    """
    if count == num_tokens:
        return x
    first = num_tokens - count
    last = linear_map(lambda x: x.unflatten(0, (-1, num_tokens))[:, first:].flatten(0, 1), x)
    if (tape := recording()) is not None:
        tape.record(_padded, (primal_of(x),), (primal_of(last),), (), (first, count))
    return last


def clone(p: Tensor) -> Tensor:
    """A copy of a parameter that passes its gradient on, for a block to return.

    FSDP2 frees the parameter itself at the end of the block.
    """
    copy = p.clone()
    if (tape := recording()) is not None:
        tape.record(_same, (p,), (copy,), ())
    return copy


def _padded(gradient: Tensor, first: int, count: int) -> tuple[Tensor]:
    return (F.pad(gradient.unflatten(0, (-1, count)), (0, 0, first, 0)).flatten(0, 1),)


def _same(gradient: Tensor) -> tuple[Tensor]:
    return (gradient,)


def _gradient(*gradients: Tensor | None) -> tuple[Tensor]:
    some = next(g for g in gradients if g is not None)
    return (torch.cat([torch.zeros_like(some) if g is None else g for g in gradients], -1),)
