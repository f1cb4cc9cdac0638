"""What a format of prepared latents must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class SampleError(Exception):
    """One sample cannot be read; the message is the reason."""


class Importer(ABC):
    """A file or folder of prepared latents, before they are checked.

    Args:
        path: where they are.

    Attributes:
        count: of the samples.
        fingerprint: changes when the source does.
        num_classes: None where only reading every sample would tell.

    Raises:
        InputError: the path is of this format, but cannot be read.
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
        """The name by which the user knows a sample."""

    @abstractmethod
    def load(self, index: int) -> tuple[list[np.ndarray], Any]:
        """Mean and standard deviation, joined (2 C, H, W), of each flip, and the label.

        Raises:
            SampleError: the sample cannot be read.
            InputError: nothing of this source must be read.
        """


def float_array(value: Any, name: str) -> np.ndarray:
    """`value` if it is an array of floats; otherwise SampleError that calls it `name`."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise SampleError(f"{name} is not an array of floats but {type(value).__name__}")
    return value


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
