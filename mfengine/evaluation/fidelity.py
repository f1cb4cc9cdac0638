"""FID, Inception Score, precision and recall of images, computed by the torch-fidelity library on all ranks."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfengine.data.image_files import ImageArchive, ImageFolder
from mfengine.errors import InputError
from mfengine.progress import progress
from mfengine.ranks import World

EXTRACTOR = "inception-v3-compat"  # the network of the original FID, with weights converted from TensorFlow
FEATURES = 2048  # the network's last pooling layer, for FID, precision and recall
LOGITS = 1008  # its classes without bias, for the Inception Score
SPLITS = 10  # for the Inception Score
NEIGHBOURS = 3  # for precision and recall


class Reference:
    """The reference that images are compared with.

    Args:
        path: a folder of images, or an .npz like ADM's reference batches. An .npz has images (N, H, W, 3) uint8 as
            arr_0, or the mean and covariance of their Inception features as mu and sigma, or both.

    Raises:
        InputError: the path has none of these, or an array has the wrong shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: ImageFolder | ImageArchive | None = None
        self.statistics: dict[str, np.ndarray] | None = None  # under torch-fidelity's names
        if path.is_dir():
            self.images = ImageFolder(path)
        elif path.suffix == ".npz" and path.is_file():
            try:
                self._read_archive()
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"cannot read {path}: {error}") from None
        else:
            raise InputError(f"reference {path} is neither a folder of images nor an .npz file")
        if self.images is not None and len(self.images) <= NEIGHBOURS:
            raise InputError(f"{path} has {len(self.images)} image(s); a reference needs more than {NEIGHBOURS}")

    def _read_archive(self) -> None:
        if not zipfile.is_zipfile(self.path):
            raise InputError(f"{self.path} is not an .npz file")
        with np.load(self.path) as arrays:
            names = set(arrays.keys())
            if {"mu", "sigma"} <= names:
                self.statistics = {name: arrays[name].astype(np.float64) for name in ("mu", "sigma")}
        if "arr_0" in names:
            self.images = ImageArchive(self.path)
        elif self.statistics is None:
            raise InputError(
                f"{self.path} has {', '.join(sorted(names)) or 'nothing'}; it needs reference statistics as mu and "
                f"sigma, or reference images as arr_0"
            )
        for name, shape in (("mu", (FEATURES,)), ("sigma", (FEATURES, FEATURES))):
            if self.statistics is not None and self.statistics[name].shape != shape:
                raise InputError(
                    f"{self.path}: {name} is {self.statistics[name].shape}; for Inception features it must be {shape}"
                )

    def check_size(self, height: int, width: int) -> None:
        """InputError if the reference images differ in size from the images to compare."""
        if self.images is not None and (self.images.height, self.images.width) != (height, width):
            raise InputError(
                f"the images of {self.path} are {self.images.width} x {self.images.height}, "
                f"but those of the model are {width} x {height}"
            )


class Fidelity:
    """Compares images with a reference. All ranks extract features; the first one compares them.

    Args:
        reference: the reference.
        weights: torch-fidelity's file of Inception weights; None lets the library fetch it.
        batch: reference images at a time.
        world: the ranks that share the work.

    Raises:
        InputError: torch-fidelity cannot be imported, the weights are missing, or a reference image is broken.
    """

    def __init__(self, reference: Reference, weights: Path | None, batch: int, world: World) -> None:
        self._statistics, self._world = reference.statistics, world
        # Read once, then sent to the other ranks.
        self._extractor = world.on_main(lambda: _load_extractor(weights)).to(world.device)
        self._reference_features = None
        if reference.images is not None:
            self._reference_features = self._gather(list(self._read(reference.images, batch)))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features and logits (n, 2048 + 1008) float32, on the host, for images (n, 3, H, W) uint8."""
        return torch.cat(self._extractor(images.to(self._world.device)), dim=1).cpu()

    def metrics(self, shares: list[tuple[range, Tensor]]) -> dict[str, float]:
        """All metrics, on rank 0. Every rank calls this with its share: the images' numbers and their features.

        They are FID (arXiv 1706.08500), the Inception Score (arXiv 1606.03498) and, if the reference has images,
        precision and recall (arXiv 1904.06991).
        """
        taken = self._gather(shares)
        if taken is None:
            return {}
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

        features, logits = taken.split((FEATURES, LOGITS), dim=1)
        if self._reference_features is not None:
            real_features = self._reference_features[:, :FEATURES]
            self._statistics = self._statistics or fid_features_to_statistics(real_features.double())
        fid = fid_statistics_to_metric(fid_features_to_statistics(features.double()), self._statistics, verbose=False)
        score = isc_features_to_metric(logits, splits=SPLITS)
        metrics = {
            "fid": fid[KEY_METRIC_FID],
            "inception_score": score[KEY_METRIC_ISC_MEAN],
            "inception_score_std": score[KEY_METRIC_ISC_STD],
        }
        if self._reference_features is not None:
            device = self._world.device  # for 50,000 x 50,000 distances
            overlap = prc_features_to_metric(
                features.to(device),
                real_features.to(device),
                prc_neighborhood=NEIGHBOURS,
                save_cpu_ram=True,
                verbose=False,
            )
            metrics["precision"], metrics["recall"] = overlap[KEY_METRIC_PRECISION], overlap[KEY_METRIC_RECALL]
        return metrics

    def _read(self, images: ImageFolder | ImageArchive, batch: int) -> Iterator[tuple[range, Tensor]]:
        """This rank's share of the reference: the images' numbers and their features."""
        count, stride = len(images), self._world.size * batch
        with progress(count, "images", "reference", enabled=self._world.main) as bar:
            for first in range(self._world.rank * batch, count, stride):
                rows = range(first, min(first + batch, count))
                yield rows, self.features(images.read(rows))
                bar.update(min(count, first + stride) - bar.n)

    def _gather(self, shares: list[tuple[range, Tensor]]) -> Tensor | None:
        """The features of all ranks in the order of the images, on rank 0."""
        numbers = torch.tensor([i for rows, _ in shares for i in rows], dtype=torch.int64)
        features = torch.cat([torch.empty(0, FEATURES + LOGITS), *(part for _, part in shares)])
        all_numbers, all_features = self._world.gather_rows(numbers), self._world.gather_rows(features)
        if all_numbers is None or all_features is None:
            return None
        return all_features[all_numbers.argsort()]


def _load_extractor(weights: Path | None) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # any kind, for example if torchvision was built for another torch
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_fidelity":
            raise InputError("--reference needs the torch-fidelity library: pip install 'mfengine[fid]'") from None
        raise InputError(
            f"--reference needs the torch-fidelity library, but its import fails: {str(error).splitlines()[0]} "
            "(it needs a torchvision that matches your torch)"
        ) from None
    if weights is not None and not weights.is_file():
        raise InputError(f"there are no Inception weights at {weights}")
    try:
        return FeatureExtractorInceptionV3(
            EXTRACTOR,
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=None if weights is None else str(weights),
            verbose=False,
        )
    except Exception as error:  # pickle, zip and network errors
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if weights is None:
            raise InputError(
                f"cannot download the Inception weights: {reason}; give a file with --inception (docs/evaluation.md)"
            ) from None
        raise InputError(f"{weights} does not hold the weights of torch-fidelity's Inception: {reason}") from None
