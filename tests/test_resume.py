"""A run killed at random moments ends with the very weights of one that was left alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import torch
from conftest import SMALL, checkpoint_contents, run_command

from mfengine.engine.checkpoint import newest_checkpoint


def test_killed_at_random_moments(digits, tmp_path, pytestconfig):
    kills = pytestconfig.getoption("--kills")
    steps = 80 * kills  # more than it does between two kills
    args = [*SMALL, f"--data={digits}", f"--steps={steps}", "--checkpoint-every=2", "--method.kappa=0.5"]
    done = run_command("mfengine.train", *args, "--name=alone", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = checkpoint_contents(tmp_path / "runs/alone")

    rng = random.Random(os.environ.get("PYTEST_SEED"))
    checkpoints = tmp_path / "runs/killed/checkpoints"
    reached, amid_writing = 0, 0
    for kill in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "mfengine.train", *args, "--name=killed", "--resume=auto"],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        if kill % 3 == 2:
            time.sleep(rng.uniform(0, 6))  # any moment, starting and reading included
        else:
            # Wait until it trains again, then a moment; every other time, into the writing of a checkpoint.
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                newest = newest_checkpoint(tmp_path / "runs/killed")
                if newest and int(newest.name[5:]) > reached:
                    break
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.3))
            while kill % 3 == 0 and process.poll() is None and not list(checkpoints.glob(".partial-*")):
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        amid_writing += bool(list(checkpoints.glob(".partial-*")))
        newest = newest_checkpoint(tmp_path / "runs/killed")
        reached = int(newest.name[5:]) if newest else 0
        unfinished = sorted(p.name for p in checkpoints.glob(".*"))
        print(f"kill {kill + 1}: newest whole checkpoint {reached}, unfinished {unfinished}")
    print(f"{kills} kills, {amid_writing} while a checkpoint was being written")
    done = run_command("mfengine.train", *args, "--name=killed", "--resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    assert newest_checkpoint(tmp_path / "runs/killed").name == f"step-{steps:08d}"
    actual = checkpoint_contents(tmp_path / "runs/killed")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[name], value), name
        else:
            assert actual[name] == value, name


def test_unfinished_checkpoints_are_not_resumed_and_go(digits, tmp_path):
    args = [*SMALL, f"--data={digits}", "--checkpoint-every=2"]
    run_command("mfengine.train", *args, "--steps=4", cwd=tmp_path)
    checkpoints = tmp_path / "runs/digits/checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / ".partial-step-00000006")
    shutil.copytree(checkpoints / "step-00000002", checkpoints / ".removed-step-00000001")
    done = run_command("mfengine.train", *args, "--steps=6", "--resume=auto", cwd=tmp_path)
    assert "continuing runs/digits/checkpoints/step-00000004" in done.stderr
    assert sorted(p.name for p in checkpoints.iterdir()) == [f"step-{step:08d}" for step in (2, 4, 6)]
