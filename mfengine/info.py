"""`python -m mfengine.info`: what is active in this environment, and why something is not."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch

import mfengine
from mfengine import cli
from mfengine.engine.presets import PRESETS
from mfengine.kernels import multi_tensor
from mfengine.ops import choice
from mfengine.ops.backend import fused

OPTIONAL = {
    # module: (what it is called, what it is to mfengine)
    "nvidia.dali": ("DALI", "reads data sets in mfengine.train; pip install nvidia-dali-cuda130"),
    "diffusers": ("diffusers", 'encodes images and decodes latents with a VAE; pip install "mfengine[vae]"'),
    "lmdb": ("lmdb", 'reads LMDBs in mfengine.prepare; pip install "mfengine[lmdb]"'),
    "torch_fidelity": ("torch-fidelity", 'FID against a reference in mfengine.evaluate; pip install "mfengine[fid]"'),
    "flash_attn": (
        "flash-attn",
        "one more attention where no tangent is needed; pip install flash-attn",
    ),
    "plotly": ("plotly", 'draws the curves of mfengine.report; pip install "mfengine[report]"'),
    "wandb": ("wandb", "shows runs by --tracker wandb; pip install wandb"),
    "amp_C": ("apex", 'another AdamW for mfengine.optim.AdamWEMA(backend="apex"); from NVIDIA\'s repository'),
    "jvp_flash_attention": ("jvp_flash_attention", "only a peer in the benchmarks; pip install jvp_flash_attention"),
}


def rows() -> list[tuple[str, str]]:
    """(what, its state) of everything that decides how fast mfengine runs here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        ("mfengine", mfengine.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("device", _device(device)),
        ("ops", _ops(device)),
        ("CUDA library", _library()),
        ("attention", _attention(device)),
        ("Triton", _package("triton", "the fused kernels are written in it; pip install triton")),
        *((name, _package(module, purpose)) for module, (name, purpose) in OPTIONAL.items()),
    ]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, CUDA {torch.version.cuda}; {torch.cuda.device_count()} in all"
    return "CPU: " + ("torch is a build without CUDA" if torch.version.cuda is None else "torch finds no GPU")


def _ops(device: torch.device) -> str:
    """Which implementation the ops run on tensors of the device."""
    if fused(torch.empty(0, device=device)):
        return "triton: fused kernels"
    return "torch: plain PyTorch, as " + ("Triton is missing" if device.type == "cuda" else "tensors are on the CPU")


def _library() -> str:
    """Whether the optimizer has its CUDA kernels."""
    try:
        why = multi_tensor.library().why_not()
    except OSError as error:
        return f"{error}; mfengine.optim.AdamWEMA runs PyTorch's kernels"
    if why is not None:
        return f"built; mfengine.optim.AdamWEMA runs PyTorch's kernels here, since {why}"
    return "mfengine.optim.AdamWEMA in one pass over memory"


def _attention(device: torch.device) -> str:
    """Which implementation computes the attention of XL/2 where no tangent is needed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    why = choice.why_not("flash-attn", device, dtype, PRESETS["xl2"][1].model.head_dim or 0)
    return f"sdpa where no tangent is needed; flash-attn {f'is unavailable: {why}' if why else 'can be asked for'}"


def _package(module: str, purpose: str) -> str:
    """Version of a package, or why there is none. It is imported: one built for another torch is found only so."""
    try:
        if find_spec(module) is None:
            return f"not installed ({purpose})"
        return str(getattr(import_module(module), "__version__", "installed, of unknown version"))
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):  # the parent of nvidia.dali
            return f"not installed ({purpose})"
        return f"installed, but does not import: {error}"
    except Exception as error:
        return f"installed, but does not import: {str(error).partition(chr(10))[0]}"


@dataclass(frozen=True)
class InfoArgs:
    """Show what is active in this environment, and why something is not."""


def main(args: Sequence[str]) -> None:
    cli.parse(InfoArgs, args, "info")
    table = rows()
    width = max(len(name) for name, _ in table)
    for name, state in table:
        print(f"{name:{width}}  {state}")


if __name__ == "__main__":
    cli.run(main)
