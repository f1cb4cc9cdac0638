"""Where images come from: folders, WebDataset tars, LMDBs. Listed once, then read one by one, still encoded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mfengine.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


class Source(Protocol):
    """Labelled images.

    Attributes:
        kind: what it is, in words.
        names: of the images, unique.
        labels: (count,) int64.
        class_names: in the order of the labels; () where only numbers are known.
        fingerprint: of names, labels and sizes.
    """

    @property
    def kind(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...

    def read(self, index: int) -> bytes:
        """An image as it is encoded; from any thread. OSError if it cannot be read."""
        ...


def open_source(path: Path, one_class: bool = False) -> Source:
    """List the images of a source.

    Args:
        path: a folder with a folder per class; a .tar, or a folder of them, in WebDataset's form; an LMDB.
        one_class: all images are of one class, in whatever folders they lie, and labels are not looked for.

    Raises:
        InputError: it is none of these, has no images, or has a single class without `one_class`.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar"))
    source: Source
    if tars:
        source = TarSource.scan(tars, one_class)
    elif path.suffix == ".mdb" or (path.is_file() and path.suffix == ".lmdb") or (path / "data.mdb").exists():
        source = LMDBSource.scan(path, one_class)
    elif path.is_dir():
        source = FolderSource.scan(path, one_class)
    else:
        raise InputError(f"{path} is neither a folder, a .tar nor an LMDB")
    if not source.names:
        where = "under keys such as image-000000001" if isinstance(source, LMDBSource) else f"({', '.join(EXTENSIONS)})"
        raise InputError(f"{path}, {source.kind}, has no images {where}")
    if not one_class and source.labels.max() == 0:
        (only,) = source.class_names or ("0",)
        inner = path / only
        hint = f"if the classes are the folders in {inner}, give that; " if inner.is_dir() else ""
        raise InputError(f"{path} has one class, {only}: {hint}if one class is meant, add --one-class")
    return source


