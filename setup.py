"""Packages, and the CUDA library, which is built with CMake where nvcc is found.

MFENGINE_CUDA=1 makes it an error not to build it, 0 leaves it out; MFENGINE_CUDA_ARCHS lists compute capabilities,
80;90;100;120 if it is not set. Without the library the package is pure Python and the optimizer runs PyTorch's kernels.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIBRARY = "mfengine.kernels.libmfengine_cuda"


def find_tool(name: str, folder: str = "") -> str | None:
    """A program on the path, beside this Python, or in `folder`."""
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), folder]
    return shutil.which(name, path=os.pathsep.join(place for place in places if place))


def wanted() -> bool:
    """Whether to build the library; says so where it is not."""
    wish = os.environ.get("MFENGINE_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"error: MFENGINE_CUDA is {wish}; it must be 0, to leave the CUDA kernels out, or 1, to demand them")
    missing = [name for name, path in (("nvcc", nvcc()), ("cmake", find_tool("cmake"))) if path is None]
    if wish == "1" and missing:
        sys.exit(f"error: MFENGINE_CUDA is 1, but {' and '.join(missing)} cannot be found")
    if wish != "0" and not missing:
        return True
    reason = "MFENGINE_CUDA is 0" if wish == "0" else f"no {' and no '.join(missing)} found"
    print(f"mfengine: {reason}: installing without the CUDA optimizer kernels", file=sys.stderr)
    return False


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return os.environ.get("CUDACXX") or find_tool("nvcc", f"{home}/bin" if home else "")


class BuildLibrary(build_ext):
    """Builds the library by CMake. It is not an extension of Python: its file has no suffix of one."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        cmake, architectures = find_tool("cmake"), os.environ.get("MFENGINE_CUDA_ARCHS", "80;90;100;120")
        options = [
            f"-DCMAKE_CUDA_COMPILER={nvcc()}",
            f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out.parent}",
        ]
        for command in (["-S", str(ROOT), "-B", str(folder), *options], ["--build", str(folder), "--parallel"]):
            done = subprocess.run([cmake, *command], capture_output=True, text=True)
            if done.returncode:
                sys.exit(
                    f"{done.stdout}{done.stderr}\nerror: the CUDA kernels could not be built for {architectures}; "
                    "MFENGINE_CUDA=0 installs without them"
                )
        print(f"mfengine: built {out.name} for {architectures}", file=sys.stderr)


class LibraryWheel(bdist_wheel):
    """A wheel for one platform and every Python: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


# kernels/ stands beside mfengine/, and installs inside of it: a top-level package `kernels` is somebody else's.
setup(
    packages=["mfengine", "mfengine.engine", "mfengine.kernels", "mfengine.method", "mfengine.model", "mfengine.ops"],
    package_dir={"mfengine.kernels": "kernels"},
    ext_modules=[Extension(LIBRARY, sources=[])] if wanted() else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": LibraryWheel},
)
