"""All metrics of a model's samples: of latents, and of images by `fidelity`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
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
from mfengine.progress import progress
from mfengine.ranks import World

# What samples follow from.
SAMPLES = ("checkpoint", "ema_decay", "conditions", "samples", "seed", "labels", "batch_size")

Decode = Callable[[Tensor, LatentSpace], Tensor]  # latents (B, C, H, W) to images (B, 3, H', W') in [0, 1]


class LabelReader:
    """Reads the label of small images by logistic regression on their pixels, which it learns from the data itself.

    Raises:
        InputError: scikit-learn is not installed, or the data is of one class.
    """

    def __init__(self, dataset: Dataset) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise InputError("reading labels needs scikit-learn: pip install 'mfengine[digits]'") from None
        means, labels = read_means(dataset)
        if len(np.unique(labels)) < 2:
            raise InputError(f"{dataset.folder} has samples of one class: there are no labels to tell apart")
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
        samples: to draw.
        steps: network evaluations per sample: all metrics are taken for each value.
        world: the ranks that share the work.
        dataset: gives the Frechet distance of latents and, where these are pixels, the share read as their label.
        reference: gives the metrics of `Fidelity`.
        inception: weights for `Fidelity`.
        decode: makes images; needed with `reference` and `save`.
        save: write the images of the first value of `steps` here, as `ImageWriter` does.

    Returns:
        The metrics by name, on rank 0; those of images are missing elsewhere.

    Raises:
        InputError: decoder or reference do not fit the model, a library is missing, something cannot be read or
            written, or samples are not finite.
    """
    space, device = samples.space, world.device
    dimensions = math.prod(space.shape)
    data = reader = fidelity = writer = None
    # Checks come first, then all that takes long.
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
        if space.pixel_range is not None and space.num_classes > 1:
            reader = world.on_main(lambda: LabelReader(dataset))
    if reference is not None:
        fidelity = Fidelity(reference, inception, samples.batch, world)
        if reference.images is None:
            _tell(f"no precision and recall: {reference.path} has no images", world)
    if save is not None:
        writer = ImageWriter(save, samples.count, height, width, world)

    metrics: dict[str, float] = {}
    for nfe in steps if dataset is not None or reference is not None else steps[:1]:
        moments = Moments(dimensions, device) if data is not None else None
        features, hits = [], 0
        with progress(samples.count, "samples", f"{nfe} step(s)", enabled=world.main) as bar:
            for rows, latents, labels in samples.draw(model, nfe, world):
                if not latents.isfinite().all():
                    raise RankError(f"samples in {nfe} step(s) are not finite: these weights cannot be measured")
                vectors = space.unscale(latents).flatten(1)
                if moments is not None:
                    moments.add(vectors)
                if reader is not None:
                    hits += reader.hits(vectors, labels)
                if decode is not None:
                    pixels = (decode(latents, space) * 255).to(torch.uint8)  # rounded down, as ADM does
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
            metrics[f"frechet_{nfe}nfe"] = frechet_distance(data, moments.over_ranks(world).fit())
        if reader is not None:
            metrics[f"accuracy_{nfe}nfe"] = float(world.gather([hits]).sum()) / samples.count
        if fidelity is not None:
            metrics |= {f"{name}_{nfe}nfe": value for name, value in fidelity.metrics(features).items()}
    if data is not None:
        metrics["frechet_floor"] = floor
    return metrics


def _tell(note: str, world: World) -> None:
    if world.main:
        print(f"note: {note}", file=sys.stderr)


def write_metrics(metrics: dict[str, float], origin: dict[str, Any], path: Path) -> None:
    """Write metrics as JSON, atomically; other metrics of the same samples that the file has stay.

    Args:
        metrics: by name.
        origin: the samples that were measured, by the keys of `SAMPLES`, and the data they were compared with.
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
    report = {**(before if same else {}), **metrics, **origin}
    with writing(path):
        write_atomic(path, json.dumps(report, indent=1) + "\n")
