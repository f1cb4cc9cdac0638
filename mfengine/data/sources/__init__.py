"""Where images come from: one file per kind of source."""

from __future__ import annotations

from pathlib import Path

from mfengine.data.image_files import SUFFIXES
from mfengine.data.sources.base import Source
from mfengine.data.sources.folder import FolderSource
from mfengine.data.sources.lmdb import LMDBSource
from mfengine.data.sources.tar import TarSource
from mfengine.errors import InputError

SOURCES: tuple[type[Source], ...] = (TarSource, LMDBSource, FolderSource)
"""The first that recognises a path takes it."""


def open_source(path: Path, one_class: bool = False) -> Source:
    """List the images of a source.

    Args:
        path: one that one of `SOURCES` recognises.
        one_class: all images are of one class, in whatever folders they lie, and labels are not looked for.

    Raises:
        InputError: nothing recognises the path, it has no images, or a single class without `one_class`.
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
        hint = f"if the classes are the folders in {inner}, give that; " if inner.is_dir() else ""
        raise InputError(f"{path} has one class, {only}: {hint}if one class is meant, add --one-class")
    return source
