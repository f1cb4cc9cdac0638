"""Sampling from the average velocity (arXiv 2505.13447, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mfengine.networks.velocity import AnyNetwork


@torch.no_grad()
def sample(model: AnyNetwork, noise: Tensor, labels: Tensor, steps: int = 1) -> Tensor:
    """z <- z - (t - r) u(z, t, t - r, y), from t = 1 to 0 in equal steps.

    Args:
        model: u(z, t, h, y).
        noise: (B, C, H, W) float32, standard normal.
        labels: (B,) int64.
        steps: network evaluations, at least 1.

    Returns:
        (B, C, H, W) float32 latents.

    Raises:
        ValueError: steps is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    z, h = noise, noise.new_full((noise.shape[0],), 1 / steps)
    for step in range(steps):
        t = noise.new_full((noise.shape[0],), 1 - step / steps)
        z = z - h[:, None, None, None] * model(z, t, h, labels)
    return z
