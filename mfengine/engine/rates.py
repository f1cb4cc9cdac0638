"""Peak rates of devices: from data sheets, and measured in a matrix product."""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import torch


class DataSheet(NamedTuple):
    """Rates of a GPU from NVIDIA's data sheets; figures for sparse matrices are halved."""

    tflops: float  # TFLOP/s of dense bfloat16 products with float32 accumulation
    single_tflops: float  # TFLOP/s of float32 outside tensor cores
    gb_per_s: float  # bandwidth of device memory
    memory_gb: float
    multiprocessors: int


# Keys are words of the device's name in PyTorch. The first entry with all its words in the name counts, so variants
# precede the plain name, which stands for the usual variant.
DATA_SHEETS: dict[tuple[str, ...], DataSheet] = {
    ("GB200",): DataSheet(2500.0, 80.0, 8000.0, 186.0, 152),
    ("B200",): DataSheet(2250.0, 75.0, 7700.0, 180.0, 148),
    ("H200", "NVL"): DataSheet(835.5, 60.0, 4800.0, 141.0, 132),
    ("H200",): DataSheet(989.4, 67.0, 4800.0, 141.0, 132),
    ("GH200",): DataSheet(989.4, 67.0, 4000.0, 96.0, 132),
    ("H100", "NVL"): DataSheet(835.5, 60.0, 3900.0, 94.0, 132),
    ("H100", "PCIe"): DataSheet(756.5, 51.0, 2000.0, 80.0, 114),
    ("H100",): DataSheet(989.4, 67.0, 3350.0, 80.0, 132),
    ("H800", "PCIe"): DataSheet(756.5, 51.0, 2000.0, 80.0, 114),
    ("H800",): DataSheet(989.4, 67.0, 3350.0, 80.0, 132),
    ("A100",): DataSheet(312.0, 19.5, 2039.0, 80.0, 108),
    ("A800",): DataSheet(312.0, 19.5, 2039.0, 80.0, 108),
    ("L40S",): DataSheet(362.0, 91.6, 864.0, 48.0, 142),
    ("L4",): DataSheet(121.0, 30.3, 300.0, 24.0, 58),
}


def data_sheet(name: str) -> DataSheet | None:
    """The entry for a GPU's name, as in PyTorch or as `h100-pcie`; None if there is none."""
    words = set(re.split(r"[\s-]+", name.lower()))
    return next((s for known, s in DATA_SHEETS.items() if words.issuperset(w.lower() for w in known)), None)


def data_sheet_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOPs per second in the data sheet for bfloat16 or float16; None for other dtypes and for unlisted devices."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    sheet = data_sheet(torch.cuda.get_device_name(device))
    return None if sheet is None else 1e12 * sheet.tflops


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second that MFU refers to: the data sheet's, or else the measured rate."""
    return data_sheet_rate(device, dtype) or matrix_rate(device, dtype)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second in a large matrix product, measured in a fraction of a second."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def run() -> float:
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run()
    return 5 * 2 * n**3 / min(run() for _ in range(3))
