"""Which implementation an op runs: fused Triton kernels on CUDA, plain PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
_backend: Backend = "auto"


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run ops on a given implementation inside: "triton", "torch", or "auto", by device.

    Raises:
        ValueError: there is no such implementation.
    """
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"there is no backend {name}; accepted are {', '.join(get_args(Backend))}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def fused(x: Tensor) -> bool:
    """Whether an op on x runs fused kernels. They take no float64, which "auto" leaves to plain PyTorch."""
    if _backend == "auto":
        return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and _has_triton()
    return _backend == "triton"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
