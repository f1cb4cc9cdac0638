"""Images to posteriors of latents: PIL decodes and crops them on the host, as in ADM, and the VAE encodes them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from mfengine.data.image_files import open_rgb
from mfengine.data.sources import Source
from mfengine.data.vae import VAE
from mfengine.data.writer import Broken
from mfengine.device import to_device
from mfengine.errors import InputError

THREADS = 16  # to read, decode and crop: PIL releases Python's lock, and network disks serve many readers at once


@dataclass
class EncodedImages:
    """The images of a source as samples for `write_dataset`: moments of each image and its mirror image.

    While one batch is encoded, the next is read, decoded and cropped. Batches are cut from the indices of a shard, so
    they do not depend on the number of ranks.

    Args:
        name: name of the data set.
        source: the images.
        vae: the encoder.
        size: side of the square cut from each image, in pixels.
        batch: images encoded at a time.
        num_classes: labels are 0 to num_classes - 1; None takes the highest label that occurs.

    Raises:
        InputError: the VAE does not take images of this size, or a label is not below num_classes.
    """

    name: str
    source: Source
    vae: VAE
    size: int
    batch: int
    num_classes: int | None = None
    flips: ClassVar[int] = 2

    def __post_init__(self) -> None:
        source, vae = self.source, self.vae
        highest = int(source.labels.max())
        if self.num_classes is not None and highest >= self.num_classes:
            raise InputError(f"the highest label is {highest}: --num-classes must be at least {highest + 1}")
        self.class_names = source.class_names
        self.space = vae.space(self.size, self.num_classes or highest + 1)
        self.provenance = {
            "source": source.kind,
            "images": len(source.names),
            "fingerprint": source.fingerprint,
            "crop": "ADM",
            "size": self.size,
            "precision": vae.precision,
            "vae": {"name": vae.name, "sha256": vae.sha256()},
        }

    def __len__(self) -> int:
        return len(self.source.names)

    def read(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, int] | Broken]:
        batches = [indices[i : i + self.batch].tolist() for i in range(0, len(indices), self.batch)]
        with ThreadPoolExecutor(THREADS) as pool:
            ahead = pool.map(self._load, batches[0])
            for batch, following in zip(batches, [*batches[1:], []], strict=True):
                images = [*ahead]
                ahead = pool.map(self._load, following)
                moments = iter(self._encode([image for image in images if isinstance(image, np.ndarray)]))
                for index, image in zip(batch, images, strict=True):
                    if isinstance(image, str):
                        yield Broken(self.source.names[index], image)
                        continue
                    sample = next(moments)
                    if np.isfinite(sample).all():
                        yield sample, int(self.source.labels[index])
                    else:
                        yield Broken(self.source.names[index], "its latents are not finite in float16")

    def _load(self, index: int) -> np.ndarray | str:
        """A cropped image (size, size, 3) uint8, or why it cannot be read."""
        try:
            encoded = self.source.read(index)
        except OSError as error:
            return error.strerror or str(error)
        try:
            return adm_crop(open_rgb(io.BytesIO(encoded)), self.size)
        except Image.UnidentifiedImageError:
            return f"not an image of a known format: its {len(encoded)} bytes begin with {encoded[:8]!r}"
        except Exception as error:  # Pillow raises many kinds for a broken file
            return str(error).partition("\n")[0] or repr(error)

    def _encode(self, images: list[np.ndarray]) -> np.ndarray:
        """Moments (n, 2, 2, C, H, W) float16: image and mirror image, mean and standard deviation."""
        if not images:
            return np.empty(0)
        pixels = to_device(torch.from_numpy(np.stack(images)), self.vae.device)
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        moments = [torch.stack(self.vae.encode(flipped), 1) for flipped in (x, x.flip(-1))]
        return torch.stack(moments, 1).half().cpu().numpy()


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The central square of an image, scaled as in ADM's training data (Dhariwal and Nichol, arXiv 2105.05233).

    A box filter halves the image while its shorter side is at least twice `size`. A bicubic filter then scales that
    side to `size`. Smaller images are enlarged.

    Args:
        image: an RGB image.
        size: side of the square, in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))
