"""Images to posteriors of latents: DALI decodes them, they are cropped as ADM crops, and the VAE encodes them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mfengine.data.sources import Source
from mfengine.data.vae import VAE
from mfengine.data.writer import Broken
from mfengine.errors import InputError

READERS = 16  # files that are read at the same time: disks on a network answer slowly, but many at once


class EncodedImages:
    """The images of a source as samples for `write_dataset`: moments of each image and of its mirror image.

    While a batch is encoded the next one is read and decoded. Batches are cut from what a shard holds, so they are the
    same for any number of ranks.

    Args:
        name: of the data set.
        source: the images.
        vae: encodes them.
        size: of the square that is cut from them, in pixels.
        batch: images encoded at a time.
        device: where images are decoded and cropped.
        num_classes: labels are 0 to this less 1; the highest one there says it if None.

    Raises:
        InputError: the VAE takes no images of this size, or a label is beyond the classes.
    """

    flips = 2

    def __init__(
        self,
        name: str,
        source: Source,
        vae: VAE,
        size: int,
        batch: int,
        device: torch.device,
        num_classes: int | None = None,
    ) -> None:
        self.name, self.class_names = name, source.class_names
        highest = int(source.labels.max())
        if num_classes is not None and highest >= num_classes:
            raise InputError(f"the highest label is {highest}: --num-classes must be at least {highest + 1}")
        self.space = vae.space(size, num_classes or highest + 1)
        self.provenance = {
            "source": source.kind,
            "images": len(source.names),
            "fingerprint": source.fingerprint,
            "crop": "ADM",
            "size": size,
            "precision": vae.precision,
            "vae": {"name": vae.name, "sha256": vae.sha256()},
        }
        self._source, self._vae, self._size, self._batch = source, vae, size, batch
        self._decoder = ImageDecoder(device, batch)

    def __len__(self) -> int:
        return len(self._source.names)

    def read(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, int] | Broken]:
        batches = [indices[i : i + self._batch].tolist() for i in range(0, len(indices), self._batch)]
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(READERS) as readers:
            coming = ahead.submit(self._load, batches[0], readers)
            for i, batch in enumerate(batches):
                images = coming.result()
                if i + 1 < len(batches):
                    coming = ahead.submit(self._load, batches[i + 1], readers)
                moments = iter(self._encode([image for image in images if isinstance(image, Tensor)]))
                for index, image in zip(batch, images, strict=True):
                    if isinstance(image, str):
                        yield Broken(self._source.names[index], image)
                        continue
                    sample = next(moments)
                    if np.isfinite(sample).all():
                        yield sample, int(self._source.labels[index])
                    else:
                        yield Broken(self._source.names[index], "its latents are not finite in float16")

    def _load(self, indices: list[int], readers: ThreadPoolExecutor) -> list[Tensor | str]:
        """Cropped images (3, size, size) uint8; in the place of those that cannot be read, the reason."""

        def read(index: int) -> bytes | str:
            try:
                return self._source.read(index) or "there is nothing in it"
            except OSError as error:
                return error.strerror or str(error)

        images = self._decoder([*readers.map(read, indices)])
        return [image if isinstance(image, str) else adm_crop(image, self._size) for image in images]

    def _encode(self, images: list[Tensor]) -> np.ndarray:
        """Moments (n, 2, 2, C, H, W) float16: for image and mirror image, mean and standard deviation."""
        if not images:
            return np.empty(0)
        x = torch.stack(images).float() / 127.5 - 1
        moments = [torch.stack(self._vae.encode(flipped), 1) for flipped in (x, x.flip(-1))]
        return torch.stack(moments, 1).half().cpu().numpy()


# ----------------------------------------------------------------------------
# Decoding.


class ImageDecoder:
    """Decodes JPEG, PNG and WebP with DALI: by the GPU where there is one, else to PIL's very bytes.

    Images become RGB: of grey ones the channel is repeated, transparency is dropped, CMYK and palettes are converted,
    and 16 bits are scaled to 8. The orientation that EXIF gives is ignored, as ADM does.

    Args:
        device: where the images are wanted.
        batch: images at a time, at most.
    """

    def __init__(self, device: torch.device, batch: int) -> None:
        self._device, self._batch = device, batch
        self._pipeline: Any = None

    def __call__(self, encoded: list[bytes | str]) -> list[Tensor | str]:
        """Decode a batch.

        Args:
            encoded: images; a string is the reason why there is none, and is handed on.

        Returns:
            For each, (H, W, 3) uint8 on the device, or why it cannot be decoded.
        """
        there = [image for image in encoded if isinstance(image, bytes)]
        try:
            decoded: list[Tensor | str] = [*self._decode(there)]
        except RuntimeError:
            # DALI says no more than that one of them failed.
            decoded = [self._decode_one(image) for image in there]
        images = iter(decoded)
        return [image if isinstance(image, str) else next(images) for image in encoded]

    def _decode_one(self, image: bytes) -> Tensor | str:
        try:
            return self._decode([image])[0]
        except RuntimeError:
            return _reason(image)

    def _decode(self, images: list[bytes]) -> list[Tensor]:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        if not images:
            return []
        if self._pipeline is None:
            self._pipeline = _decoding(self._device, self._batch)
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(image, np.uint8) for image in images])
            (batch,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # it cannot be run again
            raise
        decoded = []
        for image in batch:
            decoded.append(torch.empty(tuple(image.shape()), dtype=torch.uint8, device=self._device))
            feed_ndarray(image, decoded[-1])
        return decoded


def _decoding(device: torch.device, batch: int) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    @pipeline_def(
        batch_size=batch,
        num_threads=max(1, min(16, cores)),
        device_id=device.index if gpu else None,  # type: ignore[arg-type]
        prefetch_queue_depth=1,
    )
    def pipeline() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        return fn.decoders.image(
            encoded,
            device="mixed" if gpu else "cpu",
            output_type=types.DALIImageType.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as libjpeg does
        )

    pipe = pipeline()
    pipe.build()
    return pipe


def _reason(image: bytes) -> str:
    """Why an image cannot be decoded; PIL knows more than DALI says."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            return f"DALI does not decode this {opened.format} of mode {opened.mode}"
    except Image.UnidentifiedImageError:
        return f"not an image that is known: its {len(image)} bytes begin with {image[:8]!r}"
    except Exception as error:
        return str(error).partition("\n")[0]


