"""Weights of other projects: the public name of `mfengine.networks.convert`."""

from mfengine.networks.convert import from_jax, from_sit

__all__ = ["from_jax", "from_sit"]
