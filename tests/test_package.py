"""The installed package, editable and as a wheel: it contains the kernels and imports fast."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from conftest import slow

import mfengine
from mfengine import info

ROOT = Path(__file__).parent.parent
PROBE = (
    "import sys, mfengine, mfengine.kernels, mfengine.ops; "
    "assert not {'nvidia.dali', 'tyro', 'tensorboard', 'kernels', 'triton', 'diffusers', 'timm'} & set(sys.modules); "
    "print(mfengine.kernels.__file__)"
)


def python(*args, cwd, **env):
    """Run Python, without building the CUDA library unless `env` says so."""
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "MFENGINE_CUDA": "0", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository's files, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("source") / "mfengine"
    leave_out = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info")

    def ignore(folder, names):
        return {*leave_out(folder, names), *({"data", "runs"} if Path(folder) == ROOT else ())}

    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    return copy


INSTALL = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")


@pytest.mark.slow
def test_wheel_of_the_source_distribution(source, tmp_path):
    python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    # All requirements are already installed: only mfengine itself is added.
    plan = python("-m", "pip", "install", "--dry-run", "--no-index", wheel, cwd=tmp_path)
    assert "mfengine" in plan
    assert plan.partition("Would install")[2].strip() in ("", wheel.name.partition("-py3")[0])
    python(*INSTALL, "--target", tmp_path / "site", wheel, cwd=tmp_path)
    where = python("-c", PROBE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(where) == tmp_path / "site/mfengine/kernels/__init__.py"
    assert (tmp_path / "site/mfengine/py.typed").exists()
    attention = "import torch, mfengine.ops as ops; print(ops.attention(*[torch.ones(1, 1, 2, 8)] * 3).sum().item())"
    assert python("-c", attention, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")) == "16.0"  # from the kernels inside
    assert not (tmp_path / "site/kernels").exists()


@pytest.mark.slow  # `make install` makes one
def test_editable_install(source, tmp_path):
    """In a separate environment that sees the libraries of this one."""
    python("-m", "venv", tmp_path / "venv", cwd=tmp_path)
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    inner = tmp_path / "venv/bin/python"
    env = {**os.environ, "MFENGINE_CUDA": "0", "PYTHONPATH": libraries}
    subprocess.run([inner, *INSTALL, "--ignore-installed", "--editable", source], env=env, cwd=tmp_path, check=True)
    # The environment's own editable install comes first on the path, then the libraries.
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    probe = f"import site; site.addsitedir({str(site)!r}); import sys; sys.path.append({libraries!r}); {PROBE}"
    done = subprocess.run([inner, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == source / "kernels/__init__.py"


WHEEL = ("-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "-w")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_wheel_with_the_cuda_library(source, tmp_path):
    """If nvcc is found: for the requested targets, one wheel for every Python, whose library loads."""
    python(*WHEEL, tmp_path, source, cwd=tmp_path, MFENGINE_CUDA="1", MFENGINE_CUDA_ARCHS="90")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"py3-none-linux_{platform.machine()}.whl")
    assert not any(name.startswith("mfengine/kernels/cuda") for name in ZipFile(wheel).namelist())
    python(*INSTALL, "--target", tmp_path / "site", wheel, cwd=tmp_path)
    probe = (
        "from mfengine.kernels import multi_tensor as m; import ctypes; print(ctypes.CDLL(m.LIBRARY).mfengine_ready)"
    )
    assert "_FuncPtr" in python("-c", probe, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))


@pytest.mark.slow
def test_wheel_without_nvcc(source, tmp_path):
    """A pure wheel, and a line that says so; an error if the library is required."""
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("cmake", "c++", "sh"):
        if shutil.which(tool):
            (bare / tool).symlink_to(shutil.which(tool))
    env = {"PATH": str(bare), "CUDA_HOME": "", "CUDACXX": ""}
    for value, message in (
        ("", "mfengine: no nvcc found: installing without the CUDA optimizer kernels"),
        ("1", "error: MFENGINE_CUDA is 1, but nvcc cannot be found"),
        ("yes", "error: MFENGINE_CUDA must be 0"),
    ):
        done = subprocess.run(
            [sys.executable, *WHEEL, tmp_path, source], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, **env, "MFENGINE_CUDA": value},
        )  # fmt: skip
        assert message in done.stderr
        assert (done.returncode == 0) == (value == "")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")


@pytest.mark.parametrize("packages", [("amp_C", "flash_attn", "jvp_flash_attention"), slow(tuple(info.OPTIONAL))])
def test_info_lists_packages(packages, tmp_path, monkeypatch, capsys):
    """It lists packages that are present, missing, or broken."""
    (tmp_path / "amp_C.py").write_text("raise OSError('libcudart.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(info, "OPTIONAL", {name: info.OPTIONAL[name] for name in packages})
    info.main([])
    rows = {line.split()[0]: line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()}
    assert rows["torch"] == torch.__version__
    assert rows["mfengine"] == mfengine.__version__
    assert rows["apex"] == "installed, but cannot be imported: libcudart.so.11: cannot open shared object file"
    assert torch.cuda.is_available() or rows["ops"] == "torch: plain PyTorch, since tensors are on the CPU"
    assert torch.cuda.is_available() or rows["attention"].startswith("sdpa without a tangent; flash-attn is")
    missing = [name for name in ("flash_attn", "jvp_flash_attention") if find_spec(name) is None]
    assert all(rows[name.replace("flash_attn", "flash-attn")].startswith("not installed (") for name in missing)


def test_mfengine_sample_is_the_function(tmp_path):
    out = python("-c", f"{PROBE}; from mfengine import sample; print(callable(sample))", cwd=tmp_path)
    assert out.splitlines()[-1] == "True"