# ----------------------------------------------------------------------------
# ADM's crop (`center_crop_arr` of Dhariwal and Nichol, arXiv 2105.05233): halve with a box filter while the shorter
# side is at least twice the size, scale it to the size with a bicubic one, and cut out the middle. PIL filters rows
# first and rounds to 8 bits in between, which is followed; the rest differs by float32 from PIL's fixed point. Where an
# image is more than twice as tall as wide, Pillow 13 filters columns first; here it is always rows.


def adm_crop(image: Tensor, size: int) -> Tensor:
    """The middle of an image, as large as it will be.

    Args:
        image: (H, W, 3) uint8; a smaller one than `size` is enlarged.
        size: of the result, in pixels.

    Returns:
        (3, size, size) uint8, on the image's device.
    """
    x = image.permute(2, 0, 1)
    height, width = x.shape[1:]
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        x = _resize(x, height, width, "box")
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    return _resize(x, height, width, "bicubic", size)


def _resize(x: Tensor, height: int, width: int, kind: str, middle: int | None = None) -> Tensor:
    """Resize (3, H, W) uint8 as PIL does; only a square in the middle of the result, if its size is given."""
    for side in (width, height):
        before, x = x.shape[2], x.transpose(1, 2)  # rows become columns, so after both sides they are rows again
        first, count = (0, side) if middle is None else ((side - middle) // 2, middle)
        if before == side:
            x = x[:, first : first + count]
            continue
        places, weights = (part[first : first + count].to(x.device) for part in _taps(before, side, kind))
        taps = x[:, places.flatten()].unflatten(1, places.shape)  # (3, count, taps, other side)
        x = torch.einsum("cntw,nt->cnw", taps.float(), weights).add(0.5).floor().clamp(0, 255).byte()
    return x


FILTERS: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    # name: (support, weight at a distance), in pixels of the larger scale
    "box": (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).astype(float)),
    "bicubic": (  # a = -0.5
        2.0,
        lambda x: np.where(
            abs(x) < 1, (1.5 * abs(x) - 2.5) * x**2 + 1, ((-0.5 * abs(x) + 2.5) * abs(x) - 4) * abs(x) + 2
        ),
    ),
}


@lru_cache(4096)
def _taps(before: int, after: int, kind: str) -> tuple[Tensor, Tensor]:
    """Which pixels of a line make a pixel of the resized one, and how much of each: (after, taps) int64 and float32."""
    support, weight = FILTERS[kind]
    scale = before / after
    reach = support * max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    low = np.maximum(centre - reach + 0.5, 0).astype(int)
    high = np.minimum(centre + reach + 0.5, before).astype(int)
    places = low[:, None] + np.arange((high - low).max())
    weights = weight((places - centre[:, None] + 0.5) / max(scale, 1.0)) * (places < high[:, None])
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(places.clip(max=before - 1)), torch.from_numpy(weights).float()
