"""`python -m mfengine.prepare digits OUT`: write a data set of latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from mfengine import cli
from mfengine.engine.data import LatentSpace, write_dataset
from mfengine.errors import InputError


@dataclass(frozen=True)
class PrepareArgs:
    """Write a data set of latents: WebDataset shards with DALI indices, and dataset.json."""

    source: tyro.conf.Positional[Literal["digits"]]
    """digits: the 1,797 real 8 x 8 images that scikit-learn carries, as one-channel latents without variance"""
    out: tyro.conf.Positional[Path]
    """an empty or new folder"""
    seed: int = 0
    """of the order in which samples are written"""


def digits(seed: int) -> Iterator[tuple[np.ndarray, int]]:
    """The digits in random order: moments (1, 2, 1, 8, 8), pixels 0 to 16 and a standard deviation of 0."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits come with scikit-learn: pip install 'mfengine[digits]'") from None
    data = load_digits()
    for i in np.random.default_rng(seed).permutation(len(data.target)):
        pixels = data.images[i][None]  # (1, 8, 8)
        yield np.stack([pixels, np.zeros_like(pixels)])[None], int(data.target[i])


def main(args: Sequence[str]) -> None:
    config = cli.parse(PrepareArgs, args, "python -m mfengine.prepare")
    # Pixels from 0, black, to 16 have mean 4.9 and standard deviation 6.0.
    space = LatentSpace(shape=(1, 8, 8), num_classes=10, scale=1 / 6, bias=5.0, pixel_range=(0.0, 16.0))
    dataset = write_dataset(config.out, "digits", space, digits(config.seed))
    print(f"{config.out}: {dataset.count} samples in {len(dataset.shards)} shard(s)")


if __name__ == "__main__":
    cli.run(main)
