"""The VAE: images to the posteriors of their latents, and latents to images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mfengine.configs import from_json
from mfengine.data.format import LatentSpace
from mfengine.errors import InputError, RankError

Precision = Literal["float32", "bfloat16"]


class VAE:
    """An `AutoencoderKL` of the diffusers library.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        device: where it runs.
        precision: precision of convolutions and matrix products; weights stay float32.

    Raises:
        InputError: diffusers is not installed, or there is no such VAE.
    """

    def __init__(self, name: str | Path, device: torch.device, precision: Precision = "float32") -> None:
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise InputError("--vae needs the diffusers library: pip install 'mfengine[vae]'") from None
        folder = Path(name)
        if not folder.is_dir() and (folder.is_absolute() or str(name).startswith(".") or len(folder.parts) > 2):
            raise InputError(f"{name} is not a folder with a VAE in it")
        try:
            if not folder.is_dir():
                _ask_hub(str(name))
            vae = AutoencoderKL.from_pretrained(str(name), torch_dtype=torch.float32, low_cpu_mem_usage=False)
            self._vae = vae.to(device).eval()
        except Exception as error:  # the network, JSON and safetensors raise many kinds
            where = "" if folder.is_dir() else ", which is not a folder, from the hub"
            reason = " ".join(str(error).split())  # of one line or many
            raise InputError(f"cannot load the VAE {name}{where}: {reason:.300}") from None
        self.name, self.precision, self.device = str(name), precision, device
        config = self._vae.config
        self.channels: int = config.latent_channels
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        """pixels per latent position, along each side"""

    def space(self, size: int, num_classes: int) -> LatentSpace:
        """The space of its latents of square images.

        Args:
            size: side of the images, in pixels.
            num_classes: number of classes of the images.

        Raises:
            InputError: it does not take such images.
        """
        config = self._vae.config
        if config.in_channels != 3:
            raise InputError(f"the VAE {self.name} encodes images of {config.in_channels} channel(s); RGB has 3")
        if size < self.factor or size % self.factor:
            raise InputError(f"size {size} is not a multiple of {self.factor}, the pixels per latent of {self.name}")
        side = size // self.factor
        values = {"scale": config.scaling_factor, "bias": config.shift_factor or 0.0}
        return from_json(
            LatentSpace, {"shape": (self.channels, side, side), "num_classes": num_classes, **values}, self.name
        )

    def sha256(self) -> str:
        """Hash of its weights as float32, in the order of their names: independent of how files store them."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._vae.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(weight.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The posteriors of images' latents.

        Args:
            images: (B, 3, H', W') in [-1, 1].

        Returns:
            Mean and standard deviation, (B, C, H, W) float32 each, on the encoder's scale.

        Raises:
            RankError: the device has too little memory for the batch.
        """
        with self._computing(f"encode {len(images)} images"):
            posterior = self._vae.encode(images.to(self.device)).latent_dist
            return posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())

    def decode(self, latents: Tensor, space: LatentSpace) -> Tensor:
        """Images (B, 3, H', W') in [0, 1] of latents (B, C, H, W) as the network sees them.

        Raises:
            InputError: the latents have the wrong number of channels.
            RankError: the device has too little memory for the batch.
        """
        if latents.shape[1] != self.channels:
            raise InputError(f"the VAE has {self.channels} latent channels; the model has {latents.shape[1]}")
        with self._computing(f"decode {len(latents)} latents"):
            images = self._vae.decode(space.unscale(latents)).sample
            return ((images.float() + 1) / 2).clamp(0, 1)

    @contextmanager
    def _computing(self, task: str) -> Iterator[None]:
        try:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, self.precision == "bfloat16"):
                yield
        except torch.OutOfMemoryError:
            raise RankError(
                f"too little GPU memory to {task} at a time: choose a smaller batch, for example with --batch-size"
            ) from None


def _ask_hub(name: str) -> None:
    """Fail at once if the hub lacks the model or does not answer: diffusers would retry for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
