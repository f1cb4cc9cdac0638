"""Images in tars of WebDataset's format."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mfengine.data.image_files import SUFFIXES
from mfengine.data.sources.base import Source, parse_label
from mfengine.errors import InputError
from mfengine.progress import progress


class TarSource(Source):
    """Images in a .tar or a folder of them. Beside each is a `.cls` with digits, or a `.json` with a "label"."""

    kind = "WebDataset tars"

    @staticmethod
    def recognises(path: Path) -> bool:
        return path.suffix == ".tar" or any(path.glob("*.tar"))

    def _list(self, one_class: bool) -> Iterator[tuple[str, int, int]]:
        self._tars = [self.path] if self.path.suffix == ".tar" else sorted(self.path.glob("*.tar"))
        places: list[tuple[int, int, int]] = []
        with progress(len(self._tars), "tars", "listing") as bar:
            for number, path in enumerate(self._tars):
                for name, label, offset, size in _list_tar(path, one_class):
                    places.append((number, offset, size))
                    yield name, label, size
                bar.update()
        self._places = np.array(places)  # (count, 3): tar, offset, bytes

    def read(self, index: int) -> bytes:
        tar, offset, size = self._places[index]
        with self._tars[tar].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _list_tar(path: Path, one_class: bool) -> Iterator[tuple[str, int, int, int]]:
    """Name, label, offset and bytes of each image in a tar."""
    images: dict[str, tuple[str, int, int]] = {}  # key -> name, offset, bytes
    labels: dict[str, int | None] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                key, _, extension = file.partition(".")
                key, extension = f"{folder}/{key}", f".{extension.lower()}"
                if extension in SUFFIXES:
                    images[key] = (f"{path.name}/{member.name}", member.offset_data, member.size)
                elif extension in (".cls", ".json") and labels.get(key) is None and not one_class:
                    labels[key] = parse_label(tar.extractfile(member).read(), extension)  # type: ignore[union-attr]
            end = tar.offset
        with path.open("rb") as data:  # tarfile takes a damaged header for the end of the file
            data.seek(end)
            if data.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise InputError(f"{path} is damaged or cut off at byte {end}")
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    for key, (name, offset, size) in images.items():
        label = 0 if one_class else labels.get(key)
        if label is None:
            raise InputError(f'{name} has no label: it needs a .cls with an integer from 0, or a .json with a "label"')
        yield name, label, offset, size
