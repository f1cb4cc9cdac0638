"""Atomic writes of files and folders, on file systems with and without fsync."""

import errno
import os

import pytest
import torch

from mfengine.data.pictures import save_picture
from mfengine.engine.checkpoint import Checkpointer
from mfengine.errors import InputError
from mfengine.files import write_atomic
from mfengine.ranks import World


@pytest.fixture
def refuse_sync(monkeypatch):
    """Make fsync of folders fail with an error number."""

    def refuse(number):
        fsync = os.fsync

        def without_folders(handle):
            if os.path.isdir(f"/proc/self/fd/{handle}"):
                raise OSError(number, os.strerror(number))
            fsync(handle)

        monkeypatch.setattr(os, "fsync", without_folders)

    return refuse


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_file_systems_that_cannot_sync_folders(tmp_path, refuse_sync, number):
    refuse_sync(number)
    write_atomic(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}"
    checkpointer = Checkpointer(tmp_path, World(0, 1, torch.device("cpu")), keep=1, asynchronous=False)
    checkpointer.save(7, {"x": torch.ones(2)}, {})
    assert (tmp_path / "checkpoints/step-00000007/checkpoint.json").is_file()


def test_failed_disk_is_an_error(tmp_path, refuse_sync):
    refuse_sync(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(tmp_path / "a.json", "{}")


def half_written(path):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_failed_write_changes_nothing(tmp_path):
    write_atomic(tmp_path / "a.bin", b"whole")
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a.bin", half_written)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.bin": b"whole"}


def test_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file/a\.png: File exists"):
        save_picture(torch.zeros(3, 8, 8), tmp_path / "file/a.png")
