"""Published normalisations of latents, and a measured one: (posterior sample - bias) * scale, per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from mfengine.data.format import LatentSpace, PerChannel
from mfengine.errors import InputError

Published = Literal["sd", "sd-vae-ft-mse"]
Normalisation = Literal["sd", "sd-vae-ft-mse", "measured"]

PUBLISHED: dict[Published, tuple[PerChannel, PerChannel]] = {  # scale, bias
    "sd": (0.18215, 0.0),  # Stable Diffusion 1 and 2 (arXiv 2112.10752), the same for all channels
    "sd-vae-ft-mse": (  # improved MeanFlow (arXiv 2512.02012): 1 / standard deviation, and mean
        (1 / 4.85503674, 1 / 5.31922414, 1 / 3.93725398, 1 / 3.9870003),
        (0.86488, -0.27787343, 0.21616915, 0.3738409),
    ),
}
CHANNELS = 4  # of Stable Diffusion's VAE, which all of them describe, for images from -1 to 1


class ChannelSums:
    """Sums over posteriors by channel, in float64. They give the mean and standard deviation of samples.

    Args:
        channels: the number of channels C.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        """numbers per channel"""
        self.first = np.zeros(channels)
        """(C,), sum of the means"""
        self.second = np.zeros(channels)
        """(C,), sum of the second moments, mean^2 + std^2"""

    def add(self, moments: np.ndarray) -> None:
        """Add moments (flips, 2, C, H, W), all finite."""
        moments = moments.astype(np.float64)
        self.count += moments[:, 0, 0].size
        self.first += moments[:, 0].sum((0, 2, 3))
        self.second += np.square(moments).sum((0, 1, 3, 4))

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.first.tolist(), "second": self.second.tolist()}

    def merge(self, values: Mapping[str, Any]) -> None:
        """Add the sums that another object's `to_json` returned."""
        self.count += values["count"]
        self.first += values["first"]
        self.second += values["second"]

    @property
    def mean(self) -> np.ndarray:
        """(C,)"""
        return self.first / self.count

    @property
    def std(self) -> np.ndarray:
        """(C,). The variance is the mean of the posteriors' variances plus the variance of their means."""
        return np.sqrt(np.maximum(self.second / self.count - self.mean**2, 0))


def measured(space: LatentSpace, sums: ChannelSums) -> LatentSpace:
    """`space` with mean 0 and standard deviation 1 in each channel; a constant channel gets scale 1."""
    std = np.where(sums.std > 0, sums.std, 1)
    return replace(space, scale=tuple((1 / std).tolist()), bias=tuple(sums.mean.tolist()))


def published(space: LatentSpace, name: Published) -> LatentSpace:
    """`space` normalised by an entry of `PUBLISHED`; InputError if the number of channels differs."""
    if space.shape[0] != CHANNELS:
        raise InputError(f"normalisation {name} is for {CHANNELS} channels; these latents have {space.shape[0]}")
    scale, bias = PUBLISHED[name]
    return replace(space, scale=scale, bias=bias)


def describe(space: LatentSpace) -> str:
    """A normalisation in words: its name if it has one, else scale and bias."""
    for name in PUBLISHED:
        if has(space, name):
            return name
    values = (", ".join(f"{x:.6g}" for x in np.atleast_1d(value)) for value in (space.scale, space.bias))
    scale, bias = (f"({value})" if "," in value else value for value in values)
    return f"scale {scale} and bias {bias}"


def has(space: LatentSpace, name: Published) -> bool:
    """Whether latents have this normalisation, up to rounding."""
    if space.shape[0] != CHANNELS:
        return False
    return all(
        np.allclose(ours, theirs, rtol=1e-3)
        for ours, theirs in zip((space.scale, space.bias), PUBLISHED[name], strict=True)
    )
