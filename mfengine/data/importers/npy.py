"""Folders or zips of `.npy` files, written by REPA and EDM2 (dataset_tools.py encode)."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mfengine.data.format import DESCRIPTION
from mfengine.data.importers.base import Importer, SampleError, first_line, float_array
from mfengine.errors import InputError


class NPYImporter(Importer):
    """Arrays (2 C, H, W) without mirror images, listed in `dataset.json`: {"labels": [[name, label], ...]}."""

    format = "npy"

    def __init__(self, path: Path) -> None:
        if path.is_file():
            self._read: Callable[[str], bytes] = zipfile.ZipFile(path).read
        else:
            if (path / "vae-sd" / DESCRIPTION).is_file():  # REPA's folder, with images beside the latents
                path /= "vae-sd"
            self._read = lambda name: (path / name).read_bytes()
        self._path, description = path, self._read(DESCRIPTION)
        try:
            content = json.loads(description)
            if "shards" in content:
                raise InputError(f"{path} is already a data set of mfengine: it needs no import")
            self._labels = [(str(name), label) for name, label in content["labels"]]
            wrong = [label for _, label in self._labels if not isinstance(label, int) or label < 0]
            if wrong:
                raise InputError(f"{path / DESCRIPTION} has labels that are not integers from 0, such as {wrong[0]}")
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path / DESCRIPTION} has no labels [[name, label], ...]: {error!r}") from None
        self.count = len(self._labels)
        self.num_classes = max((label for _, label in self._labels), default=0) + 1
        self.fingerprint = hashlib.sha256(description).hexdigest()

    @staticmethod
    def recognises(path: Path) -> bool:
        if path.is_dir():
            return any((folder / DESCRIPTION).is_file() for folder in (path, path / "vae-sd"))
        return zipfile.is_zipfile(path) and DESCRIPTION in zipfile.ZipFile(path).namelist()

    def name_of(self, index: int) -> str:
        return str(self._path / self._labels[index][0])

    def load(self, index: int) -> tuple[list[np.ndarray], Any]:
        name, label = self._labels[index]
        try:
            moments = np.load(BytesIO(self._read(name)), allow_pickle=False)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise SampleError(first_line(error)) from None
        moments = float_array(moments, "it")
        return [moments[0] if moments.ndim == 4 and len(moments) == 1 else moments], label
