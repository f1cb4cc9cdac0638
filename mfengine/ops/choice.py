"""Which implementation attention runs: asked for, or the fastest that was measured on this device.

There is a choice where no tangent is needed, and in the backward. Times are in attention_times.json beside this file,
which `python -m benchmarks.attention` writes.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mfengine.ops.backend import chosen

Implementation = Literal["torch", "triton", "sdpa", "flash-attn"]
Attention = Literal["auto", "torch", "triton", "sdpa", "flash-attn"]
Work = Literal["forward", "training", "instant", "backward"]

TIMES = Path(__file__).with_name("attention_times.json")
WORK: dict[Work, tuple[Implementation, ...]] = {
    "forward": get_args(Implementation),  # no row has a tangent, and no backward follows
    "training": get_args(Implementation),  # no row has a tangent; forward and backward
    "instant": ("triton", "sdpa", "flash-attn"),  # forward of leading rows without a tangent, beside our dual kernel
    "backward": ("triton", "sdpa"),  # of any rows, from the output and the log-sum-exp
}
FLASH_ATTN_DEVICES = ("cuda",)
HALF = (torch.float16, torch.bfloat16)

_asked: Attention = "auto"


@contextmanager
def use_attention(name: Attention) -> Iterator[None]:
    """Compute attention that needs no tangent with a given implementation inside, whatever `use_backend` says.

    "torch" is the plain reference, "triton" our kernels, "sdpa" PyTorch's `scaled_dot_product_attention`, "flash-attn"
    that package; "auto" is what `use_backend` says and, where that is "auto" too, the fastest one measured on this
    device. Where fused duals are concerned, it computes the rows without a tangent and the backward; what an
    implementation does not do of this is ours. Inside of PyTorch's forward mode and of transforms of `torch.func` it
    says nothing.

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


def choose(work: Work, device: torch.device, dtype: torch.dtype, dim: int, tokens: int) -> Implementation:
    """The implementation of some work on heads (tokens, dim).

    Raises:
        ValueError: the one asked for does not do it.
    """
    # Read here and not in `_steps`, so that torch.compile guards on them; and tokens may be symbolic.
    backend = chosen()
    if _asked == "auto" and backend != "auto":
        return backend
    (_, best), *others = _steps(_asked, work, device, dtype, operator.index(dim))
    for above, name in others:
        if tokens > above:
            best = name
    return best


def why_not(name: Implementation, work: Work, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why an implementation does not do some work on heads of `dim` channels, or None if it does."""
    if name not in WORK[work]:
        return f"it has no {work}"
    if device.type == "meta":
        return None
    if name == "triton":
        return _why_not_triton(device, dtype, dim)
    if name == "sdpa" and work in ("instant", "backward") and device.type == "cuda" and (dtype not in HALF or dim % 8):
        return "PyTorch's flash attention takes float16 and bfloat16 and head dims that are multiples of 8"
    if name == "flash-attn":
        if missing := _does_not_import("flash_attn"):
            return missing
        if device.type not in FLASH_ATTN_DEVICES:
            return "it runs on a GPU alone"
        if dtype not in HALF or dim > 256:
            return f"it takes float16 and bfloat16 and head dims up to 256, not {dtype} of {dim}"
    return None


def device_name(device: torch.device) -> str:
    """What the times of a device are filed under: the model of a GPU; all CPUs are one."""
    if device.type == "cuda" and torch.cuda.is_available():  # fake tensors name GPUs that are not there
        return torch.cuda.get_device_name(device)
    return device.type.upper()


def measured(work: Work, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The times of some work on this device: rows of `benchmarks.attention`."""
    rows = _times().get(device_name(device), {}).get("rows", [])
    return [row for row in rows if row["work"] == work and row["dtype"] == str(dtype).removeprefix("torch.")]


# ----------------------------------------------------------------------------
# How it is chosen.


def _steps(
    asked: Attention, work: Work, device: torch.device, dtype: torch.dtype, dim: int
) -> tuple[tuple[float, Implementation], ...]:
    """(tokens above which it is this one, implementation), by tokens; the first is for all that is shorter too."""
    return _cached_steps(asked, work, device, dtype, dim)


# As in `backend.transformed`: the arguments are constants for the compiler, and so is what follows from them.
_steps._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _cached_steps(
    asked: Attention, work: Work, device: torch.device, dtype: torch.dtype, dim: int
) -> tuple[tuple[float, Implementation], ...]:
    if asked != "auto":
        why = why_not(asked, work, device, dtype, dim)
        if why is None:
            return ((0, asked),)
        if work in ("forward", "training"):
            raise ValueError(f"attention by {asked}: {why}")
        return ((0, "triton"),)

    # Of the nearest measured head dim, the fastest at each number of tokens, over all batches together.
    rows = measured(work, device, dtype)
    nearest = min({row["dim"] for row in rows}, key=lambda d: abs(math.log(d / dim)), default=None)
    fastest: list[tuple[int, Implementation]] = []
    for tokens in sorted({row["tokens"] for row in rows if row["dim"] == nearest}):
        times = [row["times"] for row in rows if (row["dim"], row["tokens"]) == (nearest, tokens)]
        usable = [name for name in WORK[work] if all(name in t for t in times)]
        usable = [name for name in usable if why_not(name, work, device, dtype, dim) is None]
        if usable:
            fastest.append((tokens, min(usable, key=lambda name: sum(t[name]["seconds"] for t in times))))
    if not fastest:
        ours = work in ("instant", "backward") or (device.type == "cuda" and not _why_not_triton(device, dtype, dim))
        return ((0, "triton" if ours else "torch"),)
    # The nearest number of tokens, by their ratio.
    bounds = [0.0, *(math.sqrt(a * b) for (a, _), (b, _) in pairwise(fastest))]
    return tuple((above, name) for above, (_, name) in zip(bounds, fastest, strict=True))


@cache
def _times() -> dict[str, Any]:
    return json.loads(TIMES.read_text())


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
