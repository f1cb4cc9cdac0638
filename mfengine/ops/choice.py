"""Which implementation computes attention where no argument has a tangent."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.autograd.forward_ad as fwad

from mfengine.ops.backend import chosen
from mfengine.ops.dual import Dual, primal_of
from mfengine.torch_private import constant_for_compiler, transformed

Attention = Literal["auto", "torch", "triton", "sdpa", "flash-attn"]

FLASH_ATTN_DEVICES = ("cuda",)
_asked: Attention = "auto"


@contextmanager
def use_attention(name: Attention) -> Iterator[None]:
    """Compute attention that needs no tangent with a given implementation inside, whatever `use_backend` says.

    "torch" is the plain reference, "triton" our kernels, "sdpa" PyTorch's `scaled_dot_product_attention`, "flash-attn"
    that package; "auto" is what `use_backend` says and, where that is "auto" too, "sdpa". Where an argument has a
    tangent, all rows and their backward are computed by what `use_backend` says. So they are under transforms of
    `torch.func`.

    Raises:
        ValueError: there is no such implementation; from attention inside, if it does not run here or does not take
            the arguments.
    """
    global _asked
    if name not in get_args(Attention):
        raise ValueError(f"there is no attention {name}; accepted are {', '.join(get_args(Attention))}")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def choose(*args: Any, dim: int) -> Attention:
    """The implementation for heads of `dim` channels, or "auto" if `use_backend` decides.

    Raises:
        ValueError: the one asked for does not do it.
    """
    if any(isinstance(a, Dual) for a in args):
        return "auto"
    if transformed() or any(fwad.unpack_dual(a).tangent is not None for a in args):
        return "auto"
    if _asked == "auto":
        backend = chosen()
        return "sdpa" if backend == "auto" else backend
    x = primal_of(args[0])
    if why := why_not(_asked, x.device, x.dtype, operator.index(dim)):
        raise ValueError(f"attention by {_asked}: {why}")
    return _asked


@constant_for_compiler
def why_not(name: Attention, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why an implementation does not compute attention on heads of `dim` channels, or None if it does."""
    return _why_not(name, device, dtype, dim)


@cache
def _why_not(name: Attention, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if device.type == "meta":
        return None
    if name == "triton":
        return _why_not_triton(device, dtype, dim)
    if name == "flash-attn":
        if missing := _does_not_import("flash_attn"):
            return missing
        if device.type not in FLASH_ATTN_DEVICES:
            return "it runs on a GPU alone"
        if dtype not in (torch.float16, torch.bfloat16) or dim > 256:
            return f"it takes float16 and bfloat16 and head dims up to 256, not {dtype} of {dim}"
    return None


def _why_not_triton(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if missing := _does_not_import("triton"):
        return missing
    if device.type == "cpu" and not import_module("triton").knobs.runtime.interpret:
        return "its kernels run on a GPU alone"
    from mfengine.kernels.attention import check_arguments

    head = torch.empty(1, 1, 1, dim, dtype=dtype, device="meta")
    try:
        check_arguments(head, head, head)
    except ValueError as error:
        return str(error)
    return None


@cache
def _does_not_import(module: str) -> str | None:
    name = module.replace("_", "-")
    if find_spec(module) is None:
        return f"{name} is not installed: pip install {name}"
    try:
        import_module(module)
    except Exception as error:  # one built for another torch is found only so
        return f"{name} does not import: {str(error).partition(chr(10))[0]}"
    return None
