"""For any PyTorch model: attention that works in forward mode, and fused layers in place of the model's own."""

from mfengine.backend.sdpa import jvp_attention
from mfengine.backend.swap import accelerate

__all__ = ["accelerate", "jvp_attention"]
