"""The network."""

from mfengine.networks.dit import DiT, ModelConfig

__all__ = ["DiT", "ModelConfig"]
