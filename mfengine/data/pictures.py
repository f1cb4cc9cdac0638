"""Previews of latents without a decoder, and grids of images as files; `mfengine.data.vae` has a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mfengine.data.format import LatentSpace
from mfengine.files import write_atomic, writing

GRID = 8  # rows and columns of a run's pictures
MIN_SIZE = 480  # pixels of the longer side of a picture
CELL = 48  # least pixels of an image's longer side in a labelled grid


def draw_latents(latents: Tensor, space: LatentSpace) -> Tensor:
    """Preview latents as images, without a decoder.

    Args:
        latents: (B, C, H, W) float32, as the network sees them.
        space: their space. Pixels are shown as such. Of other latents, the first three channels are shown, from -3 to 3
            standard deviations.

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


def image_grid(images: Tensor) -> Tensor:
    """Arrange images (B, C, H, W) in rows, as close to a square as possible, with a margin: (C, H', W')."""
    count, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    margin = max(1, height // 16)
    grid = images.new_ones(channels, rows * (height + margin) + margin, columns * (width + margin) + margin)
    for i, image in enumerate(images):
        top, left = margin + i // columns * (height + margin), margin + i % columns * (width + margin)
        grid[:, top : top + height, left : left + width] = image
    return grid


def labelled_grid(blocks: Mapping[str, Tensor], columns: Sequence[str]) -> Image.Image:
    """Images with headings: one block of rows per entry, its name at the left, column names at the top.

    Small images are enlarged smoothly, by an integer factor.

    Args:
        blocks: images (B, 3, H, W) in [0, 1] by name, row by row, all of one size. The last row may be incomplete.
        columns: their names; a name wider than its column is cut off.
    """
    first = next(iter(blocks.values()))
    height, width = first.shape[2:]
    factor = max(1, -(-CELL // max(height, width)))
    height, width = height * factor, width * factor
    size = max(11, height // 8)
    font, line = ImageFont.load_default(size), round(size * 1.5)
    gap = max(1, height // 16)
    left = round(max(map(font.getlength, blocks))) + line
    rows = {name: -(-len(images) // len(columns)) for name, images in blocks.items()}
    total = line + sum(count * (height + gap) + line // 2 for count in rows.values())
    canvas = Image.new("RGB", (left + len(columns) * (width + gap), total), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(columns):
        while font.getlength(text) > width and text.strip("…"):
            text = f"{text.rstrip('…')[:-1]}…"
        draw.text((left + i * (width + gap) + width / 2, line / 2), text, "black", font, anchor="mm")
    top = line
    for name, images in blocks.items():
        draw.text((left - line / 2, top + rows[name] * (height + gap) / 2), name, "black", font, anchor="rm")
        for i, image in enumerate(images):
            cell = Image.fromarray(_pixels(image)).resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(cell, (left + i % len(columns) * (width + gap), top + i // len(columns) * (height + gap)))
        top += rows[name] * (height + gap) + line // 2
    return canvas


def strip_over_time(pictures: Sequence[Path]) -> Tensor | None:
    """The first column of each square grid of pictures, side by side, as one image (3, H, W) in [0, 1].

    Args:
        pictures: files of grids of `GRID`^2 images, as `image_grid` arranges them, in order. A picture is left out if
            its size differs from that of the last one.
    """
    columns = []
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        columns.append(torch.from_numpy(pixels[:, : pixels.shape[1] // GRID].copy()).permute(2, 0, 1) / 255)
    columns = [column for column in columns if column.shape == columns[-1].shape]
    return torch.cat(columns, 2) if columns else None


def enlarged(image: Tensor) -> Tensor:
    """An image (C, H, W), enlarged by an integer factor if it is small."""
    factor = max(1, MIN_SIZE // max(image.shape[1:]))
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def save_picture(image: Tensor, path: Path) -> None:
    """Write an image (C, H, W) in [0, 1] as PNG, enlarged by an integer factor if small; InputError if that fails."""
    write_picture(Image.fromarray(_pixels(enlarged(image))), path)


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, atomically; make its folder if needed; InputError if that fails."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, picture.save)


def _pixels(image: Tensor) -> np.ndarray:
    """An image (C, H, W) in [0, 1] as (H, W, C) uint8."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
