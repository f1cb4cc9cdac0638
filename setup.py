"""Packages, and the CUDA library, which is built with CMake where nvcc is found.

MFENGINE_CUDA=1 makes it an error not to build it, 0 leaves it out; MFENGINE_CUDA_ARCHS lists compute capabilities, if
it is not set those of 80;90;100;120 that nvcc knows. Without the library the package is pure Python and the optimizer
runs PyTorch's kernels.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
LIBRARY = "mfengine.kernels.libmfengine_cuda"
ARCHITECTURES = (80, 90, 100, 120)
WISH = os.environ.get("MFENGINE_CUDA", "")


def find_tool(name: str, folder: str = "") -> str | None:
    """A program on the path, beside this Python, or in `folder`."""
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), folder]
    return shutil.which(name, path=os.pathsep.join(place for place in places if place))


def wanted() -> bool:
    """Whether to build the library; says so where it is not."""
    if WISH not in ("", "0", "1"):
        sys.exit(f"error: MFENGINE_CUDA is {WISH}; it must be 0, to leave the CUDA kernels out, or 1, to demand them")
    missing = [name for name, path in (("nvcc", nvcc()), ("cmake", find_tool("cmake"))) if path is None]
    if WISH == "1" and missing:
        sys.exit(f"error: MFENGINE_CUDA is 1, but {' and '.join(missing)} cannot be found")
    if WISH != "0" and not missing:
        return True
    reason = "MFENGINE_CUDA is 0" if WISH == "0" else f"no {' and no '.join(missing)} found"
    say(f"{reason}: installing without the CUDA optimizer kernels")
    if "editable_wheel" in sys.argv:
        (ROOT / "kernels/libmfengine_cuda.so").unlink(missing_ok=True)  # of an installation before
    return False


def say(what: str) -> None:
    print(f"mfengine: {what}", file=sys.stderr)


def nvcc() -> str | None:
    """The compiler that CMake will take too: $CUDACXX, which may have arguments, or nvcc."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("CUDACXX", "").split()
    return find_tool(named[0] if named else "nvcc", f"{home}/bin" if home else "")


def architectures() -> str:
    """$MFENGINE_CUDA_ARCHS, or those of ours that the compiler knows."""
    if asked := os.environ.get("MFENGINE_CUDA_ARCHS"):
        return asked
    known = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return ";".join(str(arch) for arch in ARCHITECTURES if not known or f"compute_{arch}" in known)


class BuildLibrary(build_ext):
    """Builds the library by CMake. It is not an extension of Python: its file has no suffix of one."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        cmake, targets = find_tool("cmake"), architectures()
        options = [f"-DCMAKE_CUDA_ARCHITECTURES={targets}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out.parent}"]
        if "CUDACXX" not in os.environ:
            options.append(f"-DCMAKE_CUDA_COMPILER={nvcc()}")
        for command in (["-S", str(ROOT), "-B", str(folder), *options], ["--build", str(folder), "--parallel"]):
            done = subprocess.run([cmake, *command], capture_output=True, text=True)
            if done.returncode:
                say(f"{done.stdout}{done.stderr}")
                what = f"the CUDA kernels could not be built for {targets}, which MFENGINE_CUDA_ARCHS changes"
                if WISH == "1":
                    sys.exit(f"error: {what}")
                say(f"{what}: installing without them")
                raise CompileError(what)  # the extension is optional
        say(f"built {out.name} for {targets}")


class LibraryWheel(bdist_wheel):
    """A wheel for one platform and every Python: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


# mfengine/kernels is a link to kernels/: importable from a clone, checked by mypy, and installed like any package.
setup(
    packages=find_packages(include=["mfengine", "mfengine.*"]),
    ext_modules=[Extension(LIBRARY, sources=[], optional=True)] if wanted() else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": LibraryWheel},
)
