"""Sources of images: one file per kind."""

from __future__ import annotations

from pathlib import Path

from mfengine.data.image_files import SUFFIXES
from mfengine.data.sources.base import Source
from mfengine.data.sources.folder import FolderSource
from mfengine.data.sources.lmdb import LMDBSource
from mfengine.data.sources.tar import TarSource
from mfengine.errors import InputError

SOURCES: tuple[type[Source], ...] = (TarSource, LMDBSource, FolderSource)
"""In this order: the first source that recognises a path takes it."""


def open_source(path: Path, one_class: bool = False) -> Source:
    """List the images of a source.

    Args:
        path: a path that one of `SOURCES` recognises.
        one_class: all images belong to one class, whatever their folders; no labels are read.

    Raises:
        InputError: nothing recognises the path, it has no images, or there is a single class without `one_class`.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    kind = next((kind for kind in SOURCES if kind.recognises(path)), None)
    if kind is None:
        raise InputError(f"{path} is neither a folder, a .tar nor an LMDB")
    source = kind(path, one_class)
    if not source.names:
        raise InputError(f"{path}, {source.kind}, has no images ({', '.join(SUFFIXES)}, or keys image-000000001, ...)")
    if not one_class and source.labels.max() == 0:
        (only,) = source.class_names or ("0",)
        inner = path / only
        hint = f"if the folders in {inner} are the classes, give that folder; " if inner.is_dir() else ""
        raise InputError(f"{path} has only the class {only}: {hint}if there is only one class, add --one-class")
    return source
