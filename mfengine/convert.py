"""Weights of other projects: the public name of `mfengine.networks.convert`."""

from mfengine.networks.convert import from_imf, from_jax, from_jax_imf, from_sit, to_imf

__all__ = ["from_imf", "from_jax", "from_jax_imf", "from_sit", "to_imf"]
