"""Chooses the implementation of attention if no argument has a tangent."""

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
    """Choose the implementation of attention without a tangent inside the context, whatever `use_backend` says.

    "torch" is the plain reference, "triton" our kernels, "sdpa" PyTorch's `scaled_dot_product_attention`, and
    "flash-attn" that package. "auto" follows `use_backend`, and means "sdpa" if that is "auto", too. If an argument has
    a tangent, `use_backend` decides for all rows and their backward. It also decides under transforms of `torch.func`.

    Raises:
        ValueError: the name is unknown. Attention inside raises it if the implementation does not run here or does not
            support the arguments.
    """
    global _asked
    if name not in get_args(Attention):
        raise ValueError(f"attention {name} does not exist; it must be one of {', '.join(get_args(Attention))}")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def choose(*args: Any, dim: int) -> Attention:
    """The implementation for heads of `dim` channels, or "auto" if `use_backend` decides.

    Raises:
        ValueError: the requested implementation does not support them.
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
        raise ValueError(f"attention with {_asked}: {why}")
    return _asked


@constant_for_compiler
def why_not(name: Attention, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why an implementation cannot compute attention with heads of `dim` channels; None if it can."""
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
            return "it runs only on a GPU"
        if dtype not in (torch.float16, torch.bfloat16) or dim > 256:
            return f"it takes float16 or bfloat16 and head dims up to 256, not {dtype} and {dim}"
    return None


def _why_not_triton(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if missing := _does_not_import("triton"):
        return missing
    if device.type == "cpu" and not import_module("triton").knobs.runtime.interpret:
        return "its kernels run only on a GPU"
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
    except Exception as error:  # only an import shows whether it was built for another torch
        return f"the import of {name} fails: {str(error).partition(chr(10))[0]}"
    return None
