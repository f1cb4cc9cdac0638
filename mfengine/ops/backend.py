"""Which implementation an op runs: fused Triton kernels on CUDA, plain PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from mfengine.torch_private import transformed

Backend = Literal["auto", "triton", "torch"]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # that kernels take
_backend: Backend = "auto"


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose the implementation of ops inside the context: "triton", "torch", or "auto", which goes by device.

    Raises:
        ValueError: the name is unknown.
    """
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"backend {name} does not exist; it must be one of {', '.join(get_args(Backend))}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def chosen() -> Backend:
    """The backend set by `use_backend`."""
    return _backend


def fused(*tensors: Tensor) -> bool:
    """Whether an op on these arguments runs fused kernels.

    "auto" uses plain PyTorch for float64, and under transforms of `torch.func` other than a single jvp.

    Raises:
        ValueError: "triton" under such a transform.
    """
    if _backend == "auto":
        kernels_take = all(x.is_cuda and x.dtype in _DTYPES for x in tensors)
        return kernels_take and _has_triton() and not transformed()
    if _backend == "triton" and transformed():
        raise ValueError(
            "fused kernels run under a single torch.func.jvp, not under vmap, grad, jacfwd or nested transforms; "
            'use_backend("auto") uses plain PyTorch there'
        )
    return _backend == "triton"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
