"""The interface of an importer of prepared latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class SampleError(Exception):
    """One sample cannot be read; the message is the reason."""


class Importer(ABC):
    """A file or folder of prepared latents, not yet checked.

    Args:
        path: where they are.

    Attributes:
        count: number of samples.
        fingerprint: changes when the source changes.
        num_classes: None if only reading every sample would tell.

    Raises:
        InputError: the path has this format but cannot be read.
    """

    format: ClassVar[str]
    count: int
    fingerprint: str
    num_classes: int | None = None

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @staticmethod
    @abstractmethod
    def recognises(path: Path) -> bool:
        """Whether an existing path is of this format."""

    @abstractmethod
    def name_of(self, index: int) -> str:
        """The name by which the user finds a sample."""

    @abstractmethod
    def load(self, index: int) -> tuple[list[np.ndarray], Any]:
        """For each flip, mean and standard deviation joined as (2 C, H, W); and the label.

        Raises:
            SampleError: the sample cannot be read.
            InputError: the source is unsafe, and reading must stop.
        """


def float_array(value: Any, name: str) -> np.ndarray:
    """`value` if it is an array of floats; otherwise a SampleError that calls it `name`."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise SampleError(f"{name} must be an array of floats, not {type(value).__name__}")
    return value


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
