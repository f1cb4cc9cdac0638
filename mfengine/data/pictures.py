"""Latents as images without a decoder, and grids of images as files; `mfengine.data.vae` has a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mfengine.data.format import LatentSpace
from mfengine.files import write_atomic, writing

GRID = 8  # rows and columns of a run's pictures
MIN_SIZE = 480  # pixels of the longer side of a picture


def draw_latents(latents: Tensor, space: LatentSpace) -> Tensor:
    """Images of latents without a decoder.

    Args:
        latents: (B, C, H, W) float32, as the network sees them.
        space: theirs. Where they are pixels they are shown as such; otherwise the first three channels are,
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


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Lay out images (B, C, H, W) in rows, as near to a square as can be, with a margin: (C, H', W')."""
    count, channels, height, width = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    margin = max(1, height // 16)
    grid = images.new_ones(channels, rows * (height + margin) + margin, columns * (width + margin) + margin)
    for i, image in enumerate(images):
        top, left = margin + i // columns * (height + margin), margin + i % columns * (width + margin)
        grid[:, top : top + height, left : left + width] = image
    return grid


def strip_over_time(pictures: Sequence[Path]) -> Tensor | None:
    """The first column of each square grid of pictures, side by side, as one image (3, H, W) in [0, 1].

    Args:
        pictures: files of grids as `image_grid` lays out `GRID`^2 images, in order. Those of another size than the last
            one are left out.
    """
    columns = []
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        columns.append(torch.from_numpy(pixels[:, : pixels.shape[1] // GRID].copy()).permute(2, 0, 1) / 255)
    columns = [column for column in columns if column.shape == columns[-1].shape]
    return torch.cat(columns, 2) if columns else None


def enlarged(image: Tensor) -> Tensor:
    """An image (C, H, W), if it is small, enlarged by a whole factor."""
    factor = max(1, MIN_SIZE // max(image.shape[1:]))
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def save_picture(image: Tensor, path: Path) -> None:
    """Write an image (C, H, W) in [0, 1] as PNG, small ones enlarged by a whole factor; InputError if that fails."""
    pixels = (enlarged(image).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, Image.fromarray(pixels).save)
