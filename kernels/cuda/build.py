"""Builds the CUDA library with CMake: setup.py does so when mfengine is installed, `make gpu` in a clone.

    python kernels/cuda/build.py     # builds kernels/libmfengine_cuda.so for this machine's GPU, if it is not there

Needs nvcc and cmake, and nothing of mfengine, whose import needs torch.
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
    """The library cannot be built; says why."""


def say(what: str) -> None:
    print(f"mfengine: {what}", file=sys.stderr)


def find_tool(name: str, folder: str = "") -> str | None:
    """A program on the path, beside this Python, or in `folder`."""
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), folder]
    return shutil.which(name, path=os.pathsep.join(place for place in places if place))


def nvcc() -> str | None:
    """The compiler that CMake will take too: $CUDACXX, which may have arguments, or nvcc."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("CUDACXX", "").split()
    return find_tool(named[0] if named else "nvcc", f"{home}/bin" if home else "")


def missing_tools() -> list[str]:
    return [name for name, path in (("nvcc", nvcc()), ("cmake", find_tool("cmake"))) if path is None]


def architectures() -> str:
    """$MFENGINE_CUDA_ARCHS, or those of ours that the compiler knows."""
    if asked := os.environ.get("MFENGINE_CUDA_ARCHS"):
        return asked
    known = subprocess.run([str(nvcc()), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return ";".join(str(arch) for arch in ARCHITECTURES if not known or f"compute_{arch}" in known)


def architectures_here() -> str:
    """$MFENGINE_CUDA_ARCHS, or those of this machine's GPUs; where nvidia-smi finds none, all of ours."""
    smi = find_tool("nvidia-smi")
    if smi is None or "MFENGINE_CUDA_ARCHS" in os.environ:
        return architectures()
    asked = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]  # a line for each: 9.0
    found = subprocess.run(asked, capture_output=True, text=True).stdout.replace(".", "").split()
    return ";".join(sorted({arch for arch in found if arch.isdigit()})) or architectures()


def build(out: Path, folder: Path, targets: str) -> None:
    """Build the library into `out`, with CMake's files in `folder`.

    Args:
        targets: compute capabilities as CMakeLists.txt takes them: "90", "80;90".

    Raises:
        BuildError: a command failed; what it printed is in the message.
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
    """Where it cannot be built, say so and go on: everything but the optimizer's CUDA backend works without it."""
    if LIBRARY.exists():
        return
    if missing := missing_tools():
        say(f"no {' and no '.join(missing)} found: the CUDA optimizer kernels are not built")
        return
    say(f"building {LIBRARY.name}, which is not there")
    with tempfile.TemporaryDirectory() as folder:
        try:
            build(LIBRARY.parent, Path(folder), architectures_here())
        except BuildError as error:
            say(f"{error}\nthe CUDA optimizer kernels could not be built")


if __name__ == "__main__":
    main()