def _fingerprint(names: Sequence[str], labels: np.ndarray, sizes: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for name, label, size in zip(names, labels.tolist(), sizes, strict=True):
        digest.update(f"{name}\0{label}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# A folder per class.


@dataclass(frozen=True)
class FolderSource:
    """Images in a folder per class, at any depth in it: the class folders' sorted names are labels 0, 1, ..."""

    folder: Path
    names: Sequence[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    kind: str = "a folder per class"

    @classmethod
    def scan(cls, folder: Path, one_class: bool) -> FolderSource:
        try:
            if one_class:
                classes = {"": sorted(_images(folder, ""))}
            else:
                inner = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
                classes = {name: sorted(_images(folder / name, f"{name}/")) for name in inner}
        except OSError as error:
            raise InputError(f"cannot list {folder}: {error}") from None
        if not classes and any(_images(folder, "")):
            raise InputError(
                f"{folder} has images but no folders: each class has a folder of its own; if one class is meant, "
                f"add --one-class"
            )
        empty = [name for name, images in classes.items() if not images]
        if any(classes.values()) and empty:
            raise InputError(f"{folder / empty[0]} has no images: each folder in {folder} is a class; remove it")
        names, sizes = [], []
        for images in classes.values():
            names += [name for name, _ in images]
            sizes += [size for _, size in images]
        labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes.values()])
        class_names = () if one_class else tuple(classes)
        return cls(folder, names, labels, class_names, _fingerprint(names, labels, sizes))

    def read(self, index: int) -> bytes:
        return (self.folder / self.names[index]).read_bytes()


def _images(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """(name from the source's folder, bytes) of each image in a folder or deeper; hidden ones are not."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(EXTENSIONS):
            size = -1  # of a link to nowhere, which will turn out broken when it is read
            with contextlib.suppress(OSError):
                size = entry.stat().st_size
            yield prefix + entry.name, size


# ----------------------------------------------------------------------------
# WebDataset.


@dataclass(frozen=True)
class TarSource:
    """Images in tars, beside a `.cls` with the label in digits, or a `.json` with a "label"."""

    tars: Sequence[Path]
    names: Sequence[str]
    labels: np.ndarray
    places: np.ndarray
    """(count, 3): tar, offset, bytes"""
    fingerprint: str
    class_names: tuple[str, ...] = ()
    kind: str = "WebDataset tars"

    @classmethod
    def scan(cls, tars: Sequence[Path], one_class: bool) -> TarSource:
        from tqdm import tqdm

        names, labels, places = [], [], []
        for number, path in enumerate(tqdm(tars, desc="listing", unit=" tars", disable=None, leave=False)):
            images: dict[str, tuple[str, int, int]] = {}  # by key: name, offset, bytes
            found: dict[str, int] = {}
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        if not member.isfile():
                            continue
                        folder, _, file = member.name.rpartition("/")
                        key, _, extension = file.partition(".")
                        key, extension = f"{folder}/{key}", f".{extension.lower()}"
                        if extension in EXTENSIONS:
                            images[key] = (f"{path.name}/{member.name}", member.offset_data, member.size)
                        elif extension in (".cls", ".json") and not one_class:
                            label = _label(tar.extractfile(member).read(), extension)  # type: ignore[union-attr]
                            if label is not None:
                                found[key] = label
                    _check_end(tar, path)
            except (OSError, tarfile.TarError) as error:
                raise InputError(f"cannot read {path}: {error}") from None
            for key, (name, offset, size) in images.items():
                label = 0 if one_class else found.get(key)
                if label is None or label < 0:
                    raise InputError(
                        f'{name} has no label: a .cls beside it with a number from 0, or a .json with a "label"'
                    )
                names.append(name)
                labels.append(label)
                places.append((number, offset, size))
        array = np.array(labels, np.int64)
        return cls(tars, names, array, np.array(places), _fingerprint(names, array, [size for *_, size in places]))

    def read(self, index: int) -> bytes:
        tar, offset, size = self.places[index]
        with self.tars[tar].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """InputError unless the archive ends as it should: tarfile takes a damaged header for the end."""
    with path.open("rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise InputError(f"{path} is damaged or cut off at byte {tar.offset}")


def _label(data: bytes, extension: str) -> int | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return int(data) if extension == ".cls" else int(json.loads(data)["label"])
    return None


# ----------------------------------------------------------------------------
# LMDB.


@dataclass(frozen=True)
class LMDBSource:
    """Images under the keys `image-000000001`, ... of an LMDB, and their labels, in digits, under `label-000000001`."""

    path: Path
    names: Sequence[str]
    labels: np.ndarray
    fingerprint: str
    class_names: tuple[str, ...] = ()
    kind: str = "an LMDB"
    _open: list[Any] = field(default_factory=list)  # this process's environment
    _lock: Any = field(default_factory=threading.Lock)  # while it is opened

    @classmethod
    def scan(cls, path: Path, one_class: bool) -> LMDBSource:
        names, labels, sizes = [], [], []
        with open_lmdb(path) as environment, _readable(path), environment.begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                name = bytes(key).decode(errors="replace")
                if not name.startswith("image-"):
                    continue
                label = transaction.get(name.replace("image-", "label-", 1).encode())
                label = 0 if one_class else label and _label(bytes(label), ".cls")
                if label is None or label < 0:
                    raise InputError(f"{name} of {path} has no label: a number from 0 under label-...")
                names.append(name)
                labels.append(label)
                sizes.append(len(value))
        array = np.array(labels, np.int64)
        return cls(path, names, array, _fingerprint(names, array, sizes))

    def read(self, index: int) -> bytes:
        with self._lock:
            if not self._open:
                self._open.append(open_lmdb(self.path))
        from lmdb import Error

        try:
            with self._open[0].begin() as transaction:
                value: bytes = transaction.get(self.names[index].encode())
                return value
        except Error as error:
            raise OSError(str(error)) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=[], _lock=threading.Lock())


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what LMDB says of a damaged file into one line."""
    from lmdb import Error

    try:
        yield
    except Error as error:
        raise InputError(f"{path} is damaged: {error}") from None


def open_lmdb(path: Path) -> Any:
    """An LMDB's environment, to read from; InputError if it cannot be opened."""
    try:
        import lmdb
    except ImportError:
        raise InputError(f"{path} is an LMDB, which the lmdb library reads: pip install 'mfengine[lmdb]'") from None
    try:
        environment = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"cannot open {path}: {error}") from None
    # LMDB maps the file: a page beyond its end would end the process.
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    there = (path / "data.mdb" if path.is_dir() else path).stat().st_size
    if there < needed:
        raise InputError(f"{path} is cut off: it has {there} bytes of {needed}")
    return environment
