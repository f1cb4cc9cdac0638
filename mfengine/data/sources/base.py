"""The interface of a source of labelled images."""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np


class Source(ABC):
    """Labelled images: listed once, then read one by one, still encoded. It is pickled for the other ranks.

    Args:
        path: where they are.
        one_class: all images have label 0; no labels are read.

    Attributes:
        names: unique names of the images.
        labels: (count,) int64.
        class_names: in the order of the labels; () if only numbers are known.
        fingerprint: of names, labels and sizes.

    Raises:
        InputError: the source cannot be listed, or an image has no label.
    """

    kind: ClassVar[str]
    """what messages call it"""

    def __init__(self, path: Path, one_class: bool) -> None:
        self.path = path
        self.class_names: tuple[str, ...] = ()
        self.names: list[str] = []
        labels: list[int] = []
        digest = hashlib.sha256()
        for name, label, size in self._list(one_class):
            self.names.append(name)
            labels.append(label)
            digest.update(f"{name}\0{label}\0{size}\n".encode(errors="surrogateescape"))
        self.labels = np.array(labels, np.int64)
        self.fingerprint = digest.hexdigest()

    @staticmethod
    @abstractmethod
    def recognises(path: Path) -> bool:
        """Whether an existing path is a source of this kind."""

    @abstractmethod
    def _list(self, one_class: bool) -> Iterator[tuple[str, int, int]]:
        """Name, label and size in bytes of each image."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """An encoded image; any thread may call it. OSError if it cannot be read."""


def parse_label(data: bytes, extension: str = ".cls") -> int | None:
    """The label: the digits in a .cls, or "label" in a .json. None unless it is an integer from 0."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        label = int(data) if extension == ".cls" else int(json.loads(data)["label"])
        return label if label >= 0 else None
    return None
