"""Tests that need a GPU, and a rehearsal of the GPU script, which does not."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import which

import gpu_tasks
import pytest
import torch
from conftest import SMALL, run_command, slow

from benchmarks import gpu
from benchmarks.cases import Machine
from benchmarks.measure import environment
from mfengine.kernels.multi_tensor import Library

ROOT = Path(__file__).parent.parent
GPU = Machine(torch.device("cuda", 0), Path("unused"))

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ----------------------------------------------------------------------------
# The script as a whole, in miniature.


def needed(names):
    """The distributions of these names and, without extras, of everything they need."""
    found, todo = {}, list(names)
    while todo:
        requirement = todo.pop()
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        if name in found or "extra ==" in requirement:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # not on this platform
            continue
        todo += found[name].requires or []
    return found.values()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(python, clone): an environment with torch, triton, numpy and what they need, and a clone of this repository."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    site = next((folder / "venv/lib").glob("python*/site-packages"))
    for dist in needed(["torch", "triton", "numpy"]):
        # Of the folder nvidia, which many distributions share, only those that are needed.
        for parts in {file.parts[: 2 if file.parts[0] == "nvidia" else 1] for file in dist.files}:
            if parts[0] != ".." and not parts[0].startswith("__"):
                link = site.joinpath(*parts)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(dist.locate_file(Path(*parts)))
    subprocess.run(["git", "clone", "--quiet", ROOT, folder / "clone"], check=True)
    # Uncommitted changes are tested, too.
    changed = subprocess.run(
        ["git", "ls-files", "--modified", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in changed:
        (folder / "clone" / name).unlink(missing_ok=True)
        if (ROOT / name).exists():
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "clone" / name).write_bytes((ROOT / name).read_bytes())
    return python, folder / "clone"


def rehearsal(bare, out):
    python, clone = bare
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.Popen(
        [python, "-m", "benchmarks.gpu", "--rehearse"],
        cwd=clone,
        env={**environment, "OUT": str(out), "OMP_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_rehearsal_needs_only_torch_triton_and_numpy(bare, tmp_path):
    python, clone = bare
    others = "import importlib.util as u; print([n for n in ('tyro', 'tqdm', 'PIL', 'pytest') if u.find_spec(n)])"
    absent = subprocess.run([python, "-c", others], cwd=clone, capture_output=True, text=True, check=True)
    assert absent.stdout.strip() == "[]"
    process = rehearsal(bare, tmp_path)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert out.index("estimated ") < out.index("--- after xl2\n") < out.index("--- after remaining\n")
    assert out.rindex("--- after remaining\n") < out.rindex("| step: guided, tiny of 4")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["suite"] for row in report["rows"]} == {"step", "kernels", "attention", "optimizer", "sampler"}
    assert {"environment", "ceilings", "checks", "splits"} <= report.keys()
    (improved,) = (row for row in report["rows"] if row["case"] == "improved, tiny of 4")
    assert min(improved["flops"], improved["predicted"]) > 0
    assert "predicted ms" in out
    assert not {"missing", "errors"} & report.keys()


def test_killed_rehearsal_leaves_a_complete_report(bare, tmp_path, pytestconfig):
    """Killed at random: the report holds every printed line, and no process survives."""
    chance = random.Random()
    for attempt in range(pytestconfig.getoption("--kills")):
        out = tmp_path / str(attempt)
        out.mkdir()
        process = rehearsal(bare, out)
        finished = []
        for _ in range(chance.randint(1, 15)):
            line = process.stdout.readline()
            while line and not re.match(r" *\d+ s (ok|timed) ", line):
                line = process.stdout.readline()
            finished.append(re.sub(r"^ *\d+ s (ok|timed) +", "", line).rstrip())
        time.sleep(chance.random() / 10)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        report = json.loads((out / "gpu.json").read_text())
        kept = [check["check"] for check in report["checks"]]
        kept += [f"{row['suite']}: {row['case']}: {row['implementation']}" for row in report.get("rows", [])]
        kept += [f"split: {name}" for name in report.get("splits", {})]
        assert all(any(line.startswith(name) for name in kept) for line in finished), (finished, kept)
        until = time.monotonic() + 30
        while running(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not running(process.pid)


def running(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_missing_cuda_library_is_built_first(bare, tmp_path):
    """If nvcc and cmake exist; otherwise a line says that it is not built."""
    _, clone = bare
    plan = subprocess.run(["make", "--dry-run", "gpu"], cwd=clone, capture_output=True, text=True, check=True).stdout
    assert plan.index("kernels/cuda/build.py") < plan.index("-m benchmarks.gpu")

    def build(**environment):
        command = [sys.executable, "kernels/cuda/build.py"]
        environment = {**os.environ, **environment}
        return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=True).stderr

    assert "no nvcc" in build(PATH=str(tmp_path), CUDA_HOME="", CUDACXX="")
    if which("nvcc") and which("cmake"):
        smi = tmp_path / "nvidia-smi"  # reports two GPUs of the same kind
        smi.write_text("#!/bin/sh\nprintf '9.0\\n9.0\\n'\n")
        smi.chmod(0o755)
        said = build(PATH=os.pathsep.join((str(tmp_path), os.environ["PATH"])))
        assert "libmfengine_cuda.so is missing: building it" in said
        assert "built libmfengine_cuda.so for 90\n" in said
        assert Library(clone / "kernels/libmfengine_cuda.so").device == "cuda"
        assert build() == ""


# ----------------------------------------------------------------------------
# Tasks and their order.


@pytest.mark.slow
def test_failing_task_affects_no_other(tmp_path, monkeypatch, capsys):
    """A task raises, runs out of memory, ends its process or hangs."""
    monkeypatch.setattr(gpu, "TIMEOUT_S", 2.0)
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu.Run(True, 5, str(tmp_path), gpu_tasks.broken_plan).run()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert len(report["checks"]) == len(gpu_tasks.GOES_WRONG) + 1
    assert report["missing"] == {"runs out of memory": "OutOfMemoryError: CUDA out of memory. Tried"}
    assert report["errors"] == {
        "has no message": "ValueError",
        "has two lines": "RuntimeError: first",
        "ends its process": "the process ended with exit code 3",
        "ends its process, beside": "the process ended with exit code 3",
        "hangs": "stopped after 2 s",
    }


@pytest.mark.slow
def test_nothing_runs_after_the_deadline(tmp_path, monkeypatch):
    run = gpu.Run(True, 5, str(tmp_path), gpu_tasks.endless_plan)
    start = run._start

    def start_late():
        worker = start()
        run._deadline = time.monotonic() + 3
        return worker

    monkeypatch.setattr(run, "_start", start_late)
    run.run()
    assert time.monotonic() - run._deadline < 20
    assert re.fullmatch("stopped after [23] s", run.report["errors"]["endless"])
    assert run.report["missing"] == {"late": "no time left"}


class HereWorker:
    """A worker that runs tasks in this process."""

    many = 4

    def __init__(self, timeout, make_plan, rehearse, folder, many):
        self.environment = environment(torch.device("cpu"))
        self.by_name = make_plan(None, self.many)
        self.tasks = [*self.by_name.values()]

    def run(self, name, timeout):
        return self.by_name[name].run(), True

    def stop(self):
        pass


def test_resumed_run_does_only_what_is_left(tmp_path, monkeypatch, capsys):
    """Results stay; a task that had no time runs, and one that the deadline stopped runs again."""
    tasks = {name: gpu.Task("stage", name, 0.0, True, gpu_tasks.fine) for name in ("one", "two", "three")}
    monkeypatch.setattr(gpu, "Worker", HereWorker)
    monkeypatch.setattr(gpu, "Run", functools.partial(gpu.Run, make_plan=lambda machine, many: tasks))
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse"])
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main() == 0
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert whole["finished"] == ["one", "two", "three"]
    part = {**whole, "checks": whole["checks"][:1], "finished": ["one"]}
    part |= {"missing": {"two": "no time left"}, "errors": {"three": "stopped after 3 s"}}
    report = tmp_path / "before.json"
    report.write_text(json.dumps(part))
    capsys.readouterr()

    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", f"--resume={report}"])
    assert gpu.main() == 0
    assert json.loads((tmp_path / "gpu.json").read_text()) == {**whole, "missing": {}, "errors": {}}
    assert len(re.findall("ok     fine", capsys.readouterr().out)) == 2

    report.write_text(json.dumps({**part, "environment": {**whole["environment"], "device": "another GPU"}}))
    assert gpu.main() == 2
    assert capsys.readouterr().err == f"error: {report}: it has device another GPU, and this is CPU, one thread\n"
    for content, kind in (("{", "JSONDecodeError"), ("1", "TypeError")):
        report.write_text(content)
        assert gpu.main() == 2
        assert capsys.readouterr().err.startswith(f"error: {report}: {kind}: ")


@pytest.mark.parametrize(
    ("make_plan", "told"),
    [slow(gpu_tasks.hopeless_plan, "errors: check: ValueError"), (gpu_tasks.planless, "no worker: stopped after 4 s")],
)
def test_run_without_results_ends_with_one_line(make_plan, told, monkeypatch, capsys):
    """No check has a result, or the first worker hangs before its first task, which must not use up the time."""
    monkeypatch.setattr(gpu, "START_S", 0 if make_plan is gpu_tasks.planless else gpu.START_S)
    monkeypatch.setattr(gpu, "TIMEOUT_S", 4.0 if make_plan is gpu_tasks.planless else gpu.TIMEOUT_S)
    monkeypatch.setattr(gpu, "Run", functools.partial(gpu.Run, make_plan=make_plan))
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse"])
    assert gpu.main() == 1
    assert told in "".join(capsys.readouterr())


def test_order_of_tasks_on_a_gpu(monkeypatch):
    """XL/2's step at 32 rows is in the first two minutes; compiled peers come last."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tasks = list(gpu.plan(GPU, many=192).values())
    stages = list(dict.fromkeys(task.stage for task in tasks))
    attention = ["kernels of xl2", "attention of xl2"]
    assert stages == ["xl2", "xl2 of 32", *attention, "xl2 of 192", "imf-xl2", "b2", "remaining", "compiled peers"]
    assert all("compiled" in task.name for task in tasks if task.stage == "compiled peers")
    before = next(i for i, task in enumerate(tasks) if task.name == "step: guided, xl2 of 32: mfengine")
    assert gpu.START_S + sum(t.seconds / (1 if t.alone else 16) for t in tasks[:before]) < 120
    assert not any(" x 1 x " in task.name for task in tasks)  # there, twice plain PyTorch's error is no bound
    names = {task.name for task in tasks}  # our own attention is timed where SDPA is the default
    for mode in ("primal", "forward + backward"):
        assert f"kernels: attention, {mode}, xl2 of 32: mfengine, Triton" in names
    assert {"step: improved, imf-xl2 of 64: mfengine", "step: improved, imf-b2 of 256: mfengine"} <= names
    assert next(t.name for t in tasks if t.stage == "kernels of xl2") == "kernels: attention, dual, xl2 of 32: mfengine"


@pytest.mark.parametrize(("gigabytes", "rows"), [(142, 256), (85, 160), (24, 32)])
def test_batch_fits_the_free_memory(gigabytes, rows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gigabytes * 10**9, 10**12))
    assert gpu.fitting_batch(GPU, "xl2") == rows


# ----------------------------------------------------------------------------
# On a GPU.


@needs_gpu
@pytest.mark.parametrize("stage", ["xl2", "remaining"])
def test_checks_on_the_gpu(stage, tmp_path):
    machine = Machine(torch.device("cuda", 0), tmp_path)
    for task in gpu.plan(machine, many=32).values():
        if task.stage == stage:
            for check in task.run()["checks"]:
                assert gpu.checks.passed(check), check


@needs_gpu
def test_training_on_the_gpu_writes_checkpoints_in_the_background(digits, tmp_path):
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--checkpoint-every=5", "--device=cuda")
    assert run_command(*args, "--steps=10", cwd=tmp_path).returncode == 0
    done = run_command(*args, "--steps=20", "--resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing runs/digits/checkpoints/step-00000010" in done.stderr
