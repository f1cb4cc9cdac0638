"""The format of data sets of precomputed latents.

A data set is a folder of WebDataset tar shards, each with a DALI index (`.idx`), and `dataset.json`. A sample has
two raw components. `moments`, float16 (flips, 2, C, H, W), holds the mean and the standard deviation of the VAE's
posterior for the image and, if flips is 2, for its mirror image. `label` is one int32. Samples are shuffled when they
are written (`writer.py`), so a reader's shuffle buffer need not hold the whole set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfengine.configs import check_at_least, from_json, read_json
from mfengine.errors import InputError, RankError

DESCRIPTION = "dataset.json"
BROKEN = "broken.jsonl"  # samples that could not be read: name and reason of each
INDEX_VERSION = "v1.2"  # of DALI's WebDataset index


PerChannel = float | tuple[float, ...]
"""One number, or one per channel."""


@dataclass(frozen=True)
class LatentSpace:
    """The space of latents: all that a model needs to know about the data it was trained on."""

    shape: tuple[int, int, int]
    """(C, H, W)"""
    num_classes: int
    scale: PerChannel = 1.0
    """per channel: a latent is (posterior sample - bias) * scale"""
    bias: PerChannel = 0.0
    pixel_range: tuple[float, float] | None = None
    """if the unscaled latents are pixels: the values of black and white"""

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape must be (channels, height, width), not {self.shape}")
        check_at_least(1, num_classes=self.num_classes)
        for name in ("scale", "bias"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) and len(value) != self.shape[0]:
                raise ValueError(f"{name} must be a number, or one per channel ({self.shape[0]}), not {value}")
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must be finite, not {value}")
            if name == "scale" and 0 in values:
                raise ValueError("scale must not be 0")
        if self.pixel_range is not None and self.pixel_range[0] == self.pixel_range[1]:
            raise ValueError(f"pixel_range must be two different values, not {self.pixel_range}")

    def factors(self, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
        """Scale and bias for latents (B, C, H, W) on a device: numbers, or float32 tensors (C, 1, 1)."""
        scale, bias = (
            torch.tensor(value, device=device)[:, None, None] if isinstance(value, tuple) else value
            for value in (self.scale, self.bias)
        )
        return scale, bias

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents on the encoder's scale, from latents as the network sees them."""
        scale, bias = self.factors(latents.device)
        return latents / scale + bias


@dataclass(frozen=True)
class Shard:
    file: str
    count: int  # samples
    bytes: int
    sha256: str = ""  # of the tar; mfengine 0.1 did not record it

    def __post_init__(self) -> None:
        check_at_least(0, count=self.count, bytes=self.bytes)


@dataclass(frozen=True)
class Dataset:
    """A data set on disk, as `dataset.json` describes it."""

    folder: Path
    name: str
    space: LatentSpace
    flips: int  # 2 with mirror images, else 1
    count: int  # samples in all shards
    shards: tuple[Shard, ...]
    broken: int = 0  # unreadable samples, left out and listed in broken.jsonl
    class_counts: tuple[int, ...] = ()  # samples of each class
    class_names: tuple[str, ...] = ()  # in the order of the labels; () if unknown
    provenance: dict[str, Any] = field(default_factory=dict)  # where the samples come from, and how they were made

    def __post_init__(self) -> None:
        if self.flips not in (1, 2):
            raise ValueError(f"flips must be 1 or 2, not {self.flips}")
        if not self.shards:
            raise ValueError("shards must not be empty")
        if self.count != sum(shard.count for shard in self.shards):
            raise ValueError(f"count is {self.count} samples, but the shards do not add up to it")

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Read `dataset.json`, and check that every shard is there and whole.

        Raises:
            InputError: a file is missing, empty, truncated or contradicts the description.
        """
        dataset = cls.read(folder)
        for shard in dataset.shards:
            dataset.check_shard(shard)
        return dataset

    @classmethod
    def read(cls, folder: Path) -> Dataset:
        """Read `dataset.json` alone; InputError if it does not describe a data set."""
        path = folder / DESCRIPTION
        if not path.exists():
            hint = "see docs/data.md"
            if folder.name == "digits":
                hint = f"`python -m mfengine.prepare digits {folder}` writes it"
            if (folder / "checkpoints").is_dir():
                raise InputError(f"{folder} is a run folder, not a data set: it has no {DESCRIPTION}")
            raise InputError(f"{path} does not exist: {hint}")
        return from_json(cls, {**read_json(path), "folder": folder}, path)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each component of a sample."""
        return {"moments": 2 * self.flips * 2 * math.prod(self.space.shape), "label": 4}

    def check_shard(self, shard: Shard) -> None:
        """InputError unless the shard and its index exist and have the size and components described."""
        path = self.folder / shard.file
        if not path.is_file():
            raise InputError(f"shard {path} is missing")
        if path.stat().st_size != shard.bytes:
            raise InputError(f"shard {path} has {path.stat().st_size} bytes; {DESCRIPTION} says {shard.bytes}")
        index = path.with_suffix(".idx")
        if not index.is_file():
            raise InputError(f"index {index} is missing")
        try:
            with index.open() as lines:
                header, first = lines.readline().split(), lines.readline().split()
            found = dict(zip(first[::4], map(int, first[2::4]), strict=False)) if len(first) % 4 == 0 else first
        except ValueError:
            raise InputError(f"index {index} is damaged") from None
        if header != [INDEX_VERSION, str(shard.count)]:
            raise InputError(f"index {index} does not list the {shard.count} samples that {DESCRIPTION} says")
        if found != self.sizes:
            raise InputError(
                f"shard {path} holds {found} bytes per sample; shape {self.space.shape} with {self.flips} flip(s) "
                f"needs {self.sizes}"
            )

    def check_model(self, latent_shape: tuple[int, int, int], num_classes: int) -> None:
        """InputError unless a model of latents (C, H, W) and this many classes fits."""
        if latent_shape != self.space.shape:
            raise InputError(f"{self.folder} holds latents of {self.space.shape}; the model takes {latent_shape}")
        if num_classes != self.space.num_classes:
            raise InputError(
                f"{self.folder} has {self.space.num_classes} classes; --model.num-classes is {num_classes}"
            )

    def check_labels(self, lowest: int, highest: int) -> None:
        """RankError if labels read from the shards are not among the classes."""
        if lowest < 0 or highest >= self.space.num_classes:
            classes = f"0 to {self.space.num_classes - 1}, the classes in {DESCRIPTION}"
            raise RankError(f"{self.folder} has a label outside {classes}")


