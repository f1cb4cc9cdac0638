"""Files of a checkpoint: DCP writes them with checksums, and reads them without executing anything.

A pickle is a program, and DCP reads pickles: `.metadata`, which lists the contents of a checkpoint, and every value
that is not a tensor. Here `.metadata` may use only the names that DCP writes into it, and values are unpickled like
weights (`weights_only`).
"""

from __future__ import annotations

import io
import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import ReadItem

from mfengine.pickles import Refused, load_tensors
from mfengine.torch_private import checkpoint_names

METADATA = ".metadata"
_Place, _MemoryFormat, _layout = checkpoint_names()

# ----------------------------------------------------------------------------
# Checksums.


class Sum(NamedTuple):
    """Size in bytes and CRC-32 of a file."""

    bytes: int
    crc32: int


def intact(path: Path, expected: Sum) -> bool:
    """Whether a file can be read and has the expected checksum."""
    crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
    except OSError:
        return False
    return crc == expected.crc32


class Writer(dcp.FileSystemWriter):
    """DCP's writer. `sums` has the size and checksum of each file that this rank has written, by name.

    They are computed from the data to write, not read back from the disk.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sums: dict[str, Sum] = {}
        self.fs = _SummedFiles(self.sums)


class _SummedFiles(FileSystem):
    def __init__(self, sums: dict[str, Sum]) -> None:
        self._sums = sums

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with _Summed(io.FileIO(path, mode)) as stream:
            yield stream
        # DCP renames `.metadata` when it is complete.
        self._sums[Path(path).name.removesuffix(".tmp")] = Sum(Path(path).stat().st_size, stream.crc)


class _Summed(io.BufferedWriter):
    """A file that is written sequentially."""

    crc = 0

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return super().write(data)


# ----------------------------------------------------------------------------
# Reading.


class Reader(dcp.FileSystemReader):
    """DCP's reader, with a restricted unpickler for `.metadata`, the list of contents.

    Raises:
        OSError: the list cannot be read.
        Refused: it contains a name that DCP does not write.
        ValueError: it is not such a list.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / METADATA).open("rb") as file:
            try:
                self._metadata = _Unpickler(file).load()
            except Refused:
                raise
            except Exception as error:  # a file that is not a pickle makes the unpickler fail in many ways
                raise ValueError(f"{METADATA} is not a pickle of DCP's: {' '.join(str(error).split())}") from None
        places = getattr(self._metadata, "storage_data", None)
        if not isinstance(self._metadata, records.Metadata) or not isinstance(places, dict):
            raise ValueError(f"{METADATA} does not list the contents")
        for place in places.values():
            name = getattr(place, "relative_path", None)
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{METADATA} names files outside the checkpoint")

    def read_metadata(self, *args: Any, **kwargs: Any) -> records.Metadata:
        return self._metadata


class Planner(dcp.DefaultLoadPlanner):
    """DCP's planner. A value that is not a tensor must be bytes, which are unpickled with `weights_only`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # DCP unpickles what it gets here, so it gets a pickle made by this process.
        content, harmless = load_tensors(value), io.BytesIO()
        if not isinstance(content, bytes):
            raise ValueError(f"{read_item.dest_index.fqn} must be bytes, not {type(content).__name__}")
        torch.save(content, harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) not in _NAMES:
            raise Refused(f"{module}.{name}")
        return _NAMES[module, name]


class _Sealed(type):
    """A name in a pickle, which the pickle can only call: it could modify a real class."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise Refused(f"setattr({cls.__name__}, {name!r})")


def _sealed(name: str, call: Callable[..., Any]) -> _Sealed:
    return _Sealed(name, (), {"__new__": lambda _, *args: call(*args)})


def _instance(cls: type) -> Callable[..., Any]:
    return lambda *args: cls.__new__(cls, *args)


_CLASSES = (
    records.Metadata,
    records.MetadataIndex,
    records.StorageMeta,
    records.TensorStorageMetadata,
    records.BytesStorageMetadata,
    records.ChunkStorageMetadata,
    records.TensorProperties,
    _Place,
)
_NAMES: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__name__): _sealed(cls.__name__, _instance(cls)) for cls in _CLASSES},
    **{(call.__module__, call.__name__): _sealed(call.__name__, call) for call in (torch.Size, _MemoryFormat, _layout)},
    # Paths, which are not needed, of where the checkpoint was written; Python 3.13 has them in a module of their own.
    **{(module, "PosixPath"): _sealed("PosixPath", lambda *_: None) for module in ("pathlib", "pathlib._local")},
}
