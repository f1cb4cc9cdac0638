"""The progress bar of everything that takes long."""

from __future__ import annotations

import sys
from typing import Any


def progress(
    total: int, unit: str, title: str | None = None, *, initial: int = 0, enabled: bool = True, scale: bool = False
) -> Any:
    """A progress bar (tqdm) on stderr.

    Args:
        total, initial: where it ends and starts.
        unit: what is counted, in the plural; the bar shows how many a second.
        title: what is done.
        enabled: False shows nothing, as on every rank but the first.
        scale: write 1.2M for 1,200,000.
    """
    from tqdm import tqdm  # benchmarks run where only torch is installed

    terminal = sys.stderr.isatty()
    return tqdm(
        desc=title,
        total=total,
        initial=initial,
        unit=f" {unit}",
        unit_scale=scale,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 20,
        disable=not enabled,
    )
