"""Between host and device: memory, random numbers, and copies that make neither wait for the other."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor


def expandable_segments() -> None:
    """Let PyTorch's allocator grow its segments, so that less memory is lost to gaps; before CUDA starts.

    Settings that the user made stay.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def step_generator(seed: int, step: int, part: int) -> torch.Generator:
    """The random numbers of one pass: they follow from where it stands, so none of their state is saved."""
    state = np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def device_generator(generator: torch.Generator, device: torch.device | str) -> torch.Generator:
    """A generator on the device, seeded from one on the host, or that one where tensors have no values."""
    if torch.device(device).type == "meta":
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor without waiting for the device."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class HostCopy:
    """Figures on their way from the device to the host."""

    def __init__(self, x: Tensor) -> None:
        self._event = None
        self._host = x
        if x.device.type == "cuda":
            self._host = torch.empty_like(x, device="cpu", pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> list[float]:
        """The figures, once everything queued before the copy is done."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
