"""How near samples are to the data that they imitate.

Latents are compared by the Frechet distance of the Gaussians fitted to samples and to data, without any other network;
images, by the figures of `fidelity`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mfengine.data.dataset import Dataset, LatentSpace, iterate_means, read_means
from mfengine.data.image_files import ImageWriter
from mfengine.errors import InputError, RankError
from mfengine.evaluation.fidelity import Fidelity, Reference
from mfengine.files import write_atomic, writing
from mfengine.methods import Sampler, sample
from mfengine.progress import progress
from mfengine.ranks import World

MAX_DIMENSIONS = 16_384  # of latents whose covariance is taken: 4 x 64 x 64, and a matrix of 2 GiB

SAMPLES = ("checkpoint", "ema_decay", "conditions", "samples", "seed", "labels", "batch_size")  # they follow from

Decode = Callable[[Tensor, LatentSpace], Tensor]  # latents (B, C, H, W) to images (B, 3, H', W') in [0, 1]


# ----------------------------------------------------------------------------
# Samples.


@dataclass(frozen=True)
class SampleSet:
    """Samples to draw from a model, numbered from 0.

    Noise and label of sample i derive from (seed, i) alone, and the network is called on fixed slices of the numbers,
    which are dealt to the ranks in turn. So any number of ranks draws the same samples; on CPUs to the bit, where the
    processes have the same number of threads.
    """

    space: LatentSpace
    count: int
    batch: int
    """samples per call of the network"""
    seed: int = 0
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: sample i has label i modulo the number of classes"""
    sampler: Sampler = sample
    """of the model's objective"""

    def draw(self, model: nn.Module, steps: int, world: World) -> Iterator[tuple[range, Tensor, Tensor]]:
        """This rank's share of the samples.

        Every rank calls the network equally often, as a sharded model needs it: one that has no slice left does the
        last one again, for nothing.

        Args:
            model: u(z, t, h, y), on the ranks' devices.
            steps: network evaluations per sample.
            world: the ranks that share the work.

        Yields:
            Numbers of n samples, their latents (n, C, H, W) float32 and their labels (n,) int64, on the device.
        """
        slices = [range(self.count)[first : first + self.batch] for first in range(0, self.count, self.batch)]
        for first in range(0, len(slices), world.size):
            mine = first + world.rank
            rows = slices[min(mine, len(slices) - 1)]
            inputs = [self._inputs(i) for i in rows]
            noise, labels = (torch.stack(parts).to(world.device) for parts in zip(*inputs, strict=True))
            latents = self.sampler(model, noise, labels, steps)
            if mine < len(slices):
                yield rows, latents, labels

    def _inputs(self, i: int) -> tuple[Tensor, Tensor]:
        """Noise (C, H, W) and label () of sample i."""
        # The spawn key sets the numbers apart from those of training step i.
        state = np.random.SeedSequence([self.seed, i], spawn_key=(1,)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        noise = torch.randn(self.space.shape, generator=generator)
        if self.labels == "balanced":
            return noise, torch.tensor(i % self.space.num_classes)
        return noise, torch.randint(self.space.num_classes, (), generator=generator)


# ----------------------------------------------------------------------------
# The Frechet distance (Heusel et al., arXiv 1706.08500, eq. 6).


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d), float64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """The covariance's symmetric square root; eigenvalues that rounding made negative count as 0."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Moments:
    """What the mean and the covariance of vectors follow from, gathered a few at a time, in float64.

    Memory: d^2 numbers, 134 MB for latents of 4 x 32 x 32; never the vectors themselves.

    Args:
        dimensions: d.
        device: where the sums are.
    """

    def __init__(self, dimensions: int, device: torch.device) -> None:
        self._sum = torch.zeros(dimensions + 1, dimensions + 1, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Take in vectors (n, d)."""
        x = torch.nn.functional.pad(x.to(self._sum), (0, 1), value=1)  # the last row of the sum: sum of x, and n
        self._sum.addmm_(x.T, x)

    def merge(self, other: Moments) -> None:
        """Take in all that `other` has."""
        self._sum += other._sum

    def over_ranks(self, world: World) -> Moments:
        """Take in what the other ranks have, each once; every rank calls it."""
        world.add_up(self._sum)
        return self

    def fit(self) -> Gaussian:
        """The Gaussian with the vectors' mean and covariance (n - 1 in the denominator)."""
        n = self._sum[-1, -1]
        mean = self._sum[-1, :-1] / n
        return Gaussian(mean, (self._sum[:-1, :-1] - n * mean.outer(mean)) / (n - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) of two Gaussians.

    A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2). nan where b is not finite.
    """
    if not b.covariance.isfinite().all():
        return math.nan
    roots = torch.linalg.eigvalsh(a.root @ b.covariance @ a.root).clamp(min=0).sqrt()
    shift = a.mean - b.mean
    return float(shift @ shift + a.covariance.trace() + b.covariance.trace() - 2 * roots.sum())


def check_dimensions(space: LatentSpace) -> None:
    """InputError where latents are of too many numbers for their covariance to be taken."""
    dimensions = math.prod(space.shape)
    if dimensions > MAX_DIMENSIONS:
        raise InputError(
            f"latents of {dimensions:,} numbers are too many for the Frechet distance: at most {MAX_DIMENSIONS:,}"
        )


def data_moments(dataset: Dataset, world: World, seed: int = 0) -> tuple[Moments, Moments]:
    """Moments of the posterior means of two random halves of the data, on the encoder's scale, not flipped.

    The ranks share the reading. An image counts once: latents as they are trained on scatter around their means, by
    little with the usual encoders.

    Raises:
        InputError: latents are of too many numbers, or the data cannot be read.
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
    """The Gaussian of all posterior means of a data set; see `data_moments`."""
    whole, half = data_moments(dataset, world)
    whole.merge(half)
    return whole.fit()


