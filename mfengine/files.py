"""Atomic writes: a file gets its name only when it is complete."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mfengine.errors import InputError

# Errors of file systems that cannot sync a folder, or anything: mostly network and FUSE file systems.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM)


def write_atomic(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file under a temporary name in the same folder, sync it, and rename it to `path`.

    Args:
        path: an existing file is replaced. The folder must exist.
        content: text, bytes, or a function that writes the file whose path it is given; that path has the suffix of
            `path`.

    Raises:
        OSError: the file cannot be written. `path` is then unchanged, and the temporary file is removed.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the content of a file, or renames in a folder, survive a power cut, if the file system supports it.

    Raises:
        OSError: the disk failed or is full.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def check_writable(path: Path) -> None:
    """InputError unless a file can be created in the folder of `path`, or in its nearest existing parent."""
    folder = next(above for above in path.absolute().parents if above.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: {folder} is not a writable folder")


def check_file(path: Path) -> None:
    """InputError if `path` is a folder, or if its folder does not exist or is not writable."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    check_writable(path)


@contextmanager
def writing(path: Path, kind: Callable[[str], InputError] = InputError) -> Iterator[None]:
    """Convert an OSError inside to a one-line `kind` of InputError."""
    try:
        yield
    except OSError as error:
        raise kind(f"cannot write {path}: {error.strerror or error}") from None
