"""Imports of latents that other projects prepared: one file per format.

All formats hold the unscaled output of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mfengine.data.format import DESCRIPTION, LatentSpace
from mfengine.data.importers.base import Importer, SampleError
from mfengine.data.importers.lmdb import LMDBImporter
from mfengine.data.importers.npy import NPYImporter
from mfengine.data.importers.pt import PTImporter
from mfengine.data.normalisation import CHANNELS, PUBLISHED
from mfengine.data.writer import Broken
from mfengine.errors import InputError

IMPORTERS: tuple[type[Importer], ...] = (LMDBImporter, NPYImporter, PTImporter)
"""In this order: the first importer that recognises a path takes it."""

PROBES = 8  # unreadable samples after which a source is rejected


class ImportedSamples:
    """The samples of a source, for `write_dataset`. All have the shape of the first readable one.

    Args:
        path: the source.
        num_classes: None takes the number from the source.
        scale: latents are (mean + std normal - bias) scale; None takes the scale of Stable Diffusion's VAE.
        bias: see scale.

    Raises:
        InputError: the format is unknown, the first samples are unusable, or the number of classes or the scale is
            unknown.
    """

    class_names: tuple[str, ...] = ()

    def __init__(
        self, path: Path, num_classes: int | None = None, scale: float | None = None, bias: float = 0.0
    ) -> None:
        self._source = source = open_importer(path)
        if source.count == 0:
            raise InputError(f"{path} has no samples")
        self.name = path.resolve().name
        num_classes = num_classes or source.num_classes
        if num_classes is None:
            raise InputError(f"{path} does not give the number of classes: add --num-classes (1000 for ImageNet)")
        self.flips, self._shape = self._find_shape()
        channels, height, width = self._shape[0] // 2, *self._shape[1:]
        if scale is None and channels != CHANNELS:
            raise InputError(
                f"latents with {channels} channels are not from Stable Diffusion's VAE: add --scale, or "
                "--normalisation measured"
            )
        self.space = LatentSpace((channels, height, width), num_classes, scale or PUBLISHED["sd"][0], bias)
        self.provenance = {"format": source.format, "source": self.name, "fingerprint": source.fingerprint}

    def _find_shape(self) -> tuple[int, tuple[int, ...]]:
        """Flips and shape (2 C, H, W) of the first readable sample."""
        reasons = []
        for i in range(min(PROBES, self._source.count)):
            try:
                arrays, _ = self._source.load(i)
                self.flips, self._shape = len(arrays), arrays[0].shape
                if len(self._shape) != 3 or self._shape[0] % 2:
                    raise SampleError(f"its shape is {self._shape}, not (2 C, H, W) with mean and standard deviation")
                self._moments(arrays)
                return self.flips, self._shape
            except SampleError as reason:
                reasons.append(f"{self._source.name_of(i)}: {reason}")
        raise InputError(reasons[0])

    def __len__(self) -> int:
        return self._source.count

    def read(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, int] | Broken]:
        """Moments (flips, 2, C, H, W) float16 and label for each index, or Broken."""
        for i in map(int, indices):
            try:
                arrays, label = self._source.load(i)
                yield self._moments(arrays), _label(label)
            except SampleError as reason:
                yield Broken(self._source.name_of(i), str(reason))

    def _moments(self, arrays: list[np.ndarray]) -> np.ndarray:
        if len(arrays) != self.flips or any(array.shape != self._shape for array in arrays):
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise SampleError(f"it has shapes {shapes}, not {self.flips} of {self._shape} like the first sample")
        with np.errstate(over="ignore"):
            moments = np.stack(arrays).astype(np.float16)
        moments = moments.reshape(self.flips, 2, self._shape[0] // 2, *self._shape[1:])
        if not np.isfinite(moments).all():
            raise SampleError("not all values are finite in float16")
        if (moments[:, 1] < 0).any():
            raise SampleError("the second half of the channels has negative values, so it is not a standard deviation")
        return moments


def _label(value: Any) -> int:
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.empty(0)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise SampleError(f"its label is {value!s:.60}, not one integer")
    return int(array.item())


def open_importer(path: Path) -> Importer:
    """The importer that recognises a file or folder; InputError if none does."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    for importer in IMPORTERS:
        if importer.recognises(path):
            return importer(path)
    raise InputError(
        f"{path} cannot be imported: it must be an LMDB (data.mdb), a folder of .pt files, or a folder or zip of "
        f".npy files with {DESCRIPTION}"
    )
