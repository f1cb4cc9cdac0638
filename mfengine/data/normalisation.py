"""Normalisations of latents by name, and one that is measured: (posterior sample - bias) * scale, per channel."""

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
    "sd": (0.18215, 0.0),  # of Stable Diffusion 1 and 2 (arXiv 2112.10752), all channels alike
    "sd-vae-ft-mse": (  # of improved MeanFlow (arXiv 2512.02012): 1 / standard deviation, and mean
        (1 / 4.85503674, 1 / 5.31922414, 1 / 3.93725398, 1 / 3.9870003),
        (0.86488, -0.27787343, 0.21616915, 0.3738409),
    ),
}
CHANNELS = 4  # of the VAE that all of them are of, as it encodes images from -1 to 1


class ChannelSums:
    """Sums over posteriors by channel, in float64: what mean and standard deviation of their samples follow from.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        """numbers per channel"""
        self.first = np.zeros(channels)
        """(C,): of the means"""
        self.second = np.zeros(channels)
        """(C,): of the second moments, mean^2 + std^2"""

    def add(self, moments: np.ndarray) -> None:
        """Take in moments (flips, 2, C, H, W), finite."""
        moments = moments.astype(np.float64)
        self.count += moments[:, 0, 0].size
        self.first += moments[:, 0].sum((0, 2, 3))
        self.second += np.square(moments).sum((0, 1, 3, 4))

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.first.tolist(), "second": self.second.tolist()}

    def merge(self, values: Mapping[str, Any]) -> None:
        """Take in what `to_json` gave of another one."""
        self.count += values["count"]
        self.first += values["first"]
        self.second += values["second"]

    @property
    def mean(self) -> np.ndarray:
        """(C,)"""
        return self.first / self.count

    @property
    def std(self) -> np.ndarray:
        """(C,): the variance is the mean of the posteriors' variances and the variance of their means."""
        return np.sqrt(np.maximum(self.second / self.count - self.mean**2, 0))


def measured(space: LatentSpace, sums: ChannelSums) -> LatentSpace:
    """Normalised to mean 0 and standard deviation 1 in each channel; one that is constant has scale 1."""
    std = np.where(sums.std > 0, sums.std, 1)
    return replace(space, scale=tuple((1 / std).tolist()), bias=tuple(sums.mean.tolist()))


def published(space: LatentSpace, name: Published) -> LatentSpace:
    """Normalised by an entry of `PUBLISHED`; InputError unless latents have its channels."""
    if space.shape[0] != CHANNELS:
        raise InputError(f"normalisation {name} is of {CHANNELS} channels; these latents have {space.shape[0]}")
    scale, bias = PUBLISHED[name]
    return replace(space, scale=scale, bias=bias)


def describe(space: LatentSpace) -> str:
    """The normalisation of latents in words: its name, if it has one, or scale and bias."""
    for name in PUBLISHED:
        if has(space, name):
            return name
    values = (", ".join(f"{x:.6g}" for x in np.atleast_1d(value)) for value in (space.scale, space.bias))
    scale, bias = (f"({value})" if "," in value else value for value in values)
    return f"scale {scale} and bias {bias}"


def has(space: LatentSpace, name: Published) -> bool:
    """Whether latents are normalised so, but for rounding."""
    if space.shape[0] != CHANNELS:
        return False
    return all(
        np.allclose(ours, theirs, rtol=1e-3)
        for ours, theirs in zip((space.scale, space.bias), PUBLISHED[name], strict=True)
    )
