"""Latents as pictures, without a decoder; `engine/vae.py` has one."""

from __future__ import annotations

from torch import Tensor

from mfengine.engine.data import LatentSpace


def draw_latents(latents: Tensor, space: LatentSpace) -> Tensor:
    """Images of latents without a decoder.

    Args:
        latents: (B, C, H, W) float32, as the network sees them.
        space: what they mean. Where they are pixels they are shown as such; otherwise the first three channels are,
            from -3 to 3 standard deviations.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    if space.pixel_range is not None:
        black, white = space.pixel_range
        images = (space.unscale(latents) - black) / (white - black)
    else:
        images = (latents + 3) / 6
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return images.clamp(0, 1)
