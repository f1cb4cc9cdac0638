"""When and how checkpoints are written. `test_run_folder.py` tests how they are read."""

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import SMALL, checkpoint_contents, run_command
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from mfengine.engine import checkpoint, trainer
from mfengine.engine.checkpoint import Checkpointer
from mfengine.ranks import World


def run(name, *args, digits, cwd):
    command = ("mfengine.train", *SMALL, f"--data={digits}", f"--name={name}", "--keep=9", *args)
    done = run_command(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / name / "checkpoints"


def assert_same(actual, expected):
    actual, expected = checkpoint_contents(actual), checkpoint_contents(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value) if isinstance(value, torch.Tensor) else actual[name] == value, name


def test_background_checkpoints_equal_synchronous_ones(digits, tmp_path, monkeypatch):
    args = ("--steps=3", "--checkpoint-every=1")
    waiting = run("waiting", *args, digits=digits, cwd=tmp_path)
    trained = threading.Event()
    step, save = trainer.Trainer._train_step, dcp.save

    def step_and_tell(self, caught):
        result = step(self, caught)
        trained.set()
        return result

    def save_after_a_step(*args, **kwargs):
        trained.clear()
        trained.wait(timeout=5)  # the weights change before they are written, except after the last step
        return save(*args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "_train_step", step_and_tell)
    monkeypatch.setattr(dcp, "save", save_after_a_step)
    given = {"asynchronous": True}
    monkeypatch.setattr(trainer, "Checkpointer", lambda *args, **options: Checkpointer(*args, **options | given))
    background = run("background", *args, digits=digits, cwd=tmp_path)
    names = [path.name for path in sorted(waiting.iterdir())]
    assert names == [path.name for path in sorted(background.iterdir())] == [f"step-{i:08d}" for i in range(1, 4)]
    for name in names:
        assert_same(background / name, waiting / name)


def test_writer_uses_its_ranks_gpu_and_reuses_pinned_memory(tmp_path, monkeypatch):
    devices, options, written = [], [], []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, threading.get_ident())))
    monkeypatch.setattr(dcp, "save", lambda state, **_: written.append((state["x"].data_ptr(), threading.get_ident())))

    def stager(config):
        options.append(config)
        return DefaultStager(StagingOptions(False, False, False, False))

    monkeypatch.setattr(checkpoint, "DefaultStager", stager)
    device, x = torch.device("cuda", 3), torch.ones(5)
    checkpointer = Checkpointer(tmp_path, World(0, 1, device), keep=2, asynchronous=True)
    for step in (1, 2):
        checkpointer.save(step, {"x": x}, {})
        checkpointer.wait()
    assert (options[0].use_pinned_memory, options[0].use_non_blocking_copy) == (True, True)
    ((where, thread),) = devices
    assert where == device
    assert {writer for _, writer in written} == {thread}
    assert thread != threading.get_ident()
    assert len({address for address, _ in written} - {x.data_ptr()}) == 1


def no_space(*args, **kwargs):
    Path(kwargs["storage_writer"].path).mkdir(parents=True)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failed_write_leaves_nothing(asynchronous, tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, World(0, 1, torch.device("cpu")), keep=2, asynchronous=asynchronous)
    for step, save in ((1, dcp.save), (2, no_space), (3, dcp.save)):
        monkeypatch.setattr(dcp, "save", save)
        checkpointer.save(step, {"x": torch.ones(5)}, {})
        checkpointer.wait()
        if step == 2:
            folder = tmp_path / "checkpoints"
            assert checkpointer.failed == (
                f"cannot write {folder}/step-00000002: No space left on device; last complete checkpoint: "
                f"{folder}/step-00000001"
            )
            assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert checkpointer.failed is None
    assert len(checkpointer.notes) == 1
    assert checkpointer.newest == folder / "step-00000003"


def test_training_continues_if_a_checkpoint_does_not_fit(digits, tmp_path, monkeypatch):
    save, calls = dcp.save, []

    def save_where_there_is_room(*args, **kwargs):
        calls.append(kwargs)
        return no_space(*args, **kwargs) if len(calls) in fails else save(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", save_where_there_is_room)
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=3", "--checkpoint-every=1")
    fails = (1,)
    done = run_command(*args, "--name=first", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    warning = "warning: cannot write runs/first/checkpoints/step-00000001: No space left on device"
    assert f"{warning}; last complete checkpoint: none; training goes on" in done.stderr
    assert sorted(path.name[-1] for path in (tmp_path / "runs/first/checkpoints").iterdir()) == ["2", "3"]
    fails = (6,)  # the last step of the second run
    done = run_command(*args, "--name=last", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: cannot write runs/last/checkpoints/step-00000003: No space left on device; last complete checkpoint: "
        "runs/last/checkpoints/step-00000002"
    )


def test_failed_removal_of_an_old_checkpoint_is_reported(tmp_path, monkeypatch):
    def in_use(path, **_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    checkpointer = Checkpointer(tmp_path, World(0, 1, torch.device("cpu")), keep=1, asynchronous=False)
    checkpointer.save(1, {"x": torch.ones(5)}, {})
    monkeypatch.setattr(shutil, "rmtree", in_use)
    checkpointer.save(2, {"x": torch.ones(5)}, {})
    assert checkpointer.notes == [f"cannot remove {tmp_path}/checkpoints/step-00000001: Device or resource busy"]
    assert (checkpointer.newest.name, checkpointer.failed) == ("step-00000002", None)


def test_checkpoint_minutes(digits, tmp_path, monkeypatch):
    """Every few minutes by rank 0's clock, counted from the last checkpoint; the weights are unchanged."""
    expected = run("steps", "--steps=10", "--checkpoint-every=4", digits=digits, cwd=tmp_path)
    now, train_step = 0, trainer.Trainer._train_step

    def slow_step(*args):
        nonlocal now
        now += 20
        return train_step(*args)

    monkeypatch.setattr(trainer.Trainer, "_train_step", slow_step)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: now))
    timed = run("timed", "--steps=10", "--checkpoint-every=4", "--checkpoint-minutes=1", digits=digits, cwd=tmp_path)
    assert [path.name[-2:] for path in sorted(timed.iterdir())] == ["03", "04", "07", "08", "10"]
    assert_same(timed.parent, expected.parent)
