"""Shared by the tests: the digits as a data set, and functions that run commands as a user does."""

import contextlib
import fcntl
import io
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # tests run in several processes, and sums depend on the number of threads

import pytest

ROOT = Path(__file__).parent.parent


def _patch_triton_once():
    """Make Triton's interpreter patch its language once per launch instead of once per call of a device function.

    This makes it 2.4 times as fast.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang

    def once(fn):
        languages = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        if all(not tl.core.is_builtin(language.full) for language in languages):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = once


def pytest_configure(config):
    """Import slow modules only in the processes that collect and run tests, not in the one that starts them."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton: kernels then run on CPU tensors
    _patch_triton_once()
    torch.set_num_threads(1)  # tests run in several processes


def run_command(*args, cwd, ranks=1, env=None, timeout=300, stdout=None, meanwhile=None):
    """Run `python -m ...`, under torchrun for several ranks, on one thread per rank.

    Without `env`, a single command runs in this process, with the test's monkeypatches, because importing the commands
    takes longer than most of them.
    Several ranks, and a command with `stdout` or `meanwhile`, are forks of a process that has imported the commands.
    `stdout` names a file; `meanwhile` is called with the running process. torchrun's own agent starts and watches
    several ranks. CUDA does not work in forks.
    """
    import torch

    if env is None and ranks == 1 and stdout is None and meanwhile is None:
        return run_here(*map(str, args), cwd=cwd)
    if env is None and not torch.cuda.is_available():
        return fork_command(*map(str, args), cwd=cwd, ranks=ranks, timeout=timeout, stdout=stdout, meanwhile=meanwhile)
    launch = ["-m"] if ranks == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.run(
        [sys.executable, *launch, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    [f"mfengine.{name}" for name in ("train", "generate", "evaluate", "prepare", "export")]
    + ["nvidia.dali.fn", "tensorboard", "torch.distributed.run", "conftest"]
)


def fork_command(*args, cwd, ranks, timeout, stdout=None, meanwhile=None):
    with tempfile.TemporaryDirectory() as folder:
        files = stdout or f"{folder}/stdout", f"{folder}/stderr"
        process = forks.Process(target=run_in_fork, args=(args, cwd, ranks, dict(os.environ), files))
        process.start()
        if meanwhile:
            meanwhile(process)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(args, timeout)
        texts = ["" if name == stdout else Path(name).read_text() for name in files]
    return subprocess.CompletedProcess(args, process.exitcode, *texts)


MEET = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=test")  # as --standalone does


def run_in_fork(args, cwd, ranks, environment, files):
    import torch
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    for fd, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update({**environment, "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    if ranks == 1:
        run_module(args)
    else:
        options = get_args_parser().parse_args([*MEET, f"--nproc-per-node={ranks}", "-m", *args])
        config, _, _ = config_from_args(options)
        config.start_method = "fork"
        elastic_launch(config, run_module)(args)


def run_module(args):
    """Like `python -m`, in a process that may have imported the module before."""
    sys.argv = list(args)
    sys.path.insert(0, "")
    warnings.filterwarnings("ignore", ".* found in sys.modules after import", RuntimeWarning)
    try:
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise  # torchrun's agent waits for results of ranks that succeed


def run_here(*args, cwd):
    """Run a command in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with contextlib.chdir(cwd), mock.patch.object(sys, "argv", list(args)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* found in sys.modules after import", RuntimeWarning)
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                runpy.run_module(args[0], run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
    return subprocess.CompletedProcess(args, code, *(stream.buffer.getvalue().decode() for stream in streams))


def kill(process):
    """SIGKILL torchrun, then the processes it started, which would otherwise survive."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with the digits, written by the command, once for all processes of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "digits"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not folder.exists():
            done = run_command("mfengine.prepare", "digits", folder, cwd=shared)
            assert done.returncode == 0, done.stderr
    return folder


def pytest_collection_modifyitems(items):
    """Tests that fork come first, so that one worker runs them all and only it starts the process to fork from."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """The CUDA library's interface and arithmetic, compiled for tensors on the CPU by the C++ compiler."""
    cmake = shutil.which("cmake", path=os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]))
    if cmake is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs cmake and a C++ compiler")
    from mfengine.kernels.multi_tensor import Library

    folder = tmp_path_factory.mktemp("host_library")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DMFENGINE_CUDA=OFF"]
    for command in (configure, [cmake, "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return Library(folder / "libmfengine_host.so")


def slow(*values):
    """Parameters of a case that runs only in `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.slow)


SMALL = (
    "digits", "--model.hidden-size=32", "--model.depth=1", "--model.num-heads=2", "--batch-size=32",
    "--sample-every=0", "--log-every=5",
)  # fmt: skip
"""Arguments of a run that takes milliseconds per step."""


def checkpoint_contents(path):
    """The contents of a checkpoint, or of a run's newest one, as {path: tensor or value}."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from mfengine.engine.checkpoint import newest_checkpoint

    merged = path / "merged.pt"
    dcp_to_torch_save(newest_checkpoint(path) or path, merged)

    def leaves(tree, path):
        if not isinstance(tree, dict):
            return {path: tree}
        return {k: v for name, child in tree.items() for k, v in leaves(child, f"{path}/{name}").items()}

    return leaves(torch.load(merged, weights_only=False), "")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="how often tests kill what they let continue")
