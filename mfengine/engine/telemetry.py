"""Reports of a run: progress, metrics.jsonl, pictures, and a tracker."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfengine.data.pictures import enlarged, image_grid, save_picture, strip_over_time
from mfengine.engine.trackers import TRACKERS, Tracker
from mfengine.errors import InputError
from mfengine.files import write_atomic, writing
from mfengine.progress import progress

METRICS, SAMPLES = "metrics.jsonl", "samples"
STRIP = 24  # most pictures in the strip
RETRY_S = 60.0  # before the tracker is tried again


class Telemetry:
    """Reports of one run; silent on every rank but the first.

    Args:
        folder: the run's folder.
        enabled: whether this rank reports.
        step, total_steps: where the run starts and ends.
        batch_size: samples per step.
        peak: measures the samples per second if all arithmetic of a step ran at the devices' `peak_rate`. Speed over
            this is the MFU. It is called again if a step was faster.
        shown: the metrics in the progress bar, and in the lines that replace it if stderr is not a terminal.
        tracker: one of `TRACKERS`, or none.
        facts: facts about the run, for the tracker.

    A disk that fails later does not end the run. The failure is reported once, and metrics are written when the disk
    works again.

    Raises:
        InputError: metrics.jsonl cannot be continued.
    """

    def __init__(
        self,
        folder: Path,
        enabled: bool,
        step: int,
        total_steps: int,
        batch_size: int,
        peak: Callable[[], float],
        *,
        shown: tuple[str, ...] = ("loss",),
        tracker: str = "tensorboard",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._enabled, self._batch_size, self._measure_peak = enabled, batch_size, peak
        self._total_steps, self._shown = total_steps, shown
        self._last = (step, time.monotonic())
        self._sums: dict[str, tuple[float, float]] = {}  # with their weights, over the steps since the last line
        self._figures: dict[str, str] = {}  # occasional metrics, formatted
        if not enabled:
            return
        self._peak = peak()
        self._folder = folder
        self._failing: set[str] = set()  # outputs whose last write failed
        self._unwritten = b""  # lines of metrics that could not be written
        self._metrics = _continue_metrics(folder / METRICS, step)
        self._make_tracker = None if tracker == "none" else TRACKERS[tracker]
        self._tracker: Tracker | None = None
        self._facts = facts or {}
        self._retry_at = 0.0
        self._excepthook, threading.excepthook = threading.excepthook, _leave_to_caller
        self._bar = progress(total_steps, "steps", initial=step, enabled=sys.stderr.isatty())

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._enabled:
            self.flush()
            self._bar.close()
            self._metrics.close()
            with suppress(OSError):
                if self._tracker is not None:
                    self._tracker.close()
            threading.excepthook = self._excepthook

    def step(self, figures: Mapping[str, tuple[float, float]]) -> None:
        """Count one step. Each value is a sum over all ranks with finite loss, and the divisor that makes it a mean."""
        if self._enabled:
            for name, (total, weight) in figures.items():
                before = self._sums.get(name, (0.0, 0.0))
                counts = np.isfinite(total)
                self._sums[name] = (before[0] + total, before[1] + weight) if counts else before
            if not self._bar.disable:
                means = {name: figures[name][0] / (figures[name][1] or np.nan) for name in self._shown}
                speed = self._batch_size * (self._bar.format_dict["rate"] or 0)
                self._bar.set_postfix_str(self._shown_line(means, speed), refresh=False)
                self._bar.update()

    def _shown_line(self, means: Mapping[str, float], speed: float) -> str:
        """The progress line: metrics, samples per second and MFU."""
        shown = {name: f"{means.get(name, np.nan):.4g}" for name in self._shown} | self._figures
        if speed:
            shown |= {"samples/s": f"{speed:.4g}", "mfu": f"{min(1, speed / self._peak):.0%}"}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def log(self, step: int, epoch: float, lr: float, skipped_steps: int, **more: float) -> None:
        """Write a line of metrics: means and speed since the last line, the last step's learning rate, and `more`."""
        if not self._enabled:
            return
        now = time.monotonic()
        since, started = self._last
        speed = (step - since) * self._batch_size / (now - started)
        if speed > self._peak:  # the peak was measured while other work kept the device busy
            self._peak = max(self._peak, self._measure_peak())
        cuda = torch.cuda.is_initialized()
        means = {name: total / weight if weight else np.nan for name, (total, weight) in self._sums.items()}
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            **means,
            "lr": lr,
            "samples_per_second": round(speed, 1),
            "mfu": round(min(1, speed / self._peak), 4),
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None,
            "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries") if cuda else None,
            "skipped_steps": skipped_steps,
            **more,
        }
        self._sums.clear()
        self._last = (step, now)
        self._write(line)
        if self._bar.disable:
            self.say(f"step {step}/{self._total_steps}: {self._shown_line(means, speed)}")

    def figure(self, step: int, name: str, value: float) -> None:
        """Write and print a metric that is not computed at every step, on a line of its own."""
        if self._enabled:
            self._write({"step": step, name: value})
            self._figures[name] = f"{value:.4g}"
            self.say(f"step {step}: {name} {value:.4g}")

    def picture(self, step: int, images: Tensor, caption: str) -> None:
        """Write a grid of images (B, 3, H, W) in [0, 1] as samples/STEP.png and to the tracker."""
        if self._enabled:
            grid, path = image_grid(images), self._folder / SAMPLES / f"{step:08d}.png"
            with self._tried("pictures"):
                save_picture(grid, path)
            self._track(step, lambda tracker: tracker.picture(step, enlarged(grid), caption))

    def strip(self, step: int) -> None:
        """Write strip.png, which shows how samples of the same noise changed over the run."""
        if not self._enabled:
            return
        with self._tried("pictures"):
            strip = strip_over_time(sample_pictures(self._folder, STRIP))
            if strip is not None:
                save_picture(strip, self._folder / "strip.png")
                self._track(step, lambda tracker: tracker.picture(step, strip, "the same noise over time"))

    def say(self, message: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._enabled:
            self._bar.write(message, file=sys.stderr)

    def flush(self) -> None:
        """Write the lines of metrics.jsonl that were held back while the disk failed."""
        if self._enabled:
            with self._tried(METRICS):
                while self._unwritten:
                    self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]

    def _write(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, with null for values that are not finite. The tracker gets the finite ones."""
        finite = {name: value for name, value in line.items() if value is not None and np.isfinite(value)}
        self._unwritten += (json.dumps({name: finite.get(name) for name in line}) + "\n").encode()
        self.flush()
        step = finite.pop("step")
        self._track(step, lambda tracker: tracker.scalars(step, finite))

    def _track(self, step: int, show: Callable[[Tracker], object]) -> None:
        """Show something in the tracker. Some time after a failure, open another one."""
        if self._make_tracker is None or time.monotonic() < self._retry_at:
            return
        tracker, self._tracker, self._retry_at = self._tracker, None, time.monotonic() + RETRY_S
        with self._tried("the tracker"):
            tracker = tracker or self._make_tracker(self._folder, step, self._facts)
            show(tracker)
            self._tracker, self._retry_at = tracker, 0.0

    @contextmanager
    def _tried(self, what: str) -> Iterator[None]:
        """Report a disk failure inside the context, once until the disk works again."""
        try:
            yield
        except (OSError, InputError) as error:
            if what not in self._failing:
                self.say(f"warning: {what} cannot be written: {error}; training goes on")
            self._failing.add(what)
        else:
            self._failing.discard(what)


def _leave_to_caller(failed: threading.ExceptHookArgs) -> None:
    """Ignore a disk failure in TensorBoard's thread: its next call raises the error."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def sample_pictures(folder: Path, most: int) -> list[Path]:
    """At most `most` of a run's pictures, named by their steps, evenly spaced and in order, with the newest."""
    pictures = sorted(path for path in (folder / SAMPLES).glob("*.png") if path.stem.isdigit())
    every = -(-len(pictures) // most) or 1
    return pictures[::-1][::every][::-1]


def kept_metrics(path: Path, step: int = 0) -> tuple[list[bytes], bool]:
    """The lines of metrics.jsonl to keep when a run continues at `step`, and whether these are all lines.

    Raises:
        InputError: the file cannot be read, or a line is damaged. A last line that a killed run left incomplete is
            ignored.
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


def best_step(path: Path, metric: str, steps: Collection[int]) -> int | None:
    """The step, among `steps`, with the least value of a metric in metrics.jsonl; None if there is no value."""
    lines = map(json.loads, kept_metrics(path, max(steps))[0])
    found = {line["step"]: line[metric] for line in lines if line["step"] in steps and line.get(metric) is not None}
    return min(found, key=lambda step: found[step], default=None)


def _continue_metrics(path: Path, step: int) -> Any:
    """Open metrics.jsonl for appending, without the lines of steps that will be repeated."""
    kept, unchanged = kept_metrics(path, step)
    with writing(path):
        if not unchanged:
            write_atomic(path, b"".join(kept))
        return path.open("ab", buffering=0)
