"""The package as it is installed: editable and as a wheel, with kernels inside, light to import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = (
    "import sys, mfengine, mfengine.kernels, mfengine.ops; "
    "assert not {'nvidia.dali', 'tyro', 'tensorboard', 'kernels', 'triton', 'diffusers', 'timm'} & set(sys.modules); "
    "print(mfengine.kernels.__file__)"
)


def python(*args, cwd, **env):
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the repository holds, so that building leaves nothing in it."""
    copy = tmp_path_factory.mktemp("source") / "mfengine"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "data", "runs", "golden"))
    return copy


INSTALL = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")


def test_wheel(source, tmp_path):
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    python(*INSTALL, "--target", tmp_path / "site", wheel, cwd=tmp_path)
    where = python("-c", PROBE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(where) == tmp_path / "site/mfengine/kernels/__init__.py"
    assert (tmp_path / "site/mfengine/py.typed").exists()
    assert not (tmp_path / "site/kernels").exists()


def test_editable_install(source, tmp_path):
    """In an environment of its own that sees the libraries of this one."""
    python("-m", "venv", tmp_path / "venv", cwd=tmp_path)
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    inner = tmp_path / "venv/bin/python"
    env = {**os.environ, "PYTHONPATH": libraries}
    subprocess.run([inner, *INSTALL, "--ignore-installed", "--editable", source], env=env, cwd=tmp_path, check=True)
    # The environment's own editable install comes first on the path, then the libraries.
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    probe = f"import site; site.addsitedir({str(site)!r}); import sys; sys.path.append({libraries!r}); {PROBE}"
    done = subprocess.run([inner, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == source / "kernels/__init__.py"


def test_sample_is_the_function(tmp_path):
    out = python("-c", "from mfengine import sample; print(callable(sample))", cwd=tmp_path)
    assert out == "True"


@pytest.mark.parametrize("floor", ["ops", "model", "method"])
def test_floors_import_only_floors_below(floor):
    above = {"ops": ("model", "method", "engine"), "model": ("method", "engine"), "method": ("engine",)}[floor]
    for path in (ROOT / "mfengine" / floor).glob("*.py"):
        text = path.read_text()
        for name in above:
            assert f"mfengine.{name}" not in text, f"{path.name} imports {name}"
    if floor == "method":
        assert "kernels" not in (ROOT / "mfengine/method/objective.py").read_text()
