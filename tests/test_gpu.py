"""What needs a GPU, and the rehearsal of the GPU script, which does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, run_command

from benchmarks import gpu

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_rehearsal_of_the_gpu_script(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "guided, small of 16" in done.stdout
    assert (tmp_path / "gpu.json").exists()


@needs_gpu
@pytest.mark.parametrize("check", [gpu.check_golden, lambda d: gpu.check_ops(d, False), gpu.check_synchronisation])
def test_on_the_gpu(check):
    for row in check(torch.device("cuda")):
        assert row["error"] <= row["bound"], row


@needs_gpu
def test_training_on_the_gpu_writes_checkpoints_in_the_background(digits, tmp_path):
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--checkpoint-every=5", "--device=cuda")
    assert run_command(*args, "--steps=10", cwd=tmp_path).returncode == 0
    done = run_command(*args, "--steps=20", "--resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing runs/digits/checkpoints/step-00000010" in done.stderr
