"""Latents that others have prepared, as samples of a data set: three formats, found by looking at the source.

| source | a sample | second half of the channels |
| --- | --- | --- |
| LMDB of PyTorch MeanFlow ports | pickled dict: `moments`, `moments_flip` (2 C, H, W), `label` | log variance |
| `.pt` files of the paper's JAX code | dict of tensors: `image` (2 C, H, W), `label` | standard deviation |
| `.npy` in a folder or zip, of REPA and EDM2 | array (2 C, H, W); labels in `dataset.json` | standard deviation |

All of them hold what the encoder gave, not scaled.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfengine.data.dataset import DESCRIPTION, LatentSpace
from mfengine.data.pickles import Refused, load_record
from mfengine.data.sources import open_lmdb
from mfengine.data.writer import Broken
from mfengine.errors import InputError

SD_SCALE = 0.18215  # of the VAE of Stable Diffusion 1 and 2, four channels
PROBES = 8  # samples to try before a source is given up
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution clamps it


class SampleError(Exception):
    """One sample cannot be read; the message is the reason."""


@dataclass(frozen=True)
class Source:
    """What a format gives before its samples are checked."""

    format: str
    count: int
    fingerprint: str
    """changes when the source does"""
    num_classes: int | None
    """None where only reading every sample would tell"""
    name_of: Callable[[int], str]
    """what the user knows a sample by"""
    load: Callable[[int], tuple[list[np.ndarray], Any]]
    """mean and standard deviation, joined (2 C, H, W), of each flip, and the label; raises SampleError"""


class ImportedSamples:
    """The samples of a source (`shards.Samples`); the first that can be read says what shape all have.

    Args:
        path: the source.
        num_classes: None takes what the source says.
        scale: of the latents, which is (mean + std normal - bias) scale; None takes that of Stable Diffusion's VAE.
        bias: of the latents.

    Raises:
        InputError: there is no such format in the source, its first samples are not usable, or the number of classes
            or the scale is not known.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, path: Path, num_classes: int | None = None, scale: float | None = None, bias: float = 0.0):
        self._source = source = find_source(path)
        if source.count == 0:
            raise InputError(f"{path} has no samples")
        self.name = path.resolve().name
        num_classes = num_classes or source.num_classes
        if num_classes is None:
            raise InputError(f"{path} does not say how many classes there are: give --num-classes (1000 for ImageNet)")
        self.flips, self._shape = self._find_shape()
        channels, height, width = self._shape[0] // 2, *self._shape[1:]
        if scale is None and channels != 4:
            raise InputError(f"latents of {channels} channels are not those of Stable Diffusion's VAE: give --scale")
        self.space = LatentSpace((channels, height, width), num_classes, scale or SD_SCALE, bias)
        self.provenance = {"format": source.format, "source": self.name, "fingerprint": source.fingerprint}

    def _find_shape(self) -> tuple[int, tuple[int, ...]]:
        """Flips and (2 C, H, W) of the first sample that can be read."""
        reasons = []
        for i in range(min(PROBES, self._source.count)):
            try:
                arrays, _ = self._source.load(i)
                self.flips, self._shape = len(arrays), arrays[0].shape
                if len(self._shape) != 3 or self._shape[0] % 2:
                    raise SampleError(f"{self._shape} is not (2 C, H, W), mean and standard deviation")
                self._moments(arrays)
                return self.flips, self._shape
            except SampleError as reason:
                reasons.append(f"{self._source.name_of(i)}: {reason}")
        raise InputError(reasons[0])

    def __len__(self) -> int:
        return self._source.count

    def read(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, int] | Broken]:
        """Moments (flips, 2, C, H, W) float16 and label of each index, or Broken."""
        for i in map(int, indices):
            try:
                arrays, label = self._source.load(i)
                yield self._moments(arrays), _label(label)
            except SampleError as reason:
                yield Broken(self._source.name_of(i), str(reason))

    def _moments(self, arrays: list[np.ndarray]) -> np.ndarray:
        if len(arrays) != self.flips or any(array.shape != self._shape for array in arrays):
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise SampleError(f"{shapes}, not {self.flips} of {self._shape} as the first sample")
        with np.errstate(over="ignore"):
            moments = np.stack(arrays).astype(np.float16)
        moments = moments.reshape(self.flips, 2, self._shape[0] // 2, *self._shape[1:])
        if not np.isfinite(moments).all():
            raise SampleError("not all values are finite in float16")
        if (moments[:, 1] < 0).any():
            raise SampleError("the second half of the channels is negative somewhere, so it is no standard deviation")
        return moments


def _label(value: Any) -> int:
    try:
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        array = np.empty(0)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise SampleError(f"its label is {value!s:.60}, not one integer")
    return int(array.item())


def _array(value: Any, what: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise SampleError(f"{what} is not an array of floats but {type(value).__name__}")
    return value


# ----------------------------------------------------------------------------
# Formats.


def find_source(path: Path) -> Source:
    """Which format a file or folder is in.

    Raises:
        InputError: in none that is known.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir():
        if (path / "data.mdb").is_file():
            return _lmdb(path)
        folder = path / "vae-sd" if (path / "vae-sd" / DESCRIPTION).is_file() else path  # REPA has images beside it
        if (folder / DESCRIPTION).is_file():
            return _npy(folder, (folder / DESCRIPTION).read_bytes(), lambda name: (folder / name).read_bytes())
        files = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(".pt"))
        if files:
            return _pt(path, files)
        parts = sorted(p.name for p in path.iterdir() if p.is_dir() and next(p.glob("*.pt"), None))
        if parts:
            raise InputError(f"{path} has no .pt files but in folders: give {path / parts[0]}")
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        if DESCRIPTION in archive.namelist():
            return _npy(path, archive.read(DESCRIPTION), archive.read)
    elif path.suffix in (".mdb", ".lmdb"):
        return _lmdb(path)
    raise InputError(
        f"{path} is none of what can be imported: an LMDB (data.mdb), a folder of .pt files, or a folder or zip of "
        f".npy files with {DESCRIPTION}"
    )


def _lmdb(path: Path) -> Source:
    """Keys `0`, `1`, ... and `num_samples`; values are pickled dicts, as github.com/zhuyu-cs/MeanFlow writes them."""
    environment = open_lmdb(path)
    from lmdb import Error

    with environment.begin() as transaction:
        number = transaction.get(b"num_samples")
    written = environment.info()["last_txnid"]
    if number is None or not number.isdigit():
        raise InputError(f"{path} has no num_samples: it was not written to its end, or holds something else")

    def load(i: int) -> tuple[list[np.ndarray], Any]:
        try:
            with environment.begin() as transaction:
                data = transaction.get(str(i).encode())
        except Error as error:
            raise SampleError(str(error)) from None
        if data is None:
            raise SampleError("there is no such record")
        try:
            record = load_record(data)
        except Refused as refused:
            raise InputError(
                f"record {i} of {path} would run {refused}, if it were unpickled: refused. Only arrays, numbers and "
                "text are read; do not open this file with pickle"
            ) from None
        except ValueError as error:
            raise SampleError(str(error)) from None
        if "moments" not in record:
            raise SampleError(f"it has no moments, only {', '.join(map(str, record))}: latents are needed, not images")
        flips = [record[name] for name in ("moments", "moments_flip") if name in record]
        return [_from_log_variance(_array(moments, "moments")) for moments in flips], record.get("label")

    fingerprint = f"{int(number)} samples, transaction {written}"
    return Source("lmdb", int(number), fingerprint, None, lambda i: f"record {i} of {path}", load)


def _from_log_variance(moments: np.ndarray) -> np.ndarray:
    """(2 C, H, W) of mean and log variance to mean and standard deviation."""
    if moments.ndim != 3 or len(moments) % 2:
        raise SampleError(f"{moments.shape} is not (2 C, H, W), mean and log variance")
    mean, log_variance = np.split(moments.astype(np.float32), 2)
    if (log_variance >= 0).all():
        raise SampleError("the second half of the channels is nowhere negative, so it is no log variance")
    return np.concatenate([mean, np.exp(0.5 * log_variance.clip(*LOG_VARIANCE_RANGE))])


def _pt(path: Path, files: list[str]) -> Source:
    """One file per sample, as the latent data sets of the paper's code: no mirror images."""

    def load(i: int) -> tuple[list[np.ndarray], Any]:
        try:
            record = torch.load(path / files[i], map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused:
                raise InputError(
                    f"{path / files[i]} would run {refused[1]}, if it were unpickled: refused. Only tensors, numbers "
                    "and text are read; do not open this file with torch.load(weights_only=False)"
                ) from None
            raise SampleError(str(error).partition("\n")[0]) from None
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise SampleError(str(error).partition("\n")[0]) from None
        if not isinstance(record, dict) or not isinstance(record.get("image"), torch.Tensor):
            raise SampleError("it is not a dict with a tensor image")
        return [_array(record["image"].detach().float().numpy(), "image")], record.get("label")

    sizes = (f"{name} {(path / name).stat().st_size}" for name in files)
    fingerprint = hashlib.sha256("\n".join(sizes).encode()).hexdigest()
    return Source("pt", len(files), fingerprint, None, lambda i: str(path / files[i]), load)


def _npy(path: Path, description: bytes, read: Callable[[str], bytes]) -> Source:
    """`dataset.json` {"labels": [[name, label], ...]} and the files that it names, as EDM2's dataset_tool.py writes."""
    try:
        content = json.loads(description)
        if "shards" in content:
            raise InputError(f"{path} is a data set of mfengine already")
        labels = [(str(name), label) for name, label in content["labels"]]
        if not all(isinstance(label, int) for _, label in labels):
            raise InputError(f"{path / DESCRIPTION} has labels that are not integers, as {labels[0][1]}")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path / DESCRIPTION} has no labels [[name, label], ...]: {error!r}") from None

    def load(i: int) -> tuple[list[np.ndarray], Any]:
        name, label = labels[i]
        try:
            moments = np.load(BytesIO(read(name)), allow_pickle=False)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise SampleError(str(error).partition("\n")[0]) from None
        moments = _array(moments, "it")
        return [moments[0] if moments.ndim == 4 and len(moments) == 1 else moments], label

    num_classes = max((label for _, label in labels), default=0) + 1
    fingerprint = hashlib.sha256(description).hexdigest()
    return Source("npy", len(labels), fingerprint, num_classes, lambda i: str(path / labels[i][0]), load)