def read_means(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """All posterior means (count, C, H, W) float32, not flipped, on the encoder's scale, and labels (count,)."""
    _, means, labels = zip(*iterate_means(dataset), strict=True)
    return np.concatenate(means), np.concatenate(labels)


def iterate_means(
    dataset: Dataset, part: int = 0, num_parts: int = 1, batch: int = 4096
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Like `read_means`, but a few samples at a time.

    Args:
        dataset: the data set to read.
        part, num_parts: which of how many consecutive parts of the data to read.
        batch: the most samples to read at a time.

    Yields:
        Position of the first sample, means (n, C, H, W) float32 and labels (n,) int32.

    Raises:
        RankError: a shard cannot be read, has a label outside the classes, or has means that are not finite.
    """
    start, stop = (dataset.count * i // num_parts for i in (part, part + 1))
    size = 2 * math.prod(dataset.space.shape)  # bytes; the mean of the unflipped image comes first in the moments
    before = 0  # samples in the shards before this one
    for shard in dataset.shards:
        path = dataset.folder / shard.file
        rows = range(max(start, before) - before, min(stop, before + shard.count) - before)
        if rows:
            try:
                offsets = _read_index(path.with_suffix(".idx"))
                with path.open("rb") as file:
                    for first in rows[::batch]:
                        chosen = offsets[first : min(first + batch, rows.stop)]
                        means = b"".join(os.pread(file.fileno(), size, offset) for offset, _ in chosen)
                        labels = b"".join(os.pread(file.fileno(), 4, offset) for _, offset in chosen)
                        if (len(means), len(labels)) != (size * len(chosen), 4 * len(chosen)):
                            raise ValueError("it ends before the last sample in its index")
                        x = np.frombuffer(means, "<f2").reshape(len(chosen), *dataset.space.shape).astype(np.float32)
                        y = np.frombuffer(labels, "<i4").reshape(len(chosen))
                        dataset.check_labels(int(y.min()), int(y.max()))
                        if not np.isfinite(x).all():
                            raise ValueError("means that are not finite; `python -m mfengine.prepare check` finds them")
                        yield before + first, x, y
            except RankError:
                raise
            except (OSError, ValueError, KeyError) as error:
                raise RankError(f"cannot read {path}: {error}") from None
        before += shard.count


def _read_index(path: Path) -> list[tuple[int, int]]:
    """Offsets of the moments and the label of each sample in its shard."""
    offsets = []
    for line in path.read_text().splitlines()[1:]:
        fields = line.split()
        at = dict(zip(fields[::4], map(int, fields[1::4]), strict=True))
        offsets.append((at["moments"], at["label"]))
    return offsets
