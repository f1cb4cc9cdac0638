"""Images in an LMDB, and the function that opens LMDBs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mfengine.data.sources.base import Source, parse_label
from mfengine.errors import InputError

OPENING = threading.Lock()  # LMDB refuses to open a file twice in one process


class LMDBSource(Source):
    """Images under the keys `image-000000001`, ... and their labels, in digits, under `label-000000001`, ..."""

    kind = "an LMDB"

    _environment: Any = None  # of this process; opened when it reads its first image

    @staticmethod
    def recognises(path: Path) -> bool:
        return path.suffix == ".mdb" or (path.is_file() and path.suffix == ".lmdb") or (path / "data.mdb").exists()

    def _list(self, one_class: bool) -> Iterator[tuple[str, int, int]]:
        damaged = lmdb_errors(lambda reason: InputError(f"{self.path} is damaged: {reason}"))
        with open_lmdb(self.path) as environment, damaged, environment.begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                name = bytes(key).decode(errors="replace")
                if not name.startswith("image-"):
                    continue
                label = transaction.get(name.replace("image-", "label-", 1).encode())
                label = 0 if one_class else label and parse_label(bytes(label))
                if label is None:
                    raise InputError(f"{name} of {self.path} has no label: label-... must be an integer from 0")
                yield name, label, len(value)

    def read(self, index: int) -> bytes:
        with OPENING:
            if self._environment is None:
                self._environment = open_lmdb(self.path)
        with lmdb_errors(OSError), self._environment.begin() as transaction:
            value: bytes = transaction.get(self.names[index].encode())
            return value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": None}


@contextmanager
def lmdb_errors(kind: Callable[[str], Exception]) -> Iterator[None]:
    """Turn LMDB's errors into those that `kind` makes."""
    import lmdb

    try:
        yield
    except lmdb.Error as error:
        raise kind(str(error)) from None


def open_lmdb(path: Path) -> Any:
    """An LMDB's environment, for reading; InputError if it cannot be opened."""
    try:
        import lmdb
    except ImportError:
        raise InputError(f"{path} is an LMDB and needs the lmdb library: pip install 'mfengine[lmdb]'") from None
    with lmdb_errors(lambda reason: InputError(f"cannot open {path}: {reason}")):
        environment = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
    # LMDB maps the file: reading a page beyond its end would kill the process.
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    there = (path / "data.mdb" if path.is_dir() else path).stat().st_size
    if there < needed:
        raise InputError(f"{path} is cut off: it has {there} bytes of {needed}")
    return environment
