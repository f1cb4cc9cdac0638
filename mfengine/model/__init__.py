"""The network."""

from mfengine.model.transformer import DiT, ModelConfig

__all__ = ["DiT", "ModelConfig"]