def latent_distance(model: nn.Module, samples: SampleSet, steps: int, data: Gaussian, world: World) -> float:
    """Frechet distance of a model's samples from data, both on the encoder's scale; every rank calls it."""
    moments = Moments(len(data.mean), world.device)
    for _, latents, _ in samples.draw(model, steps, world):
        moments.add(samples.space.unscale(latents).flatten(1))
    return frechet_distance(data, moments.over_ranks(world).fit())


# ----------------------------------------------------------------------------
# All figures of a model.


class LabelReader:
    """Reads the label of small images by logistic regression on their pixels, which it learns from the data itself.

    Raises:
        InputError: scikit-learn is not installed.
    """

    def __init__(self, dataset: Dataset) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise InputError("reading labels needs scikit-learn: pip install 'mfengine[digits]'") from None
        means, labels = read_means(dataset)
        pixels = means.reshape(len(means), -1).astype(np.float64)
        self._spread = pixels.std()
        self._regression = LogisticRegression(max_iter=2000).fit(pixels / self._spread, labels)

    def hits(self, pixels: Tensor, labels: Tensor) -> int:
        """How many of images (n, d) on the encoder's scale it reads as their labels (n,)."""
        read = self._regression.predict(pixels.cpu().numpy() / self._spread)
        return int((read == labels.cpu().numpy()).sum())


