"""Images in one folder per class."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mfengine.data.image_files import SUFFIXES
from mfengine.data.sources.base import Source
from mfengine.errors import InputError


class FolderSource(Source):
    """Images in one folder per class, at any depth. The sorted names of the class folders give labels 0, 1, ..."""

    kind = "a folder per class"

    @staticmethod
    def recognises(path: Path) -> bool:
        return path.is_dir()

    def _list(self, one_class: bool) -> Iterator[tuple[str, int, int]]:
        folder = self.path
        try:
            if one_class:
                classes = {"": sorted(_images(folder, ""))}
            else:
                inner = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
                classes = {name: sorted(_images(folder / name, f"{name}/")) for name in inner}
                self.class_names = tuple(classes)
        except OSError as error:
            raise InputError(f"cannot list {folder}: {error}") from None
        if not classes and any(_images(folder, "")):
            raise InputError(
                f"{folder} has images but no subfolders: each class needs a folder of its own; if there is only one "
                f"class, add --one-class"
            )
        empty = [name for name, images in classes.items() if not images]
        if any(classes.values()) and empty:
            raise InputError(f"{folder / empty[0]} has no images: each folder in {folder} is a class; remove it")
        for label, images in enumerate(classes.values()):
            for name, size in images:
                yield name, label, size

    def read(self, index: int) -> bytes:
        return (self.path / self.names[index]).read_bytes()


def _images(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """(path below the source's folder, bytes) of each image in a folder, at any depth, except hidden ones."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(SUFFIXES):
            size = -1  # a dangling link: it counts as broken when it is read
            with contextlib.suppress(OSError):
                size = entry.stat().st_size
            yield prefix + entry.name, size
