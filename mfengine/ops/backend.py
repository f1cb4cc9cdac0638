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


def chosen() -> Backend:
    """What `use_backend` set."""
    return _backend


def fused(x: Tensor) -> bool:
    """Whether an op on x runs fused kernels.

    "auto" leaves to plain PyTorch what they do not take: float64, and transforms of `torch.func` other than one jvp.

    Raises:
        ValueError: "triton" under such a transform.
    """
    if _backend == "auto":
        kernels_take = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        return kernels_take and _has_triton() and not transformed()
    if _backend == "triton" and transformed():
        raise ValueError(
            "fused kernels run under a single torch.func.jvp, not under vmap, grad, jacfwd or nested transforms; "
            'use_backend("auto") takes plain PyTorch there'
        )
    return _backend == "triton"


def transformed() -> bool:
    """Whether transforms of `torch.func` other than a single jvp are active."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return len(stack) > 1 or any(level.key() != torch._C._functorch.TransformType.Jvp for level in stack)


# What torch.compiler.assume_constant_result does, without its import of the compiler, which takes a second: the
# compiler guards on the transforms that are active.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
