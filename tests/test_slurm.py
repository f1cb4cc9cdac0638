"""The Slurm script, with stand-ins on PATH for a cluster's programs, which record their calls."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL
from torch.distributed.run import get_args_parser

from mfengine.engine.checkpoint import newest_checkpoint
from mfengine.train import parse

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/slurm/run.sh"

STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, subprocess, sys, time
name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
here = pathlib.Path(sys.argv[0]).parent.parent
if name == "python" and args[0] == "-c":
    name, args = "torchrun", args[2:]
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([name, *args]) + chr(10))
if name == "scontrol" and args[0] == "show":
    print(os.environ.get("HEAD", "node7"), "node8", sep=chr(10))
if name == "srun":
    (here / "environment").write_text(json.dumps(dict(os.environ)))
    task = subprocess.Popen(args[next(i for i, a in enumerate(args) if not a.startswith("-")):])
    (here / "task").write_text(str(task.pid))
    sys.exit(task.wait())
if name == "scancel":
    os.kill(int((here / "pid").read_text()), signal.SIGTERM)
if name == "torchrun":
    def stop(*_):
        time.sleep(0.3)  # as it takes to write a checkpoint
        sys.exit(int(os.environ.get("ON_TERM", 1)))
    signal.signal(signal.SIGTERM, stop)
    (here / "pid").write_text(str(os.getpid()))
    time.sleep(float(os.environ.get("RUNS_S", 0)))
sys.exit(int(os.environ.get("EXIT_" + name.upper(), 0)))
"""


@pytest.fixture
def launch(tmp_path):
    """Start the script as Slurm does: a process whose stand-ins record their calls in tmp_path/calls."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "scontrol", "scancel", "python"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(*args, **env):
        slurm = {
            "SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[7-8]",
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", SCRIPT, *args], cwd=tmp_path, env={**os.environ, **slurm, **env}, stderr=subprocess.PIPE, text=True
        )

    return start


def calls(tmp_path, name):
    path = tmp_path / "calls"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [call[1:] for call in lines if call[0] == name]


def environment(tmp_path):
    """The environment of srun, and so of everything it starts."""
    return json.loads((tmp_path / "environment").read_text())


def test_syntax():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


def test_training_on_two_nodes(launch, tmp_path):
    assert launch("mfengine.train", "xl2", "--data", "a folder").wait(30) == 0
    command = ["mfengine.train", "xl2", "--data", "a folder", "--resume", "auto"]
    assert calls(tmp_path, "python") == [["-m", *command, "--dry-run", "--ranks", "16"]]
    (args,) = calls(tmp_path, "torchrun")
    given = get_args_parser().parse_args(args)  # torchrun's own parser
    assert (given.nnodes, given.nproc_per_node, given.rdzv_backend) == ("2", "8", "c10d")
    assert (given.rdzv_endpoint, given.rdzv_id, given.max_restarts) == ("node7:20041", "41", 3)
    assert environment(tmp_path)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "240"
    assert (given.module, given.training_script, given.training_script_args) == (True, command[0], command[1:])
    run = parse(given.training_script_args).run
    assert (str(run.data), run.resume) == ("a folder", "auto")
    assert calls(tmp_path, "scontrol") == [["show", "hostnames", "node[7-8]"]]


@pytest.mark.parametrize("asked", [{}, {"SLURM_CPUS_PER_TASK": "64"}])
def test_srun_has_the_cpus_of_the_job(launch, tmp_path, monkeypatch, asked):
    for name in ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    assert launch("mfengine.evaluate", "x", **asked).wait(30) == 0
    assert environment(tmp_path).get("SRUN_CPUS_PER_TASK") == asked.get("SLURM_CPUS_PER_TASK")


def test_wrong_input_does_not_start_srun(launch, tmp_path):
    assert launch("mfengine.train", "xl2", EXIT_PYTHON="2").wait(30) == 2
    assert calls(tmp_path, "srun") == []


@pytest.mark.parametrize("command", ["mfengine.prepare", "mfengine.evaluate"])
def test_other_commands_run_unchanged(command, launch, tmp_path):
    assert launch(command, "x", EXIT_TORCHRUN="1").wait(30) == 1
    assert calls(tmp_path, "python") == []
    (args,) = calls(tmp_path, "torchrun")
    assert args[-3:] == ["-m", command, "x"]
    assert "--max-restarts=0" in args
    assert calls(tmp_path, "scontrol")[1:] == []  # a failure is not a time limit


@pytest.mark.parametrize(
    ("sender", "command", "code", "requeued"),
    [("script", "mfengine.train", 143, True), ("script", "mfengine.prepare", 143, True),
     ("script", "mfengine.evaluate", 143, False), ("script", "mfengine.train", 1, False),
     ("script", "mfengine.train", 0, False), ("another", "mfengine.train", 143, True)],
)  # fmt: skip
def test_stopped_by_sigterm(sender, command, code, requeued, launch, tmp_path):
    """For any sender, the script waits for torchrun, and a job that can continue is requeued."""
    process = launch(command, "x", ON_TERM=str(code), RUNS_S="60")
    wait_for(tmp_path / "pid")
    if sender == "script":
        process.send_signal(signal.SIGUSR1)
    else:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert process.wait(30) == code
    assert calls(tmp_path, "scancel") == ([["--signal=TERM", "41"]] if sender == "script" else [])
    assert calls(tmp_path, "scontrol")[1:] == ([["requeue", "41"]] if requeued else [])


@pytest.mark.slow
def test_torchrun_stopped_by_sigterm_is_requeued(launch, digits, tmp_path):
    """With the real torchrun and training: the script gets the signal only after the checkpoint is complete."""
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    process = launch("mfengine.train", *SMALL, f"--data={digits}", "--steps=100000", "--device=cpu",
                     HEAD="localhost", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2")  # fmt: skip
    wait_for(tmp_path / "runs/digits/metrics.jsonl")
    os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM)
    assert process.wait(60) == 143
    assert calls(tmp_path, "scontrol")[1:] == [["requeue", "41"]]
    assert newest_checkpoint(tmp_path / "runs/digits") is not None


def wait_for(path):
    """Wait until the file has content."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_usage(launch, tmp_path):
    process = launch()
    assert "usage: sbatch" in process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert calls(tmp_path, "srun") == []


def test_options_of_the_job():
    """The script relies on one task per node, a signal to its own shell only, and requeueing."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SCRIPT.read_text(), re.M))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"] == "B:USR1@300"
    assert options["requeue"] == ""
    assert int(re.search(r"SHUTDOWN_TIMEOUT=(\d+)", SCRIPT.read_text())[1]) < 300