def evaluate(
    model: nn.Module,
    samples: SampleSet,
    steps: Sequence[int],
    world: World,
    *,
    dataset: Dataset | None = None,
    reference: Reference | None = None,
    inception: Path | None = None,
    decode: Decode | None = None,
    save: Path | None = None,
) -> dict[str, float]:
    """Draw samples and compare them with data, with reference images, or with both; every rank calls it.

    Args:
        model: on the ranks' devices, whole.
        samples: what to draw.
        steps: network evaluations per sample: all figures are taken for each value.
        world: the ranks that share the work.
        dataset: gives the Frechet distance of latents and, where these are pixels, the share read as their label.
        reference: gives the figures of `Fidelity`.
        inception: weights for `Fidelity`.
        decode: makes images; needed with `reference` and `save`.
        save: write the images of the first value of `steps` here, as `ImageWriter` does.

    Returns:
        The figures by name, on rank 0; those of images are missing elsewhere.

    Raises:
        InputError: decoder or reference do not fit the model, a library is missing, something cannot be read or
            written, or samples are not finite.
    """
    space, device = samples.space, world.device
    dimensions = math.prod(space.shape)
    data = reader = fidelity = writer = None
    # What may be wrong comes first, then what takes long.
    if decode is not None:
        height, width = decode(torch.zeros(1, *space.shape, device=device), space).shape[-2:]
        if reference is not None:
            reference.check_size(height, width)
    if dataset is not None:
        first_half, second_half = data_moments(dataset, world, samples.seed)
        floor = frechet_distance(first_half.fit(), second_half.fit())
        first_half.merge(second_half)
        data = first_half.fit()
        for what, n in (("samples", samples.count), ("images in the data", dataset.count)):
            if n <= dimensions:
                _tell(
                    f"{n:,} {what} leave a covariance of {dimensions:,} dimensions singular: their Frechet distance "
                    "compares only with that of as many",
                    world,
                )
        if space.pixel_range is not None:
            reader = world.on_main(lambda: LabelReader(dataset))
    if reference is not None:
        fidelity = Fidelity(reference, inception, samples.batch, world)
        if reference.images is None:
            _tell(f"no precision and recall: {reference.path} has no images", world)
    if save is not None:
        writer = ImageWriter(save, samples.count, height, width, world)

    figures: dict[str, float] = {}
    for nfe in steps if dataset is not None or reference is not None else steps[:1]:
        moments = Moments(dimensions, device) if data is not None else None
        features, hits = [], 0
        with progress(samples.count, f"samples in {nfe} step(s)", world.main) as bar:
            for rows, latents, labels in samples.draw(model, nfe, world):
                if not latents.isfinite().all():
                    raise RankError(f"samples in {nfe} step(s) are not finite: these weights cannot be measured")
                vectors = space.unscale(latents).flatten(1)
                if moments is not None:
                    moments.add(vectors)
                if reader is not None:
                    hits += reader.hits(vectors, labels)
                if decode is not None:
                    pixels = quantise(decode(latents, space))
                    if fidelity is not None:
                        features.append((rows, fidelity.features(pixels)))
                    if writer is not None:
                        writer.write(rows, pixels)
                # The first rank's slice is the first of as many as there are ranks.
                bar.update(min(samples.count, rows.start + samples.batch * world.size) - bar.n)
        if writer is not None:
            writer.finish()
            writer = None
        if data is not None and moments is not None:
            figures[f"frechet_{nfe}nfe"] = frechet_distance(data, moments.over_ranks(world).fit())
        if reader is not None:
            figures[f"accuracy_{nfe}nfe"] = float(world.gather([hits]).sum()) / samples.count
        if fidelity is not None:
            figures |= {f"{name}_{nfe}nfe": value for name, value in fidelity.figures(features).items()}
    if data is not None:
        figures["frechet_floor"] = floor
    return figures


def _tell(note: str, world: World) -> None:
    if world.main:
        print(f"note: {note}", file=sys.stderr)


def quantise(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded down as ADM's samples are (arXiv 2105.05233)."""
    return (images * 255).to(torch.uint8)


def write_figures(figures: dict[str, float], origin: dict[str, Any], path: Path) -> None:
    """Write figures as JSON, aside, and replace what is there, but keep its other figures of the same samples.

    Args:
        figures: by name.
        origin: the samples that they were taken of, all of `SAMPLES` among it, and what they were compared with.
        path: where.

    Raises:
        InputError: it cannot be written.
    """
    try:
        before = json.loads(path.read_text())
        same = all(before.get(name) == origin.get(name) for name in SAMPLES)
        same = same and all(before.get(name, value) == value for name, value in origin.items())
    except (OSError, ValueError, AttributeError):
        same = False
    report = {**(before if same else {}), **figures, **origin}
    with writing(path):
        write_atomic(path, json.dumps(report, indent=1) + "\n")
