"""All metrics of a model's samples, for latents and, through `fidelity`, for images."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfengine.data.format import Dataset, LatentSpace, read_means
from mfengine.data.image_files import ImageWriter
from mfengine.errors import InputError, RankError
from mfengine.evaluation.fidelity import Fidelity, Reference
from mfengine.evaluation.frechet import Moments, data_moments, frechet_distance
from mfengine.evaluation.samples import SampleSet
from mfengine.files import write_atomic, writing
from mfengine.methods import Sampler
from mfengine.progress import progress
from mfengine.ranks import World

# What determines the samples.
SAMPLES = ("checkpoint", "ema_decay", "conditions", "samples", "seed", "labels", "batch_size")

Decode = Callable[[Tensor, LatentSpace], Tensor]  # latents (B, C, H, W) to images (B, 3, H', W') in [0, 1]


class LabelReader:
    """Reads the labels of small images by logistic regression on their pixels, fitted to the data itself.

    Raises:
        InputError: scikit-learn is not installed, or the data has only one class.
    """

    def __init__(self, dataset: Dataset) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise InputError("reading labels needs scikit-learn: pip install 'mfengine[digits]'") from None
        means, labels = read_means(dataset)
        if len(np.unique(labels)) < 2:
            raise InputError(f"{dataset.folder} has samples of only one class: there are no labels to distinguish")
        pixels = means.reshape(len(means), -1).astype(np.float64)
        self._spread = pixels.std()
        self._regression = LogisticRegression(max_iter=2000).fit(pixels / self._spread, labels)

    def hits(self, pixels: Tensor, labels: Tensor) -> int:
        """The number of images (n, d), on the encoder's scale, that it reads as their labels (n,)."""
        read = self._regression.predict(pixels.cpu().numpy() / self._spread)
        return int((read == labels.cpu().numpy()).sum())


class Evaluation:
    """Compares samples of models with data, with reference images, or with both; every rank makes one.

    Data, reference and the networks for it are read only once.

    Args:
        samples: the samples to draw.
        world: the ranks that share the work.
        dataset: gives the Frechet distance of latents and, if these are pixels, the share read as their label.
        reference: gives the metrics of `Fidelity`.
        inception: weights for `Fidelity`.
        decode: turns latents into images; needed with `reference` and `save`.
        save: where the first `measure` writes its images, as `ImageWriter` does.

    Raises:
        InputError: decoder or reference do not fit the model, a library is missing, or a file cannot be read.
    """

    floor: dict[str, float]
    """`frechet_floor`, the Frechet distance between two halves of the data, if there is data"""

    def __init__(
        self,
        samples: SampleSet,
        world: World,
        *,
        dataset: Dataset | None = None,
        reference: Reference | None = None,
        inception: Path | None = None,
        decode: Decode | None = None,
        save: Path | None = None,
    ) -> None:
        self._samples, self._world, self._decode = samples, world, decode
        space = samples.space
        dimensions = math.prod(space.shape)
        self._data = self._reader = self._fidelity = self._writer = None
        self.floor = {}
        # All checks come before anything that takes long.
        if decode is not None:
            height, width = decode(torch.zeros(1, *space.shape, device=world.device), space).shape[-2:]
            if reference is not None:
                reference.check_size(height, width)
        if dataset is not None:
            first_half, second_half = data_moments(dataset, world, samples.seed)
            self.floor["frechet_floor"] = frechet_distance(first_half.fit(), second_half.fit())
            first_half.merge(second_half)
            self._data = first_half.fit()
            for what, n in (("samples", samples.count), ("images in the data", dataset.count)):
                if n <= dimensions:
                    _tell(
                        f"{n:,} {what} are too few: the covariance of {dimensions:,} dimensions is singular, and the "
                        "Frechet distance compares only with distances at the same number",
                        world,
                    )
            if space.pixel_range is not None and space.num_classes > 1:
                self._reader = world.on_main(lambda: LabelReader(dataset))
        if reference is not None:
            self._fidelity = Fidelity(reference, inception, samples.batch, world)
            if reference.images is None:
                _tell(f"no precision and recall: {reference.path} has no images", world)
        if save is not None:
            self._writer = ImageWriter(save, samples.count, height, width, world)

    def measure(self, model: nn.Module, sampler: Sampler, steps: int, title: str) -> dict[str, float]:
        """Draw samples and compare them; every rank calls it.

        Args:
            model: a whole model on each rank's device.
            sampler: how to draw from it.
            steps: network evaluations per sample.
            title: title of the progress bar.

        Returns:
            The metrics by name, on rank 0; other ranks lack those of images.

        Raises:
            InputError: samples are not finite, or images cannot be written.
        """
        samples, world = replace(self._samples, sampler=sampler), self._world
        space = samples.space
        moments = Moments(math.prod(space.shape), world.device) if self._data is not None else None
        features, hits = [], 0
        with progress(samples.count, "samples", title, enabled=world.main) as bar:
            for rows, latents, labels in samples.draw(model, steps, world):
                if not latents.isfinite().all():
                    raise RankError(f"samples in {steps} step(s) are not finite: these weights cannot be evaluated")
                vectors = space.unscale(latents).flatten(1)
                if moments is not None:
                    moments.add(vectors)
                if self._reader is not None:
                    hits += self._reader.hits(vectors, labels)
                if self._decode is not None:
                    pixels = (self._decode(latents, space) * 255).to(torch.uint8)  # rounded down, as in ADM
                    if self._fidelity is not None:
                        features.append((rows, self._fidelity.features(pixels)))
                    if self._writer is not None:
                        self._writer.write(rows, pixels)
                # The first rank's slice is the first of as many slices as there are ranks.
                bar.update(min(samples.count, rows.start + samples.batch * world.size) - bar.n)
        if self._writer is not None:
            self._writer.finish()
            self._writer = None
        metrics: dict[str, float] = {}
        if self._data is not None and moments is not None:
            metrics["frechet"] = frechet_distance(self._data, moments.over_ranks(world).fit())
        if self._reader is not None:
            metrics["accuracy"] = float(world.gather([hits]).sum()) / samples.count
        if self._fidelity is not None:
            metrics |= self._fidelity.metrics(features)
        return metrics


def _tell(note: str, world: World) -> None:
    if world.main:
        print(f"note: {note}", file=sys.stderr)


def write_metrics(metrics: dict[str, float], origin: dict[str, Any], path: Path) -> None:
    """Write metrics as JSON, atomically. Other metrics in the file stay if they are of the same samples.

    Args:
        metrics: by name.
        origin: the samples measured, under the keys of `SAMPLES`, and the data they were compared with.
        path: the file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        before = json.loads(path.read_text())
        same = all(before.get(name) == origin.get(name) for name in SAMPLES)
        same = same and all(before.get(name, value) == value for name, value in origin.items())
    except (OSError, ValueError, AttributeError):
        same = False
    report = {**(before if same else {}), **metrics, **origin}
    with writing(path):
        write_atomic(path, json.dumps(report, indent=1) + "\n")
