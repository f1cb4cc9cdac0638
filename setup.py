"""Packages, and the CUDA library, which CMake builds if nvcc is found.

MFENGINE_CUDA=1 makes a missing library an error, and 0 skips it. MFENGINE_CUDA_ARCHS lists compute capabilities; by
default, those of 80;90;100;120 that nvcc supports. Without the library, the package is pure Python, and the optimizer
runs PyTorch's kernels.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent / "kernels/cuda"))
import build as library  # importing mfengine.kernels would need torch

LIBRARY = "mfengine.kernels.libmfengine_cuda"
WISH = os.environ.get("MFENGINE_CUDA", "")


def wanted() -> bool:
    """Whether to build the library; says so if not."""
    if WISH not in ("", "0", "1"):
        sys.exit(f"error: MFENGINE_CUDA must be 0, to skip the CUDA kernels, or 1, to require them, not {WISH}")
    missing = library.missing_tools()
    if WISH == "1" and missing:
        sys.exit(f"error: MFENGINE_CUDA is 1, but {' and '.join(missing)} cannot be found")
    if WISH != "0" and not missing:
        return True
    reason = "MFENGINE_CUDA is 0" if WISH == "0" else f"no {' and no '.join(missing)} found"
    library.say(f"{reason}: installing without the CUDA optimizer kernels")
    if "editable_wheel" in sys.argv:
        library.LIBRARY.unlink(missing_ok=True)  # from an earlier installation
    return False


class BuildLibrary(build_ext):
    """Builds the library with CMake. It is not a Python extension, so its file has no extension suffix."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        targets = library.architectures()
        try:
            library.build(out, Path(self.build_temp).resolve() / "cmake", targets)
        except library.BuildError as error:
            library.say(str(error))
            what = f"the CUDA kernels could not be built for {targets}, which MFENGINE_CUDA_ARCHS changes"
            if WISH == "1":
                sys.exit(f"error: {what}")
            library.say(f"{what}: installing without them")
            raise CompileError(what) from None  # the extension is optional


class LibraryWheel(bdist_wheel):
    """A wheel for one platform and every Python version: the library does not depend on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


# mfengine/kernels is a link to kernels/. So it can be imported from a clone, is checked by mypy, and is installed like
# any package.
setup(
    packages=find_packages(include=["mfengine", "mfengine.*"]),
    ext_modules=[Extension(LIBRARY, sources=[], optional=True)] if wanted() else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": LibraryWheel},
)
