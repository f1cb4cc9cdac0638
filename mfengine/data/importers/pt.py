"""Folders of `.pt` files, written by the paper's JAX code."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfengine.data.importers.base import Importer, SampleError, first_line, float_array
from mfengine.errors import InputError
from mfengine.pickles import Refused, load_tensors


class PTImporter(Importer):
    """One file per sample, without mirror images: a dict with a tensor `image` and `label`."""

    format = "pt"

    def __init__(self, path: Path) -> None:
        self._files = sorted(path.glob("*.pt"))
        if not self._files:
            inner = min(path.glob("*/*.pt")).parent
            raise InputError(f"{path} has .pt files only in subfolders: give {inner}")
        self.count = len(self._files)
        sizes = "\n".join(f"{file.name} {file.stat().st_size}" for file in self._files)
        self.fingerprint = hashlib.sha256(sizes.encode()).hexdigest()

    @staticmethod
    def recognises(path: Path) -> bool:
        return any(path.glob("*.pt")) or any(path.glob("*/*.pt"))

    def name_of(self, index: int) -> str:
        return str(self._files[index])

    def load(self, index: int) -> tuple[list[np.ndarray], Any]:
        try:
            record = load_tensors(self._files[index])
        except Refused as refused:
            raise InputError(
                f"{self._files[index]} would run {refused} when unpickled: refused. Only tensors, "
                "numbers and text are read; do not open this file with torch.load(weights_only=False)"
            ) from None
        except (OSError, ValueError) as error:
            raise SampleError(first_line(error)) from None
        if not isinstance(record, dict) or not isinstance(record.get("image"), torch.Tensor):
            raise SampleError("it must be a dict with a tensor `image`")
        return [float_array(record["image"].detach().float().numpy(), "image")], record.get("label")
