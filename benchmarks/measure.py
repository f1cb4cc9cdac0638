"""How everything here is timed, and beside what: the clock, the machine's ceilings, and a row of the tables."""

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
    samples: int  # of one call
    flops: float  # of one call: the least that the case needs, whatever the implementation does
    bytes: float  # of one call, likewise
    predicted: float = 0.0  # seconds of one call by the roofline, the host included; 0 where it says nothing

    @property
    def label(self) -> str:
        return f"{self.suite}: {self.case}"

    def floor(self, ceilings: dict[str, float]) -> float:
        """Seconds of one call if the needed arithmetic, or the needed memory traffic, ran at the machine's ceiling."""
        return max(self.flops / ceilings["matrix_flops_per_s"], self.bytes / ceilings["memory_bytes_per_s"])


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, its columns aligned for the terminal too: text to the left, figures to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    left = [not any(line[i][:1].isdigit() for line in lines) for i in range(len(header))]

    def row(cells: list[str]) -> str:
        padded = [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(cells, widths, left, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if is_left else ("-" * (w - 1) + ":") for w, is_left in zip(widths, left, strict=True)]
    return "\n".join([row(header), f"| {' | '.join(rule)} |", *map(row, lines)])


def make_clock(device: torch.device, hide_host: bool = False) -> Callable[[], float]:
    """A function that tells seconds since some moment: the host's on a CPU, of CUDA events on a GPU.

    On a GPU it waits until all that was queued is done; the device's time passes between two calls.

    Args:
        device: the clock's.
        hide_host: give the device other work first, which does not count. Calls are then queued while it is busy and
            follow each other at once, so that the host's time does not show: kernels take less than their launches.
    """
    if device.type != "cuda":
        return time.perf_counter
    last = torch.cuda.Event(enable_timing=True)
    last.record()
    total, portions, keep_busy = 0.0, 16, other_work(device) if hide_host else None

    def clock() -> float:
        nonlocal last, total, portions
        late = last.query()  # the device began to wait for the host
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
    """Seconds of one call of f, for each of several rounds that take about so long in all."""
    f()
    start = clock()
    f()
    now = clock()
    # Short calls are queued one behind the other, so that the device does not wait for the host.
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
    """The fields of a `Row` that come from its rounds."""
    return {
        "seconds": statistics.median(rounds),
        "fastest": min(rounds),
        "slowest": max(rounds),
        "rounds": len(rounds),
    }


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> dict[str, float]:
    """What this machine reaches: moving large arrays, and a large matrix product in `dtype`; its data sheet's peak.

    Arrays are copied, and added in place: a CPU reads what a copy overwrites, which copying does not show.
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
    """The machine, the versions and the commit that figures belong to."""
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
    """The model of the GPU, or a CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"


def short_name(device: torch.device) -> str:
    """The folder of this device's accepted figures: h200, cpu."""
    return device_name(device).lower().removeprefix("nvidia ").split()[0].rstrip(",")
