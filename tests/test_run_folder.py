"""A run folder has one job at a time, resumes from the newest complete checkpoint, and survives signals."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SMALL, checkpoint_contents, forks, run_command, run_in_fork

from mfengine.engine import checkpoint, lock
from mfengine.engine.checkpoint import checkpoints_of, newest_checkpoint
from mfengine.engine.telemetry import METRICS
from mfengine.engine.weights import load_model
from mfengine.errors import InputError


@pytest.fixture(scope="module")
def two_steps(digits, tmp_path_factory):
    """The folder of a run with checkpoints after steps 1 and 2."""
    cwd = tmp_path_factory.mktemp("two")
    done = run_command("mfengine.train", *SMALL, f"--data={digits}", "--steps=2", "--checkpoint-every=1", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs/digits"


# ----------------------------------------------------------------------------
# The lock.


def hold_until_killed(run, held):
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
    with lock.hold(run):
        held.set()
        time.sleep(600)


@pytest.fixture
def holder(two_steps, tmp_path):
    """A copy of the run, and a process that holds its folder, like a rank started by torchrun."""
    run = tmp_path / "runs/digits"
    shutil.copytree(two_steps, run)
    held = forks.Event()
    process = forks.Process(target=hold_until_killed, args=(run, held))
    process.start()
    assert held.wait(60)
    yield run, process
    process.kill()
    process.join()


@pytest.mark.forks
def test_second_job_is_rejected(holder, digits, tmp_path):
    """It is rejected and changes nothing, until the first job ends, even by SIGKILL."""
    run, process = holder
    train = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=3", "--resume=auto")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = run_command(*train, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: runs/digits is in use by process {process.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d: "
        "wait for it, or choose another --name\n",
        done.stderr,
    )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    process.kill()
    process.join()
    assert run_command(*train, cwd=tmp_path).returncode == 0
    assert not (run / lock.LOCK).exists()


@pytest.mark.forks
def test_orphan_of_torchrun_is_named(holder):
    run, process = holder
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner = json.loads((run / lock.LOCK).read_text())
    (run / lock.LOCK).write_text(json.dumps({**owner, "torchrun": gone.pid}))  # keeps the lock, which is on the file
    with (
        pytest.raises(InputError, match=rf"torchrun \(process {gone.pid}\) has ended: end it with kill {process.pid}$"),
        lock.hold(run),
    ):
        pass


@pytest.mark.slow
def test_orphans_of_a_killed_torchrun(digits, tmp_path):
    """They keep training and hold the folder. The line says how to end them; then they leave a checkpoint."""
    train = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=100000")
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", *train],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    run = tmp_path / "runs/digits"
    deadline = time.monotonic() + 120
    while not ((run / METRICS).exists() and (run / METRICS).read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    torchrun.kill()
    torchrun.wait()
    second = run_command(*train, "--resume=auto", cwd=tmp_path)
    assert (second.returncode, second.stderr.count("\n")) == (2, 1), second.stderr
    end = re.search(rf"whose torchrun \(process {torchrun.pid}\) has ended: end it with kill (\d+)$", second.stderr)
    os.kill(int(end[1]), signal.SIGTERM)
    while (run / lock.LOCK).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert newest_checkpoint(run) is not None


def test_lock_file_removed_while_opening(tmp_path, monkeypatch):
    """The last holder removed the file after it was opened, so the next one opens another."""
    lockf, calls = fcntl.lockf, []

    def removed_before(handle, operation):
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / lock.LOCK).unlink()
        lockf(handle, operation)

    monkeypatch.setattr(fcntl, "lockf", removed_before)
    with lock.hold(tmp_path):
        assert (tmp_path / lock.LOCK).exists()
    assert len(calls) == 2


@pytest.mark.parametrize("number", lock.NO_LOCKS)
def test_file_system_without_locks_is_reported(number, tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock.hold(tmp_path / "runs/x") as warning:
        assert warning.startswith(f"cannot lock {tmp_path}/runs/x against other jobs ({os.strerror(number)})")
    assert not (tmp_path / "runs").exists()


def test_disk_error_is_not_reported_as_missing_locks(tmp_path, monkeypatch):
    def fail(handle, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(InputError, match=r"cannot write .*: Input/output error"), lock.hold(tmp_path):
        pass


@pytest.mark.parametrize(("options", "local"), [("rw,vers=4.2,local_lock=none", False), ("rw,local_lock=all", True)])
def test_local_locks_are_reported(options, local, tmp_path, monkeypatch):
    device = tmp_path.stat().st_dev
    line = f"36 25 {os.major(device)}:{os.minor(device)} / /mnt rw shared:1 - nfs4 server:/x {options}\n"
    monkeypatch.setattr(lock.Path, "read_text", lambda self: line)
    with lock.hold(tmp_path) as warning:
        assert (warning is not None and "local to this host" in warning) == local


def test_failed_start_does_not_block_the_next(digits, tmp_path, monkeypatch):
    """For example, memory ran out: a smaller model starts in the same folder, without --resume."""
    train = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=1")
    with monkeypatch.context() as patched:
        patched.setattr("mfengine.MeanFlow.loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
        assert run_command(*train, "--model.depth=2", cwd=tmp_path).returncode == 1
    (tmp_path / "runs/digits" / lock.LOCK).write_text("")  # as after SIGKILL
    done = run_command(*train, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/digits/config.json").read_text())["model"]["depth"] == 1


# ----------------------------------------------------------------------------
# Damaged checkpoints.


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_step(path):
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def rename_files(path):
    path.write_text(path.read_text().replace('"files"', '"fhles"'))


DAMAGES = {
    "flipped bit": (lambda folder: flip(folder / "__0_0.distcp"), "content of __0_0.distcp has changed"),
    "other description": (lambda folder: change_step(folder / "checkpoint.json"), "checkpoint.json has changed"),
    "damaged name": (lambda folder: rename_files(folder / "checkpoint.json"), "checkpoint.json has changed"),
    "cut file": (lambda folder: os.truncate(folder / "__0_0.distcp", 1000), "__0_0.distcp has 1000 bytes, not "),
    "missing file": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "missing description": (lambda folder: (folder / "checkpoint.json").unlink(), "No such file"),
}


@pytest.fixture
def damaged(request, two_steps, tmp_path):
    """The run with a damaged second checkpoint, and the expected message."""
    run = tmp_path / "runs/digits"
    shutil.copytree(two_steps, run)
    damage, message = DAMAGES[request.param]
    damage(newest_checkpoint(run))
    return run, message


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_resuming_falls_back_to_the_newest_complete_checkpoint(damaged, two_steps, digits):
    """It says why, renames the damaged one, and ends with the weights of an undamaged run."""
    run, message = damaged
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=2", "--resume=auto")
    done = run_command(*args, cwd=run.parent.parent)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "step 2 of" not in line]
    told, continuing = (line for line in lines if "checkpoints/step" in line)
    assert "step-00000002" in told
    assert message in told
    assert told.endswith("set aside as damaged-step-00000002")
    assert continuing == "continuing runs/digits/checkpoints/step-00000001"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "damaged-step-00000002", "step-00000001", "step-00000002",
    ]  # fmt: skip
    actual, expected = checkpoint_contents(run), checkpoint_contents(two_steps)
    assert all(torch.equal(actual[name], expected[name]) for name in expected if name.startswith("/model/"))


@pytest.mark.parametrize("damaged", ["cut file"], indirect=True)
def test_dry_run_reports_the_fallback(damaged, digits):
    run, message = damaged
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=2", "--resume=auto", "--dry-run", "--device=cpu")
    before = sorted(run.rglob("*"))
    done = run_command(*args, cwd=run.parent.parent)
    assert done.returncode == 0
    warning, ready = done.stdout.splitlines()[-2:]
    assert message in warning
    assert ready == "ready to continue at step 1; nothing was written"
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("damaged", ["flipped bit"], indirect=True)
def test_reading_a_damaged_checkpoint(damaged, digits):
    """Every command that reads weights rejects flipped bytes, unless checksums are skipped."""
    run, message = damaged
    for command in (
        ("mfengine.generate", run),
        ("mfengine.export", run, "out.safetensors"),
        ("mfengine.evaluate", run, f"--data={digits}", "--num=10"),
        ("mfengine.train", *SMALL, f"--data={digits}", f"--init={run}", "--name=new", "--steps=1"),
    ):
        done = run_command(*command, cwd=run.parent.parent)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    done = run_command("mfengine.generate", run, "--skip-checksums", "--labels=1", cwd=run.parent.parent)
    assert done.returncode == 0, done.stderr


def test_run_without_a_complete_checkpoint_does_not_restart(two_steps, digits, tmp_path):
    run = tmp_path / "runs/digits"
    shutil.copytree(two_steps, run)
    for damaged in checkpoints_of(run):
        flip(damaged / "__0_0.distcp")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=3", "--resume=auto")
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert "step-00000002 is damaged" in done.stderr
    assert "; none of the 1 older one(s) can be read either" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_unfinished_checkpoints_are_removed(two_steps, digits, tmp_path):
    run = tmp_path / "runs/digits"
    shutil.copytree(two_steps, run)
    shutil.copytree(run / "checkpoints/step-00000002", run / "checkpoints/.partial-step-00000003")
    shutil.copytree(run / "checkpoints/step-00000001", run / "checkpoints/.removed-step-00000000")
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=3", "--resume=auto")
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing runs/digits/checkpoints/step-00000002" in done.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-0000000{i}" for i in (1, 2, 3)]


# ----------------------------------------------------------------------------
# Ctrl-C.


def wait_for(text, log, process):
    """Wait until a command has printed something; returns its output."""
    deadline = time.monotonic() + 120
    while text not in (said := log.read_text() if log.exists() else ""):
        assert process.is_alive(), said
        assert time.monotonic() < deadline, said
        time.sleep(0.01)
    return said


def fork(*args, cwd):
    """A command whose stderr goes to a file in its folder."""
    run_in_fork(args, cwd, 1, dict(os.environ), (os.devnull, cwd / "stderr"))


def train_with_slow_saves(args, cwd):
    save = checkpoint.dcp.save

    def slow(*args, **kwargs):
        save(*args, **kwargs)
        time.sleep(60)

    checkpoint.dcp.save = slow
    fork(*args, cwd=cwd)


@pytest.mark.forks
def test_second_interrupt_exits_at_once(two_steps, digits, tmp_path):
    """During the write of a checkpoint: one line each, no traceback, and the older checkpoint stays complete."""
    shutil.copytree(two_steps, tmp_path / "runs/digits")
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=100000", "--resume=auto")
    process = forks.Process(target=train_with_slow_saves, args=(args, tmp_path))
    process.start()
    log = tmp_path / "stderr"
    wait_for("samples/s", log, process)
    os.kill(process.pid, signal.SIGINT)
    wait_for("\ninterrupted: writing a checkpoint; press Ctrl-C again to exit without it\n", log, process)
    while not list(tmp_path.glob("runs/digits/checkpoints/.partial-*/.metadata")):
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert time.monotonic() - began < 10
    assert process.exitcode == 130
    errors = log.read_text()
    assert errors.endswith("\ninterrupted: exiting without a checkpoint\n")
    assert "Traceback" not in errors
    assert [path.name[-2:] for path in checkpoints_of(tmp_path / "runs/digits")] == ["02", "01"]
    load_model(tmp_path / "runs/digits")


@pytest.mark.slow  # `test_second_interrupt_exits_at_once` has the line of training
def test_interrupted_command_is_one_line(two_steps, digits, tmp_path):
    args = ("mfengine.evaluate", str(two_steps), f"--data={digits}", "--num=100000000")
    process = forks.Process(target=fork, args=args, kwargs={"cwd": tmp_path})
    process.start()
    wait_for("samples/s", tmp_path / "stderr", process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert (tmp_path / "stderr").read_text().endswith("\ninterrupted\n")
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert not (two_steps / "metrics.json").exists()


@pytest.mark.parametrize(("rank", "line"), [("0", "\ninterrupted\n"), ("1", "")])
def test_interrupt_while_a_checkpoint_is_read(rank, line, two_steps, tmp_path, monkeypatch):
    """DCP reports it as an error of the checkpoint."""

    def interrupted(*_):
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(checkpoint.Reader, "read_data", interrupted)
    monkeypatch.setenv("RANK", rank)
    try:
        done = run_command("mfengine.export", two_steps, "out.safetensors", cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert (done.returncode, done.stderr) == (130, line)
    assert not list(tmp_path.iterdir())
