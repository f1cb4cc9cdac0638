"""Builds the CUDA library with CMake. setup.py calls it at installation; in a clone, `make gpu` does.

    python kernels/cuda/build.py     # builds kernels/libmfengine_cuda.so for this machine's GPU if it is missing

Needs nvcc and cmake, but not mfengine, which would import torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = ROOT / "kernels/libmfengine_cuda.so"
ARCHITECTURES = (80, 90, 100, 120)


class BuildError(Exception):
    """The library cannot be built; the message says why."""


def say(what: str) -> None:
    print(f"mfengine: {what}", file=sys.stderr)


def find_tool(name: str, folder: str = "") -> str | None:
    """A program on the path, in this Python's folder, or in `folder`."""
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), folder]
    return shutil.which(name, path=os.pathsep.join(place for place in places if place))


def nvcc() -> str | None:
    """The compiler that CMake will use, too: $CUDACXX, which may contain arguments, or nvcc."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("CUDACXX", "").split()
    return find_tool(named[0] if named else "nvcc", f"{home}/bin" if home else "")


def missing_tools() -> list[str]:
    return [name for name, path in (("nvcc", nvcc()), ("cmake", find_tool("cmake"))) if path is None]


def architectures() -> str:
    """$MFENGINE_CUDA_ARCHS, or those of our architectures that the compiler supports."""
    if asked := os.environ.get("MFENGINE_CUDA_ARCHS"):
        return asked
    known = subprocess.run([str(nvcc()), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return ";".join(str(arch) for arch in ARCHITECTURES if not known or f"compute_{arch}" in known)


def architectures_here() -> str:
    """$MFENGINE_CUDA_ARCHS, or the architectures of this machine's GPUs; all of ours if nvidia-smi finds none."""
    smi = find_tool("nvidia-smi")
    if smi is None or "MFENGINE_CUDA_ARCHS" in os.environ:
        return architectures()
    asked = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]  # prints one line per GPU, such as 9.0
    found = subprocess.run(asked, capture_output=True, text=True).stdout.replace(".", "").split()
    return ";".join(sorted({arch for arch in found if arch.isdigit()})) or architectures()


def build(out: Path, folder: Path, targets: str) -> None:
    """Build the library into `out`, with CMake's files in `folder`.

    Args:
        targets: compute capabilities in CMakeLists.txt's format: "90", "80;90".

    Raises:
        BuildError: a command failed; the message has its output.
    """
    options = [f"-DCMAKE_CUDA_ARCHITECTURES={targets}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}"]
    if "CUDACXX" not in os.environ:
        options.append(f"-DCMAKE_CUDA_COMPILER={nvcc()}")
    for command in (["-S", str(ROOT), "-B", str(folder), *options], ["--build", str(folder), "--parallel"]):
        done = subprocess.run([str(find_tool("cmake")), *command], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{done.stdout}{done.stderr}")
    say(f"built {LIBRARY.name} for {targets}")


def main() -> None:
    """Build the library, or say why not and go on: only the optimizer's CUDA backend needs it."""
    if LIBRARY.exists():
        return
    if missing := missing_tools():
        say(f"no {' and no '.join(missing)} found: the CUDA optimizer kernels are not built")
        return
    say(f"{LIBRARY.name} is missing: building it")
    with tempfile.TemporaryDirectory() as folder:
        try:
            build(LIBRARY.parent, Path(folder), architectures_here())
        except BuildError as error:
            say(f"{error}\nthe CUDA optimizer kernels could not be built")


if __name__ == "__main__":
    main()
