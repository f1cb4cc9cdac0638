"""The progress bar of commands that work through samples."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, title: str, enabled: bool) -> Any:
    """A progress bar over images, with their number per second."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=title,
        unit=" images",
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 20,
        disable=not enabled,
    )
