"""What a run tells: the progress bar, metrics.jsonl, TensorBoard and pictures."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mfengine.data.pictures import image_grid, save_picture
from mfengine.files import write_atomic
from mfengine.progress import progress

METRICS = "metrics.jsonl"


class Telemetry:
    """Reports of one run; silent on every rank but the first.

    Args:
        folder: the run's.
        enabled: whether this rank reports.
        step, total_steps: where the run starts and ends.
        batch_size: samples per step.
        peak: samples per second if all of the step's arithmetic ran at the devices' `peak_rate`; speed is told as a
            share of it, the MFU.
    """

    def __init__(self, folder: Path, enabled: bool, step: int, total_steps: int, batch_size: int, peak: float) -> None:
        self._enabled, self._batch_size, self._peak = enabled, batch_size, peak
        self._last = (step, time.monotonic())
        self._scalars: dict[str, list[float]] = {}  # of the steps since the last line
        if not enabled:
            return
        self._folder = folder
        self._metrics = _continue_metrics(folder / METRICS, step)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self._bar = progress(total_steps * batch_size, "samples", initial=step * batch_size, scale=True)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._enabled:
            self._bar.close()
            self._metrics.close()
            self._tensorboard.close()

    def step(self, scalars: dict[str, float]) -> None:
        """One more step, with its metrics, the means over all ranks whose loss is finite; nan if none has one."""
        if self._enabled:
            for name, value in scalars.items():
                values = self._scalars.setdefault(name, [])
                if np.isfinite(value):
                    values.append(value)
            shown = {name: f"{value:.4g}" for name, value in scalars.items()}
            if rate := self._bar.format_dict["rate"]:
                shown["mfu"] = f"{rate / self._peak:.0%}"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(self._batch_size)

    def log(self, step: int, epoch: float, skipped_steps: int) -> None:
        """Write a line of figures: means and speed since the last one."""
        if not self._enabled:
            return
        now = time.monotonic()
        since, started = self._last
        speed = (step - since) * self._batch_size / (now - started)
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            **{name: float(np.mean(values)) if values else None for name, values in self._scalars.items()},
            "samples_per_second": round(speed, 1),
            "mfu": round(speed / self._peak, 4),
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if torch.cuda.is_initialized() else None,
            "skipped_steps": skipped_steps,
        }
        self._scalars.clear()
        self._last = (step, now)
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name, value in line.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(name, value, step)

    def figure(self, step: int, name: str, value: float) -> None:
        """Write a figure that is not taken at every step: a line of its own, and printed."""
        if self._enabled:
            self._metrics.write(json.dumps({"step": step, name: value if np.isfinite(value) else None}) + "\n")
            self._metrics.flush()
            self._tensorboard.add_scalar(name, value, step)
            self.say(f"step {step}: {name} {value:.4g}")

    def picture(self, step: int, images: Tensor) -> None:
        """Write a grid of images (B, 3, H, W) in [0, 1] as samples/STEP.png and to TensorBoard."""
        if self._enabled:
            grid = image_grid(images)
            save_picture(grid, self._folder / "samples" / f"{step:08d}.png")
            self._tensorboard.add_image("samples", grid, step)

    def say(self, message: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._enabled:
            self._bar.write(message, file=sys.stderr)


def _continue_metrics(path: Path, step: int) -> Any:
    """Open metrics.jsonl for appending, without the lines of steps that will be done again."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                break  # a line that a killed run left half-written, always the last
    write_atomic(path, "".join(kept))
    return path.open("a")
