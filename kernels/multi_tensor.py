"""AdamW with moving averages, and the sum of squares, over many tensors at once: kernels/cuda through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_AVERAGES = 8
CHUNK = 16384  # elements per block
INTERFACE = 1  # MFENGINE_INTERFACE of multi_tensor.h
GRAD_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LIBRARY = Path(__file__).with_name("libmfengine_cuda.so")

# mfengine_tensor of multi_tensor.h.
TENSOR = np.dtype(
    [("numel", "<i8")]
    + [(name, "<u8") for name in ("param", "grad", "exp_avg", "exp_avg_sq", "step", "copy")]
    + [("averages", "<u8", MAX_AVERAGES)]
)


class _Config(ctypes.Structure):
    """mfengine_adamw_config of multi_tensor.h."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        ("decays", ctypes.c_double * MAX_AVERAGES),
        *((name, ctypes.c_int32) for name in ("num_averages", "grad_dtype")),
    )


@dataclass(frozen=True)
class Row:
    """A parameter with its gradient and state: dense, on one device, with the same strides, float32 unless noted."""

    param: Tensor
    grad: Tensor | None  # float32 or bfloat16; without one, averages and copy still follow the parameter
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # () number of this step, from 1
    averages: list[Tensor]
    copy: Tensor | None  # bfloat16


class Library:
    """The compiled library.

    Raises:
        OSError: it cannot be loaded, or was built from another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lib = self._lib = ctypes.CDLL(str(path))
        agreed = (ctypes.c_int64 * 4)()
        if hasattr(lib, "mfengine_interface"):
            lib.mfengine_interface(agreed)
        if list(agreed) != [TENSOR.itemsize, ctypes.sizeof(_Config), CHUNK, INTERFACE]:
            raise OSError(f"{path.name} was built from a different version: install mfengine again")
        lib.mfengine_device.restype = lib.mfengine_error.restype = ctypes.c_char_p
        self.device: str = lib.mfengine_device().decode()
        """device type of the tensors that it takes"""

    def why_not(self) -> str | None:
        """Why the current device is unavailable; None if it is available."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "PyTorch finds no GPU"
        if code := self._lib.mfengine_ready():
            return str(self._lib.mfengine_error(code).decode())
        oldest = self._lib.mfengine_oldest()
        if oldest and (capability := torch.cuda.get_device_capability()) < divmod(oldest, 10):
            return f"it was built for sm_{oldest} and later; this GPU is sm_{capability[0]}{capability[1]}"
        return None

    def adamw_ema(
        self,
        rows: list[Row],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decays: tuple[float, ...],
        grad_scale: Tensor | None,
        skip: Tensor | None,
    ) -> None:
        """AdamW (Loshchilov and Hutter, arXiv 1711.05101), averages <- d average + (1 - d) parameter, and copies.

        Args:
            rows: the parameters.
            lr, betas, eps, weight_decay: settings of AdamW.
            decays: decays of each row's averages.
            grad_scale: () float32 on the device, a factor for the gradients, or None.
            skip: () float32 on the device; if it is not 0, nothing is written. Or None.

        Raises:
            RuntimeError: the launch failed.
        """
        for dtype, code in GRAD_DTYPES.items():
            # Rows without a gradient join the float32 ones.
            part = [row for row in rows if (torch.float32 if row.grad is None else row.grad.dtype) == dtype]
            if not part:
                continue
            table = np.zeros(len(part), TENSOR)
            for name in ("param", "grad", "exp_avg", "exp_avg_sq", "step", "copy"):
                table[name] = [_pointer(getattr(row, name)) for row in part]
            table["numel"] = [row.param.numel() for row in part]
            for i in range(len(decays)):
                table["averages"][:, i] = [_pointer(row.averages[i]) for row in part]
            factors = (ctypes.c_double * MAX_AVERAGES)(*decays)
            config = _Config(lr, *betas, eps, weight_decay, factors, len(decays), code)
            arguments = ctypes.byref(config), _address(grad_scale), _address(skip)
            self._call(self._lib.mfengine_adamw_ema, table, part[0].param.device, *arguments)

    def sum_of_squares(self, grads: list[Tensor]) -> Tensor:
        """Sum of the squares of all elements, with the same bits in every call.

        Args:
            grads: at least one; all dense, all float32 or all bfloat16, on one device.

        Returns:
            () float64 on the device.

        Raises:
            RuntimeError: the launch failed.
        """
        device = grads[0].device
        table = np.zeros(len(grads), TENSOR)
        table["numel"] = [grad.numel() for grad in grads]
        table["grad"] = [_pointer(grad) for grad in grads]
        chunks = int((-(-table["numel"] // CHUNK)).sum())
        partials = torch.empty(chunks, dtype=torch.float64, device=device)
        total = torch.empty((), dtype=torch.float64, device=device)
        arguments = ctypes.c_int32(GRAD_DTYPES[grads[0].dtype]), _address(partials), _address(total)
        self._call(self._lib.mfengine_sum_of_squares, table, device, *arguments)
        return total

    def _call(self, function: Callable[..., int], table: np.ndarray, device: torch.device, *args: Any) -> None:
        stream = 0
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device).cuda_stream
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            code = function(
                ctypes.c_void_p(table.ctypes.data), ctypes.c_int32(len(table)), *args, ctypes.c_void_p(stream)
            )
        if code:
            raise RuntimeError(f"mfengine's CUDA library: {self._lib.mfengine_error(code).decode()}")


@cache
def library() -> Library:
    """The installed CUDA library.

    Raises:
        OSError: it was not built, or cannot be loaded.
    """
    if not LIBRARY.is_file():
        raise OSError("not built: mfengine was installed without nvcc, or with MFENGINE_CUDA=0")
    return Library(LIBRARY)


def bytes_moved(row: Row) -> int:
    """Bytes that one step of AdamW reads and writes for a parameter, each counted once."""
    moved = 4 + sum(2 * 4 for _ in row.averages) + (0 if row.copy is None else row.copy.element_size())
    if row.grad is not None:
        moved += row.grad.element_size() + 4 + 2 * (4 + 4)  # gradient, new parameter, both moments
    return moved * row.param.numel()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_pointer(x))
