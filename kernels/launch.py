"""Shared parts of launchers: the launch itself, configurations, and checks of arguments before anything is launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

MAX_PLANS = 4096  # per function: batches have many sizes
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Config:
    """Tile sizes, warps and pipeline stages of a kernel."""

    def __init__(self, num_warps: int, num_stages: int, **blocks: int) -> None:
        self.blocks = blocks
        self.options = {"num_warps": num_warps, "num_stages": num_stages}

    @property
    def kwargs(self) -> dict[str, Any]:
        return {**self.blocks, **self.options}

    def grid(self, rows: int, heads: int, block: str = "BLOCK_M") -> tuple[int]:
        return (-(-rows // self.blocks[block]) * heads,)

    def even(self, keys: int) -> bool:
        return keys % self.blocks["BLOCK_N"] == 0


class Launch:
    """A launch of a kernel, prepared for all but the addresses of its tensors.

    Triton inspects every argument in every call to find the right code: 20 us of the host for 40 arguments. Here only
    pointers change from call to call, and only their alignment to 16 bytes matters. So Triton inspects the arguments
    once for each pattern of alignments; later calls pass addresses to the compiled code.

    Args:
        kernel: a Triton kernel whose parameters are pointers, then scalars, then compile-time constants.
        grid: programs on each axis. Axes 1 and 2 end at 65,535.
        scalars: integers and floats, in the order of the parameters.
        constants: compile-time constants, and Triton's options.
        starts: for each pointer, the element of the tensor that it points to; 0 for omitted ones at the end.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        scalars: tuple[float, ...],
        constants: dict[str, Any],
        starts: Sequence[int] = (),
    ) -> None:
        self.kernel, self.grid, self.scalars, self.constants = kernel, (*grid, 1, 1)[:3], scalars, constants
        self.starts = starts
        self._runs: dict[int, Callable[..., None]] = {}
        self._bytes: list[int] = []
        self._rest: tuple[Any, ...] = ()
        self._device: torch.device | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on tensors, or None, with the same layouts and device in every call."""
        if not self._bytes:
            self._look_at(tensors)
        pointers: list[int | None] = []
        odd = 0
        for x, start in zip(tensors, self._bytes, strict=True):
            if x is None:
                pointers.append(None)
            else:
                pointer = x.data_ptr() + start
                odd = odd << 1 | (pointer & 15 != 0)
                pointers.append(pointer)
        if self._device is None or self._device.index == torch.cuda.current_device():
            self._launch(odd, pointers, tensors)
        else:
            with torch.cuda.device(self._device):  # Triton launches on the current device
                self._launch(odd, pointers, tensors)

    def _look_at(self, tensors: Sequence[Tensor | None]) -> None:
        self.starts = starts = (*self.starts, *[0] * (len(tensors) - len(self.starts)))
        like = next(x for x in tensors if x is not None)
        self._device = like.device if like.is_cuda else None
        names = self.kernel.arg_names[len(tensors) + len(self.scalars) :]
        self._rest = (*self.scalars, *(self.constants[name] for name in names))
        # Assigned last: as soon as it is set, another thread may launch.
        self._bytes = [0 if x is None else start * x.element_size() for x, start in zip(tensors, starts, strict=True)]

    def _launch(self, odd: int, pointers: Sequence[int | None], tensors: Sequence[Tensor | None]) -> None:
        run = self._runs.get(odd)
        if run is not None:
            run(*pointers, *self._rest)
            return
        arguments = [_at(x, start) for x, start in zip(tensors, self.starts, strict=True)]
        compiled = self.kernel[self.grid](*arguments, *self.scalars, **self.constants)
        if compiled is not None:  # None: interpreted
            self._runs[odd] = compiled[self.grid]


def forget_plans() -> None:
    """Drop all plans, for a different Triton driver, which compiles again."""
    for plans in _all_plans:
        plans.clear()


def _at(x: Tensor | None, start: int) -> Tensor | None:
    return x if x is None or not start else x.as_strided((1,), (1,), x.storage_offset() + start)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous tensor with x's shape and device."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def nothing(*_: Any) -> None:
    """The launch for tensors without elements."""


Plan = TypeVar("Plan")
_all_plans: list[dict[Any, Any]] = []


def planned(make: Callable[..., Plan]) -> Callable[..., Plan]:
    """Cache a function of tensors by their layouts, which must determine its result.

    The function is called as (tensors, *others), where tensors is a tuple of tensors or None. Errors are not cached.
    """
    plans: dict[Any, Plan] = {}
    _all_plans.append(plans)

    @wraps(make)
    def plan(tensors: tuple[Tensor | None, ...], *others: Any) -> Plan:
        key: list[Any] = [others]
        for x in tensors:
            key += (None,) if x is None else (x.shape, x.stride(), x.dtype, x.device)
        found = plans.get(tuple(key))
        if found is None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            found = plans[tuple(key)] = make(tensors, *others)
        return found

    return plan


def aligned(x: Tensor) -> Tensor:
    """x (B, H, N, d), or a copy in a layout that the attention kernels support."""
    return x if readable(x) and not misaligned(x) else x.clone(memory_format=torch.contiguous_format)


def readable(x: Tensor) -> bool:
    """Whether rows of x (B, H, N, d) are contiguous and a multiple of 16 bytes apart, and offsets within a head are
    below 2^31.
    """
    *steps, last = x.stride()
    unit = 16 // x.element_size()
    return last == 1 and not any(step % unit for step in steps) and x.shape[2] * steps[2] < 2**31


def misaligned(*tensors: Tensor) -> bool:
    """Whether any tensor starts at an address that is not a multiple of 16 bytes."""
    return any(x.data_ptr() & 15 for x in tensors)


def widths(dim: int, least: int = 16) -> tuple[int, int]:
    """A head dim as a power of two plus a tail padded to one; a tail has at least `least` columns."""
    head = max(16, 1 << (dim.bit_length() - 1))
    rest = dim - head
    return head, max(least, 1 << (rest - 1).bit_length()) if rest > 0 else 0


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}; it must be float16, bfloat16 or float32")


def check_like(name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """ValueError unless x has this shape, and the dtype and device of `like`."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be of shape {tuple(shape)}, not {tuple(x.shape)}")
    if x.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype}, not {x.dtype}")
    check_device(name, x, like)


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, not {x.device}")
