"""A run under injected faults: kills, damaged files, a full disk, second jobs, changing numbers of ranks.

`pytest tests/test_fault_injection.py --kills 50 -s` is the full test; PYTEST_SEED selects another course of events.
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, checkpoint_contents, forks, run_command, run_in_fork

from mfengine.engine.checkpoint import checkpoints_of, newest_checkpoint
from mfengine.engine.telemetry import METRICS

EVERY = 5  # steps between checkpoints
PARTS = 4  # ranks x accumulation: the same batches on any number of ranks


class Life:
    """One start of the run, which will be killed."""

    def __init__(self, ranks, args, cwd, folder):
        self.folder = folder
        folder.mkdir()
        files = folder / "stdout", folder / "stderr"
        self.process = forks.Process(target=run_in_fork, args=(args, cwd, ranks, dict(os.environ), files))
        self.process.start()

    def pids(self):
        with contextlib.suppress(FileNotFoundError):
            pid = self.process.pid
            return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        return []

    def kill(self):
        """SIGKILL torchrun's agent, then its ranks, which would otherwise survive."""
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.join()
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.01)

    def said(self):
        return (self.folder / "stderr").read_text() if (self.folder / "stderr").exists() else ""


class Disk:
    """A small file system if one can be mounted; otherwise, a limit on the size of files."""

    def __init__(self, folder):
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
        self.folder, self.mounted = folder, subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self, life, room):
        """Leave this many bytes free."""
        if not self.mounted:
            for pid in life.pids():
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, room))
            return
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        size = (self.folder / "filler").stat().st_size
        os.truncate(self.folder / "filler", max(0, size - room))

    def free(self):
        (self.folder / "filler").unlink(missing_ok=True)

    def unmount(self):
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


def damage(checkpoint, rng):
    """Flip a bit of a file, truncate it, or remove it; returns a description."""
    path = rng.choice(sorted(checkpoint.iterdir()))
    how = rng.choice(("flipped", "cut", "missing"))
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, rng.randrange(path.stat().st_size - 1))  # the last byte of checkpoint.json is insignificant
    else:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return f"{checkpoint.name}/{path.name} {how}"


def step_of(checkpoint):
    return int(checkpoint.name[-8:])


def losses(run):
    """The losses in metrics.jsonl, whose steps must start at 1 and not repeat; a kill may truncate the last line."""
    if not (run / METRICS).exists():
        return []
    text = (run / METRICS).read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def assert_identical(checkpoint, expected):
    actual, right = checkpoint_contents(checkpoint), checkpoint_contents(expected)
    assert actual.keys() == right.keys()
    for name, value in right.items():
        assert torch.equal(actual[name], value) if isinstance(value, torch.Tensor) else actual[name] == value, name
    (checkpoint / "merged.pt").unlink()  # so that it is not damaged


