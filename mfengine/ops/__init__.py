"""Differentiable ops: forward and backward by autograd, and an explicit tangent for `Dual` arguments.

Given tensors, an op returns a tensor and works with autograd, `torch.func.jvp` and `torch.compile`. Given
duals, it returns a dual: the primal as before, and the tangent of the trailing rows outside autograd.
"""

from mfengine.ops.activations import gelu, silu
from mfengine.ops.adaln import adaln_modulate, gated_residual, gated_residual_adaln
from mfengine.ops.attention import attention, attention_packed
from mfengine.ops.dual import Dual, add, add_constant, chunk, linear_map
from mfengine.ops.linear import linear, sinusoid

__all__ = [
    "Dual",
    "adaln_modulate",
    "add",
    "add_constant",
    "attention",
    "attention_packed",
    "chunk",
    "gated_residual",
    "gated_residual_adaln",
    "gelu",
    "linear",
    "linear_map",
    "silu",
    "sinusoid",
]
