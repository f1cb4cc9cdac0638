"""The Frechet distance of latents, between Gaussians fit to samples and to data (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from mfengine.data.format import Dataset, LatentSpace, iterate_means
from mfengine.errors import InputError
from mfengine.evaluation.samples import SampleSet
from mfengine.ranks import World

MAX_DIMENSIONS = 16_384  # 4 x 64 x 64: the covariance takes 2 GiB


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d), float64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """The covariance's symmetric square root. Eigenvalues that rounding made negative count as 0."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Moments:
    """Running sums over vectors, in float64, that give their mean and covariance.

    They take d^2 numbers of memory, 134 MB for latents of 4 x 32 x 32; the vectors are not kept.

    Args:
        dimensions: the number of dimensions d.
        device: the device of the sums.
    """

    def __init__(self, dimensions: int, device: torch.device) -> None:
        self._sum = torch.zeros(dimensions + 1, dimensions + 1, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add vectors (n, d)."""
        x = torch.nn.functional.pad(x.to(self._sum), (0, 1), value=1)  # the last row of the product: sum of x, and n
        self._sum.addmm_(x.T, x)

    def merge(self, other: Moments) -> None:
        """Add the vectors in `other`."""
        self._sum += other._sum

    def over_ranks(self, world: World) -> Moments:
        """Add the vectors of the other ranks; every rank calls it once."""
        world.add_up(self._sum)
        return self

    def fit(self) -> Gaussian:
        """The Gaussian with the mean and covariance of the vectors (n - 1 in the denominator)."""
        n = self._sum[-1, -1]
        mean = self._sum[-1, :-1] / n
        return Gaussian(mean, (self._sum[:-1, :-1] - n * mean.outer(mean)) / (n - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) of two Gaussians.

    The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2). The result is nan if b is not finite.
    """
    if not b.covariance.isfinite().all():
        return math.nan
    roots = torch.linalg.eigvalsh(a.root @ b.covariance @ a.root).clamp(min=0).sqrt()
    shift = a.mean - b.mean
    return float(shift @ shift + a.covariance.trace() + b.covariance.trace() - 2 * roots.sum())


def check_dimensions(space: LatentSpace) -> None:
    """InputError if latents are too large for their covariance to be computed."""
    dimensions = math.prod(space.shape)
    if dimensions > MAX_DIMENSIONS:
        raise InputError(
            f"latents of {dimensions:,} numbers are too large for the Frechet distance: at most {MAX_DIMENSIONS:,}"
        )


def data_moments(dataset: Dataset, world: World, seed: int = 0) -> tuple[Moments, Moments]:
    """Moments of the posterior means of two random halves of the data, on the encoder's scale, not flipped.

    The ranks share the reading. An image counts once, by its mean; latents seen in training scatter around the mean,
    but little with the usual encoders.

    Raises:
        InputError: latents are too large, or the data cannot be read.
    """
    check_dimensions(dataset.space)
    dimensions = math.prod(dataset.space.shape)
    halves = Moments(dimensions, world.device), Moments(dimensions, world.device)
    second = np.zeros(dataset.count, bool)
    second[np.random.default_rng(seed).permutation(dataset.count)[1::2]] = True
    for first, means, _ in iterate_means(dataset, world.rank, world.size):
        of_second = torch.from_numpy(second[first : first + len(means)])
        vectors = torch.from_numpy(means).flatten(1)
        for half, chosen in zip(halves, (~of_second, of_second), strict=True):
            half.add(vectors[chosen].to(world.device))
    for half in halves:
        half.over_ranks(world)
    return halves


def fit_data(dataset: Dataset, world: World) -> Gaussian:
    """The Gaussian fitted to all posterior means of a data set; see `data_moments`."""
    whole, half = data_moments(dataset, world)
    whole.merge(half)
    return whole.fit()


def latent_distance(model: nn.Module, samples: SampleSet, steps: int, data: Gaussian, world: World) -> float:
    """Frechet distance between a model's samples and data, both on the encoder's scale; every rank calls it."""
    moments = Moments(len(data.mean), world.device)
    for _, latents, _ in samples.draw(model, steps, world):
        moments.add(samples.space.unscale(latents).flatten(1))
    return frechet_distance(data, moments.over_ranks(world).fit())
