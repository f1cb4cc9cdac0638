"""A lock that reserves a run folder for one job."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mfengine.errors import InputError
from mfengine.files import writing

LOCK = ".lock"

# Errors of file systems without locks. EAGAIN and EACCES mean that another process holds the lock.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def hold(folder: Path) -> Iterator[str | None]:
    """Hold an exclusive lock on a run folder. The folder is created if needed, and removed again if it stays empty.

    The lock is a POSIX record lock: NFS forwards it to the server, child processes do not inherit it, and the operating
    system releases it however the process ends.

    Args:
        folder: the run's folder.

    Yields:
        None, or a line that says why other jobs are not locked out: the file system has no locks.

    Raises:
        InputError: another process, named in the message, holds the lock, or the folder is not writable.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK
    with writing(path):
        handle, warning = _lock(path)
    try:
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "torchrun": launcher, "since": since}
        with suppress(OSError):  # on a full disk the lock holds, but does not say who holds it
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(owner).encode())
        yield warning
    finally:
        with suppress(OSError):  # a failed clean-up must not block the next job
            path.unlink()
            for folder in made:
                folder.rmdir()
        os.close(handle)


def _lock(path: Path) -> tuple[int, str | None]:
    """The lock file, open and locked, and why other jobs may not be locked out, or None."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        warning = None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                owner = os.pread(handle, 4096, 0)
                os.close(handle)
                raise InputError(f"{path.parent} is in use by {_describe(owner)}") from None
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
            warning = error.strerror
        if warning is None and _local_locks(handle):
            warning = "its locks are local to this host"
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                said = f"cannot lock {path.parent} against other jobs ({warning}): start only one in it"
                return handle, said if warning else None
        os.close(handle)  # the holder removed the file just now: try again


def _describe(owner: bytes) -> str:
    """Who holds the lock, and how to end it if its torchrun was killed."""
    try:
        values = json.loads(owner)
        host, pid, torchrun = values["host"], values["pid"], values["torchrun"]
        described = f"process {pid} on {host} since {values['since']}"
    except (ValueError, KeyError, TypeError):  # the holder is writing it
        return "another process"
    if torchrun is not None and host == socket.gethostname() and not Path(f"/proc/{torchrun}").exists():
        return f"{described}, whose torchrun (process {torchrun}) has ended: end it with kill {pid}"
    return f"{described}: wait for it, or choose another --name"


def _local_locks(handle: int) -> bool:
    """Whether other hosts do not see the file system's locks: NFS mounted with nolock."""
    device = os.fstat(handle).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if line.split()[2] == number:
                return bool(re.search(r"\blocal_lock=(posix|all)\b|\blocalflock\b", line))
    return False
