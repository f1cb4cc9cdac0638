"""What a run tells: the progress bar, metrics.jsonl, TensorBoard and pictures."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mfengine.data.pictures import image_grid, save_picture
from mfengine.errors import InputError
from mfengine.files import write_atomic, writing
from mfengine.progress import progress

METRICS = "metrics.jsonl"
RETRY_S = 60.0  # after which TensorBoard is tried again


class Telemetry:
    """Reports of one run; silent on every rank but the first.

    Args:
        folder: the run's.
        enabled: whether this rank reports.
        step, total_steps: where the run starts and ends.
        batch_size: samples per step.
        peak: measures the samples per second if all of the step's arithmetic ran at the devices' `peak_rate`; speed is
            told as a share of it, the MFU. Called again when a step was faster.

    A disk that fails later does not end the run: it is told once, and what can wait is written when the disk works
    again.

    Raises:
        InputError: metrics.jsonl cannot be continued.
    """

    def __init__(
        self, folder: Path, enabled: bool, step: int, total_steps: int, batch_size: int, peak: Callable[[], float]
    ) -> None:
        self._enabled, self._batch_size, self._measure_peak = enabled, batch_size, peak
        self._last = (step, time.monotonic())
        self._scalars: dict[str, list[float]] = {}  # of the steps since the last line
        if not enabled:
            return
        self._peak = peak()
        self._folder = folder
        self._failing: set[str] = set()  # what could not be written when it was last tried
        self._unwritten = b""  # lines of metrics
        self._metrics = _continue_metrics(folder / METRICS, step)
        self._tensorboard: SummaryWriter | None = None
        self._retry_at = 0.0
        self._excepthook, threading.excepthook = threading.excepthook, _leave_to_caller
        self._bar = progress(total_steps * batch_size, "samples", initial=step * batch_size, scale=True)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._enabled:
            self.flush()
            self._bar.close()
            self._metrics.close()
            with suppress(OSError):
                if self._tensorboard is not None:
                    self._tensorboard.close()
            threading.excepthook = self._excepthook

    def step(self, scalars: dict[str, float]) -> None:
        """One more step, with its metrics, the means over all ranks whose loss is finite; nan if none has one."""
        if self._enabled:
            for name, value in scalars.items():
                values = self._scalars.setdefault(name, [])
                if np.isfinite(value):
                    values.append(value)
            shown = {name: f"{value:.4g}" for name, value in scalars.items()}
            if rate := self._bar.format_dict["rate"]:
                shown["mfu"] = f"{min(1, rate / self._peak):.0%}"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(self._batch_size)

    def log(self, step: int, epoch: float, lr: float, skipped_steps: int) -> None:
        """Write a line of figures: means and speed since the last one, and the learning rate of the last step."""
        if not self._enabled:
            return
        now = time.monotonic()
        since, started = self._last
        speed = (step - since) * self._batch_size / (now - started)
        if speed > self._peak:  # measured while the device was busy otherwise
            self._peak = max(self._peak, self._measure_peak())
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            **{name: float(np.mean(values)) if values else None for name, values in self._scalars.items()},
            "lr": lr,
            "samples_per_second": round(speed, 1),
            "mfu": round(min(1, speed / self._peak), 4),
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if torch.cuda.is_initialized() else None,
            "skipped_steps": skipped_steps,
        }
        self._scalars.clear()
        self._last = (step, now)
        self._write(line)

        def add(writer: SummaryWriter) -> None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, step)

        self._events(step, add)

    def figure(self, step: int, name: str, value: float) -> None:
        """Write a figure that is not taken at every step: a line of its own, and printed."""
        if self._enabled:
            self._write({"step": step, name: value if np.isfinite(value) else None})
            self._events(step, lambda writer: writer.add_scalar(name, value, step))
            self.say(f"step {step}: {name} {value:.4g}")

    def picture(self, step: int, images: Tensor) -> None:
        """Write a grid of images (B, 3, H, W) in [0, 1] as samples/STEP.png and to TensorBoard."""
        if self._enabled:
            grid, path = image_grid(images), self._folder / "samples" / f"{step:08d}.png"
            with self._tried("pictures"):
                save_picture(grid, path)
            self._events(step, lambda writer: writer.add_image("samples", grid, step))

    def say(self, message: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._enabled:
            self._bar.write(message, file=sys.stderr)

    def flush(self) -> None:
        """Write the lines of metrics.jsonl that a full disk did not take."""
        if self._enabled:
            with self._tried(METRICS):
                while self._unwritten:
                    self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]

    def _write(self, line: dict[str, Any]) -> None:
        self._unwritten += (json.dumps(line) + "\n").encode()
        self.flush()

    def _events(self, step: int, write: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard; some time after a failure, by another writer, which begins another file."""
        if time.monotonic() < self._retry_at:
            return
        writer, self._tensorboard, self._retry_at = self._tensorboard, None, time.monotonic() + RETRY_S
        with self._tried("TensorBoard's events"):
            writer = writer or SummaryWriter(str(self._folder / "tensorboard"), purge_step=step)
            write(writer)
            self._tensorboard, self._retry_at = writer, 0.0

    @contextmanager
    def _tried(self, what: str) -> Iterator[None]:
        """Tell of a disk that fails inside, once until it works again."""
        try:
            yield
        except (OSError, InputError) as error:
            if what not in self._failing:
                self.say(f"warning: {what} cannot be written: {error}; training goes on")
            self._failing.add(what)
        else:
            self._failing.discard(what)


def _leave_to_caller(failed: threading.ExceptHookArgs) -> None:
    """Say nothing of a disk that fails in TensorBoard's thread: its next call raises the error."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def kept_metrics(path: Path, step: int = 0) -> tuple[list[bytes], bool]:
    """The lines of metrics.jsonl that stay when a run continues at `step`, and whether these are all.

    Raises:
        InputError: it cannot be read, or a line other than one that a killed run left half-written is damaged.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                raise InputError(f"{path} is damaged at line {number}: repair it, or move it away") from None
    return kept, kept == lines


def _continue_metrics(path: Path, step: int) -> Any:
    """Open metrics.jsonl for appending, without the lines of steps that will be done again."""
    kept, unchanged = kept_metrics(path, step)
    with writing(path):
        if not unchanged:
            write_atomic(path, b"".join(kept))
        return path.open("ab", buffering=0)
