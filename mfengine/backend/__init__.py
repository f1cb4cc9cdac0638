"""For other people's models: attention that works in forward mode, and our layers in place of theirs."""

from mfengine.backend.sdpa import jvp_attention
from mfengine.backend.swap import accelerate

__all__ = ["accelerate", "jvp_attention"]
