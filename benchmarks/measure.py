"""Shared tools for timing: the clock, the machine's ceilings, and rows of the tables."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mfengine.engine.rates import data_sheet_rate, matrix_rate

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One implementation of one case, timed."""

    suite: str
    case: str
    implementation: str
    seconds: float  # of one call: the median of the rounds
    fastest: float  # seconds
    slowest: float  # seconds
    rounds: int
    samples: int  # per call
    flops: float  # least FLOPs of a call, whatever the implementation does
    bytes: float  # least bytes of a call
    predicted: float = 0.0  # seconds of a call in the roofline model, with the host; 0 if unknown

    @property
    def label(self) -> str:
        return f"{self.suite}: {self.case}"

    def floor(self, ceilings: dict[str, float]) -> float:
        """Seconds of a call if its arithmetic, or its memory traffic, ran at the machine's ceiling."""
        return max(self.flops / ceilings["matrix_flops_per_s"], self.bytes / ceilings["memory_bytes_per_s"])


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose columns also align in a terminal: text to the left, figures to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    left = [not any(line[i][:1].isdigit() for line in lines) for i in range(len(header))]

    def row(cells: list[str]) -> str:
        padded = [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(cells, widths, left, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if is_left else ("-" * (w - 1) + ":") for w, is_left in zip(widths, left, strict=True)]
    return "\n".join([row(header), f"| {' | '.join(rule)} |", *map(row, lines)])


def make_clock(device: torch.device, hide_host: bool = False) -> Callable[[], float]:
    """A function that returns seconds since some moment: from the host on a CPU, from CUDA events on a GPU.

    On a GPU it waits until all queued work is done; the device's time passes between two calls.

    Args:
        device: the device to time.
        hide_host: first give the device other work, which does not count. Calls are queued while it is busy and then
            run back to back, so that the host's time does not show: kernels can take less time than their launches.
    """
    if device.type != "cuda":
        return time.perf_counter
    last = torch.cuda.Event(enable_timing=True)
    last.record()
    total, portions, keep_busy = 0.0, 16, other_work(device) if hide_host else None

    def clock() -> float:
        nonlocal last, total, portions
        late = last.query()  # the device was already waiting for the host
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        total += last.elapsed_time(event) / 1e3  # summed here: an event's float32 would lose microseconds in a minute
        if keep_busy is not None:
            portions = min(2 * portions, 128) if late else max(16, portions - 1)
            for _ in range(portions):
                keep_busy()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        last = event
        return total

    return clock


def other_work(device: torch.device) -> Callable[[], Any]:
    """A function that queues about a millisecond of work."""
    return torch.zeros(2**28, device=device).neg_


def measure(f: Callable[[], Any], clock: Callable[[], float], seconds: float, warmup: int = 3) -> list[float]:
    """Seconds per call of f, for each of several rounds that take about `seconds` in all."""
    f()
    start = clock()
    f()
    now = clock()
    # Short calls are queued without waiting, so that the device does not idle.
    calls = max(1, min(50, int(2e-3 / max(now - start, 1e-7))))
    rounds: list[float] = []
    until = time.monotonic() + seconds
    while len(rounds) < warmup + 3 or time.monotonic() < until:
        start = now
        for _ in range(calls):
            f()
        now = clock()
        rounds.append((now - start) / calls)
    return rounds[warmup:]


def summarise(rounds: list[float]) -> dict[str, Any]:
    """The fields of a `Row` that depend on its rounds."""
    return {
        "seconds": statistics.median(rounds),
        "fastest": min(rounds),
        "slowest": max(rounds),
        "rounds": len(rounds),
    }


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> dict[str, float]:
    """This machine's rates for moving large arrays and for a large matrix product in `dtype`; its data-sheet peak.

    Arrays are copied, and added in place: a CPU reads what a copy overwrites, which copying alone would not show.
    """
    size = 2**30 if device.type == "cuda" else 2**27
    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    clock = make_clock(device)
    copying = 2 * size / min(measure(lambda: b.copy_(a), clock, seconds))
    adding = 3 * size / min(measure(lambda: b.add_(a), clock, seconds))
    found = {"memory_bytes_per_s": max(copying, adding), "matrix_flops_per_s": matrix_rate(device, dtype)}
    peak = data_sheet_rate(device, dtype)
    return found if peak is None else found | {"peak_flops_per_s": peak}


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit of the figures."""
    commit = None
    if shutil.which("git"):
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        commit = done.stdout.strip() or None
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton") if find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": commit,
    }


def device_name(device: torch.device) -> str:
    """The model of the GPU, or a name for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"


def short_name(device: torch.device) -> str:
    """The folder of this device's accepted figures, such as h200 or cpu."""
    return device_name(device).lower().removeprefix("nvidia ").split()[0].rstrip(",")
