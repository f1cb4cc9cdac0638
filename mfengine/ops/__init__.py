"""Differentiable ops: forward and backward by autograd, and an explicit tangent for `Dual` arguments.

Given tensors, an op returns a tensor and works with autograd, `torch.func.jvp`, `torch.autograd.forward_ad` and
`torch.compile`. Given a dual (`Dual`), it returns a dual: the same primal, and the tangent of the last rows. The
tangent is outside autograd unless the call is inside `differentiable_tangents`. On CUDA tensors, attention, adaLN,
RMSNorm, RoPE, GELU and SwiGLU run fused Triton kernels (`mfengine.kernels`), which compute output and tangent in one
pass. Plain PyTorch, the specification, runs elsewhere, in float64, and under `torch.func.vmap`, `grad` and nested
transforms. `use_backend` overrides the choice. Attention without a tangent is PyTorch's, unless `use_attention` names
another implementation. `OPS` lists all ops.
"""

from mfengine.ops.activations import gelu, silu, swiglu
from mfengine.ops.adaln import adaln_modulate, gated_residual_adaln
from mfengine.ops.attention import attention, attention_packed, attention_varlen, rotary_attention
from mfengine.ops.backend import use_backend
from mfengine.ops.choice import use_attention
from mfengine.ops.chunk import chunk, clone, last_tokens
from mfengine.ops.dual import Dual, add, differentiable_tangents, linear_map
from mfengine.ops.linear import fixed_weights, linear, packed_linear, sinusoid
from mfengine.ops.node import one_node
from mfengine.ops.rmsnorm import gated_residual_rms_norm, rms_norm
from mfengine.ops.table import OPS

__all__ = [
    "OPS",
    "Dual",
    "adaln_modulate",
    "add",
    "attention",
    "attention_packed",
    "attention_varlen",
    "chunk",
    "clone",
    "differentiable_tangents",
    "fixed_weights",
    "gated_residual_adaln",
    "gated_residual_rms_norm",
    "gelu",
    "last_tokens",
    "linear",
    "linear_map",
    "one_node",
    "packed_linear",
    "rms_norm",
    "rotary_attention",
    "silu",
    "sinusoid",
    "swiglu",
    "use_attention",
    "use_backend",
]
