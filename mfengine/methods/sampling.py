"""Sampling from the average velocity (arXiv 2505.13447, algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfengine.methods.intervals import column


@torch.no_grad()
def sample(model: Any, noise: Tensor, labels: Tensor, steps: int = 1, **conditions: float) -> Tensor:
    """z <- z - (t - r) u, from t = 1 to 0 in equal steps.

    Args:
        model: u(z, t, h, y), as `DiT`; where there are conditions, u(z, h, y, **conditions, heads="u"), as `IMFDiT`.
        noise: (B, C, H, W) float32, standard normal.
        labels: (B,) int64.
        steps: network evaluations, at least 1.
        conditions: additional inputs of the model, such as omega, t_min and t_max of an `IMFDiT`.

    Returns:
        (B, C, H, W) float32 latents.

    Raises:
        ValueError: steps is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")

    def rows(value: float) -> Tensor:
        return noise.new_full((noise.shape[0],), value)

    z, h = noise, rows(1 / steps)
    columns = {name: rows(value) for name, value in conditions.items()}
    for step in range(steps):
        t = rows(1 - step / steps)
        u = model(z, h, labels, **columns, heads="u") if conditions else model(z, t, h, labels)
        z = z - column(h) * u
    return z
