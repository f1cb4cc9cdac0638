"""Latents to images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mfengine.engine.data import LatentSpace
from mfengine.errors import InputError


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


class Decoder:
    """A VAE of the diffusers library.

    Args:
        name: a folder, or a name on the hub.
        device: where it runs.

    Raises:
        InputError: diffusers is not installed, or there is no such VAE.
    """

    def __init__(self, name: str | Path, device: torch.device) -> None:
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise InputError("--vae needs the diffusers library: pip install 'mfengine[vae]'") from None
        try:
            self._vae = AutoencoderKL.from_pretrained(str(name)).to(device).eval()
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the VAE {name}: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def __call__(self, latents: Tensor, space: LatentSpace) -> Tensor:
        """Images (B, 3, H', W') in [0, 1] of latents (B, C, H, W) as the network sees them."""
        channels = self._vae.config.latent_channels
        if latents.shape[1] != channels:
            raise InputError(f"the VAE has {channels} latent channels, the model {latents.shape[1]}")
        images = self._vae.decode(space.unscale(latents)).sample
        return ((images + 1) / 2).clamp(0, 1)
