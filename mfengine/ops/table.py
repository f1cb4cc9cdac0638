"""One table of ops for tests, the static gate, benchmarks and `make gpu`; docs/ops.md says which it omits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mfengine.ops.activations import GELU, SWIGLU, gelu, silu, swiglu
from mfengine.ops.adaln import ADALN, EPS, RESIDUAL_ADALN, adaln_modulate, gated_residual_adaln
from mfengine.ops.attention import (
    ATTENTION,
    ATTENTION_PACKED,
    ROTARY_ATTENTION,
    attention,
    attention_packed,
    rotary_attention,
)
from mfengine.ops.dual import add
from mfengine.ops.linear import linear, packed_linear, sinusoid
from mfengine.ops.op import Op
from mfengine.ops.rmsnorm import EPS as RMS_EPS
from mfengine.ops.rmsnorm import RESIDUAL_RMS_NORM, RMS_NORM, gated_residual_rms_norm, rms_norm


class Shape(NamedTuple):
    """Shape of the tokens of a transformer."""

    batch: int
    tokens: int
    heads: int
    dim: int
    """channels of a head"""

    @property
    def width(self) -> int:
        return self.heads * self.dim


class New(Protocol):
    """Makes a tensor of a given size, in the dtype of the products, or float32 if `wide`, with values of its choice."""

    def __call__(self, *size: int, wide: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Example:
    """A call of an op, `function(*arguments)`, with strides and dtypes as in a network."""

    op: Op | None
    """its kernels, or None if it has none"""
    function: Callable[..., Any]
    """takes tensors or duals, and returns one output or a tuple of them"""
    arguments: tuple[Tensor, ...]
    options: tuple[Any, ...] = ()
    parameters: int = 0
    """how many of the last arguments are parameters, which have no rows"""

    @property
    def flops(self) -> tuple[int, int, int]:
        """FLOPs of the products of the forward, of the tangent of all rows, and of the backward."""
        if self.op is None or self.op.flops is None:
            return 0, 0, 0
        return self.op.flops(*(x.shape for x in self.arguments), *self.options)

    @property
    def bytes(self) -> tuple[int, int, int]:
        """Least bytes that the forward, the dual of all rows, and the backward read and write."""
        assert self.op is not None
        return self.op.bytes(*self.arguments, options=self.options)

    def double(self) -> Example:
        """The same call in float64. Under `use_backend("torch")`, it is the reference."""
        return replace(self, arguments=tuple(x.double() for x in self.arguments))


def _attention(s: Shape, new: New) -> Example:
    """Heads as views of one packed product."""
    q, k, v = new(s.batch, s.tokens, 3, s.heads, s.dim).permute(2, 0, 3, 1, 4).unbind(0)
    return Example(ATTENTION, attention, (q, k, v), (None, False, None))


def _attention_packed(s: Shape, new: New) -> Example:
    qkv = new(s.batch, s.tokens, 3 * s.width)
    return Example(ATTENTION_PACKED, partial(attention_packed, num_heads=s.heads), (qkv,), (s.heads, s.tokens))


def _adaln_modulate(s: Shape, new: New) -> Example:
    """A float32 residual stream; shift and scale are slices of one product."""
    shift, scale, *_ = new(s.batch, 6 * s.width).chunk(6, -1)
    return Example(ADALN, adaln_modulate, (new(s.batch, s.tokens, s.width, wide=True), shift, scale), (EPS,))


def _gated_residual_adaln(s: Shape, new: New) -> Example:
    x, y = new(s.batch, s.tokens, s.width, wide=True), new(s.batch, s.tokens, s.width)
    _, _, gate, shift, scale, _ = new(s.batch, 6 * s.width).chunk(6, -1)
    return Example(RESIDUAL_ADALN, gated_residual_adaln, (x, y, gate, shift, scale), (EPS,))


def _gelu(s: Shape, new: New) -> Example:
    """A product, and the float32 bias of its layer."""
    arguments = new(s.batch, s.tokens, 4 * s.width), new(4 * s.width, wide=True)
    return Example(GELU, gelu, arguments, parameters=1)


def _rms_norm(s: Shape, new: New) -> Example:
    arguments = new(s.batch, s.tokens, s.width), new(s.width, wide=True)
    return Example(RMS_NORM, rms_norm, arguments, (RMS_EPS, None), parameters=1)


def _gated_residual_rms_norm(s: Shape, new: New) -> Example:
    """A float32 residual stream; gate and weight are parameters."""
    x, y = new(s.batch, s.tokens, s.width, wide=True), new(s.batch, s.tokens, s.width)
    arguments = x, y, new(s.width, wide=True), new(s.width, wide=True)
    return Example(RESIDUAL_RMS_NORM, gated_residual_rms_norm, arguments, (RMS_EPS,), parameters=2)


def _rotary_attention(s: Shape, new: New) -> Example:
    arguments = new(s.batch, s.tokens, 3 * s.width), new(s.dim, wide=True), new(s.dim, wide=True)
    options = (s.heads, s.tokens, RMS_EPS)
    return Example(ROTARY_ATTENTION, partial(rotary_attention, num_heads=s.heads), arguments, options, parameters=2)


def _swiglu(s: Shape, new: New) -> Example:
    """Packed halves, each 8/3 of the width, padded to a multiple of 64."""
    half = -(-8 * s.width // 3 // 64) * 64
    return Example(SWIGLU, swiglu, (new(s.batch, s.tokens, 2 * half),))


def _packed_linear(s: Shape, new: New) -> Example:
    """Two layers, padded."""
    arguments = new(s.batch, s.tokens, s.width), *(new(s.width - 3, s.width, wide=True) for _ in range(2))
    return Example(None, lambda x, *weights: packed_linear(x, weights, 8), arguments, parameters=2)


def _linear(s: Shape, new: New) -> Example:
    arguments = new(s.batch, s.tokens, s.width), new(2 * s.width, s.width, wide=True), new(2 * s.width, wide=True)
    return Example(None, linear, arguments, parameters=2)


OPS: dict[str, Callable[[Shape, New], Example]] = {
    "attention": _attention,
    "attention_packed": _attention_packed,
    "adaln_modulate": _adaln_modulate,
    "gated_residual_adaln": _gated_residual_adaln,
    "gelu": _gelu,
    "rms_norm": _rms_norm,
    "gated_residual_rms_norm": _gated_residual_rms_norm,
    "rotary_attention": _rotary_attention,
    "swiglu": _swiglu,
    "linear": _linear,
    "packed_linear": _packed_linear,
    "silu": lambda s, new: Example(None, silu, (new(s.batch, s.width),)),
    "sinusoid": lambda s, new: Example(None, partial(sinusoid, dim=256), (new(s.batch, wide=True),)),
    "add": lambda s, new: Example(None, add, (new(s.batch, s.width), new(s.batch, s.width))),
}
"""op name -> function that makes an example for a shape"""

SHAPES = {
    "xl2": Shape(32, 256, 16, 72),
    "b2": Shape(32, 256, 12, 64),
    "imf": Shape(32, 276, 16, 64),
    "odd": Shape(2, 17, 2, 24),
}


def random_tensors(dtype: torch.dtype, device: torch.device | str, generator: torch.Generator | None = None) -> New:
    """Standard normal tensors, drawn on the host, so that all devices get the same values."""

    def new(*size: int, wide: bool = False) -> Tensor:
        x = torch.randn(size, generator=generator)
        return x.to(device, torch.float32 if wide else dtype)

    return new
