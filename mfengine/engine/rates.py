"""How fast a device multiplies matrices: by its data sheet, and measured."""

from __future__ import annotations

import time

import torch

# Dense bfloat16 with float32 accumulation, in TFLOP/s, by words of the device's name as PyTorch gives it. The first
# entry whose words are all in the name counts, so variants come before the plain name. From NVIDIA's data sheets,
# whose figures for sparse matrices are halved here.
DATA_SHEET_TFLOPS: dict[tuple[str, ...], float] = {
    ("GB200",): 2500.0,
    ("B200",): 2250.0,
    ("H200", "NVL"): 835.5,
    ("H200",): 989.4,
    ("GH200",): 989.4,
    ("H100", "NVL"): 835.5,
    ("H100", "PCIe"): 756.5,
    ("H100",): 989.4,
    ("H800", "PCIe"): 756.5,
    ("H800",): 989.4,
    ("A100",): 312.0,
    ("A800",): 312.0,
    ("L40S",): 362.0,
    ("L4",): 121.0,
}


def data_sheet_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOPs per second by the data sheet in bfloat16 or float16; None for other dtypes and devices not in the table."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    return next((1e12 * rate for name, rate in DATA_SHEET_TFLOPS.items() if words.issuperset(name)), None)


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second that the MFU is a share of: the data sheet's, or the measured rate where there is none."""
    return data_sheet_rate(device, dtype) or matrix_rate(device, dtype)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second that a device reaches in a large matrix product, measured in a fraction of a second."""
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