@pytest.mark.forks
def test_run_killed_without_warning_continues_to_the_same_weights(digits, tmp_path):
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=30", f"--checkpoint-every={EVERY}", "--resume=auto")
    killed, whole = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"

    def kill_after_a_checkpoint(process):
        while not checkpoints_of(killed):
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()

    done = run_command(*args, "--name=killed", cwd=tmp_path, meanwhile=kill_after_a_checkpoint)
    assert done.returncode == -signal.SIGKILL
    for name in ("killed", "whole"):
        done = run_command(*args, f"--name={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("continuing" in done.stderr) == (name == "killed")
    continued, expected = checkpoint_contents(killed), checkpoint_contents(whole)
    assert continued.keys() == expected.keys()
    assert all(torch.equal(x, expected[key]) for key, x in continued.items() if isinstance(x, torch.Tensor))


@pytest.mark.slow
def test_run_survives_faults(digits, tmp_path, pytestconfig):
    kills, rng = pytestconfig.getoption("--kills"), random.Random(os.environ.get("PYTEST_SEED", "0"))
    steps = 24 * max(kills, 4)  # more than it completes between two kills
    disk = Disk(tmp_path / "runs")
    try:
        inject_faults(kills, rng, steps, disk, digits, tmp_path)
    finally:
        disk.unmount()


def inject_faults(kills, rng, steps, disk, digits, cwd):
    def command(name, ranks):
        return [
            "mfengine.train", *SMALL, f"--data={digits}", f"--steps={steps}", "--log-every=1", f"--name={name}",
            f"--checkpoint-every={EVERY}", "--resume=auto", f"--accumulation={PARTS // ranks}",
        ]  # fmt: skip

    def train(name, *args):
        return run_command(*command(name, 1), *args, cwd=cwd)

    alone = cwd / "alone/run"
    done = train("run", "--runs=alone", f"--keep={steps}")
    assert done.returncode == 0, done.stderr
    expected = losses(alone)
    assert len(expected) == steps

    run = cwd / "runs/faults"
    lineage = {0: frozenset()}  # step of a checkpoint -> numbers of ranks on the way to it
    kinds = ("identical checkpoints", "came back", "damaged", "full disks", "second jobs", "amid writing")
    counts = dict.fromkeys(kinds, 0)
    compared = set()
    for kill in range(kills):
        events = []
        checkpoints = checkpoints_of(run)
        broken = []
        mixed = [c for c in checkpoints if not lineage[step_of(c)] <= {1}]
        if 0 < len(mixed) < len(checkpoints) and rng.random() < 0.9:
            broken = mixed  # one rank returns, to undo the steps on other numbers of ranks
            counts["came back"] += 1
        elif len(checkpoints) > 1 and rng.random() < 0.4:
            broken = checkpoints[:1]
        events += [damage(checkpoint, rng) for checkpoint in broken]
        ranks = rng.choice((1, 1, 1, 2, 4)) if kill else 1
        start = len(losses(run))
        life = Life(ranks, [*command("faults", ranks), "--keep=6"], cwd, cwd / f"life-{kill}")
        if kill and rng.random() < 0.15:
            time.sleep(rng.uniform(0, 3))
            events.append("as it starts")
        else:
            deadline = time.monotonic() + 120
            while "continuing" not in life.said() and "M parameters" not in life.said() and life.process.is_alive():
                assert time.monotonic() < deadline, life.said()
                time.sleep(0.01)
            if rng.random() < 0.3:
                second = run_command(*command("faults", 1), cwd=cwd)
                if life.process.is_alive():
                    assert second.returncode == 2, second.stderr
                    assert re.fullmatch(r"error: runs/faults is in use by process \d+ on .*\n", second.stderr)
                counts["second jobs"] += 1
                events.append("second job")
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, 0.3))
                disk.fill(life, rng.randrange(400_000))
                counts["full disks"] += 1
                events.append("full disk")
            begun, target = len(losses(run)), rng.randrange(1, 12)
            deadline = time.monotonic() + 60
            while life.process.is_alive() and len(losses(run)) < begun + target and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            if rng.random() < 0.3:
                deadline = time.monotonic() + 2
                while not list(run.glob("checkpoints/.partial-*")) and time.monotonic() < deadline:
                    pass
        counts["amid writing"] += bool(list(run.glob("checkpoints/.partial-*")))
        ended = not life.process.is_alive()
        life.kill()
        disk.free()

        said = life.said()
        resumed = re.search(r"continuing runs/faults/checkpoints/step-(\d+)", said)
        for checkpoint in broken:
            counts["damaged"] += 1
            if resumed:
                assert re.search(rf"(cannot read|runs).*{checkpoint.name}.*; set aside", said), (events, said)
        if resumed or "M parameters" in said:
            before = int(resumed[1]) if resumed else 0
            for checkpoint in checkpoints_of(run):
                if step_of(checkpoint) > before:
                    lineage[step_of(checkpoint)] = lineage[before] | {ranks}
                    compared.discard(step_of(checkpoint))
        unreadable = {c.name for c in broken} if not resumed else set()
        for checkpoint in checkpoints_of(run):
            step = step_of(checkpoint)
            if checkpoint.name not in unreadable and lineage[step] == {1} and step not in compared:
                assert_identical(checkpoint, alone / "checkpoints" / checkpoint.name)
                compared.add(step)
                counts["identical checkpoints"] += 1
        so_far = losses(run)
        assert so_far == pytest.approx(expected[: len(so_far)], rel=1e-5)
        newest = newest_checkpoint(run)
        if newest and not unreadable:
            assert len(so_far) >= step_of(newest)
        for damaged in run.glob("checkpoints/damaged-*"):
            shutil.rmtree(damaged)
        where = f"steps {start} to {len(so_far)}, newest {newest.name if newest else 'none'}"
        last = said.strip().splitlines()[-1:] if ended else []
        print(f"kill {kill + 1}: {ranks} rank(s), {where}; {', '.join(events)} {last}", flush=True)
    done = train("faults", "--keep=6")
    assert done.returncode == 0, done.stderr
    actual = losses(run)
    assert len(actual) == steps
    worst = max(abs(a / b - 1) for a, b in zip(actual, expected, strict=True))
    resumed = int(re.search(r"continuing runs/faults/checkpoints/step-(\d+)", done.stderr)[1])
    if lineage[resumed] == {1}:
        assert_identical(newest_checkpoint(run), newest_checkpoint(alone))
    print(f"{kills} kills, {counts}; {steps} lines of metrics, losses within {worst:.1e} of the uninterrupted run's")
    print(f"ranks of the last checkpoint resumed from: {sorted(lineage[resumed])}")
    assert worst <= 1e-5
