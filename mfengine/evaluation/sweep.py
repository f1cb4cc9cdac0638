"""Sweeps: metrics under every combination of settings, as a file of rows, a table and a heat map."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mfengine.errors import InputError
from mfengine.evaluation.metrics import SAMPLES
from mfengine.files import write_atomic, writing

Axes = dict[str, tuple[float, ...]]
"""The values that each setting takes: `steps`, `ema_decay`, or a condition of the objective."""

Row = dict[str, Any]
"""One combination of settings, under `KEYS`, and metrics by name. JSON."""

KEYS = (*SAMPLES, "steps", "data", "reference", "vae")
"""What determines the samples, and what they are compared with. It tells whether a row already exists."""


def parse_axes(texts: Sequence[str]) -> Axes:
    """Axes from texts such as "omega=1,2,4"; InputError if a text has another form."""
    axes: Axes = {}
    for text in texts:
        name, _, listed = text.partition("=")
        try:
            values = tuple(int(value) if name == "steps" else float(value) for value in listed.split(","))
        except ValueError:
            kind = "whole numbers" if name == "steps" else "numbers"
            raise InputError(f"--sweep {text}: values must be {kind}, as in omega=1,2.5,4 or steps=1,2") from None
        if len(set(values)) < len(values) or not all(map(math.isfinite, values)):
            raise InputError(f"--sweep {text}: values must be finite and different")
        if name == "steps" and min(values) < 1:
            raise InputError(f"--sweep {text}: steps must be at least 1")
        if name in axes:
            raise InputError(f"--sweep {text}: {name} is given twice")
        axes[name] = values
    return axes


def check_matplotlib() -> None:
    """InputError unless a heat map can be drawn."""
    if find_spec("matplotlib") is None:
        raise InputError("--sweep needs matplotlib: pip install 'mfengine[bench]'")


# ----------------------------------------------------------------------------
# Rows.


def key(row: Row) -> Row:
    """A row without its metrics."""
    return {name: row.get(name) for name in KEYS}


def setting(row: Row, name: str) -> float:
    """A row's value on an axis."""
    return row["conditions"][name] if name in row["conditions"] else row[name]


def best_first(rows: Collection[Row], metric: str) -> list[Row]:
    """Rows sorted by a metric, the least first; rows where it is nan come last."""
    return sorted(rows, key=lambda row: row[metric] if math.isfinite(row[metric]) else math.inf)


def read_rows(path: Path) -> list[Row]:
    """The rows in a file from `write_rows`; none if it does not exist; InputError if it holds something else."""
    try:
        rows = json.loads(path.read_bytes()) if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is not a list of rows written by a sweep: choose another --out")
    return rows


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON, atomically, one per line; InputError if that fails."""
    with writing(path):
        write_atomic(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


# ----------------------------------------------------------------------------
# Output for people.


def table(rows: Sequence[Row], axes: Axes) -> str:
    """A table of settings and metrics, in the order of the rows."""
    common = set.intersection(*map(set, rows)) - {*KEYS, "frechet_floor"}
    metrics = [name for name in rows[0] if name in common]
    cells = [[*axes, *metrics]]
    cells += [[f"{setting(row, name):g}" for name in axes] + [f"{row[name]:.4g}" for name in metrics] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def best_cells(rows: Sequence[Row], axes: Axes, metric: str) -> tuple[list[str], np.ma.MaskedArray]:
    """The two axes with the most values, and the least value of a metric over them, (height, width).

    It is the least over all other axes, and masked where there is no row. The first axis is horizontal. The second, if
    there is one, is vertical.
    """
    shown = sorted(axes, key=lambda name: -len(axes[name]))[:2]
    best = np.full([len(axes[name]) for name in shown], np.inf)
    for row in rows:
        place = tuple(axes[name].index(setting(row, name)) for name in shown)
        best[place] = np.fmin(best[place], row[metric])
    return shown, np.ma.masked_invalid(best.reshape(len(best), -1).T)


def heat_map(rows: Sequence[Row], axes: Axes, metric: str, path: Path) -> None:
    """Draw `best_cells` as a PNG with a frame around the best cell; InputError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    shown, best = best_cells(rows, axes, metric)
    height, width = best.shape
    figure = Figure(figsize=(2 + 0.7 * width, 1.6 + 0.5 * height), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    image = plot.imshow(best, origin="lower", cmap="viridis_r", norm="log" if float(best.min()) > 0 else "linear")
    for (i, j), value in np.ma.ndenumerate(best):
        colour = "white" if np.asarray(image.norm(value)) > 0.5 else "black"
        plot.text(j, i, f"{value:.4g}", ha="center", va="center", fontsize=8, color=colour)
    i, j = np.unravel_index(best.argmin(), best.shape)
    plot.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    plot.set_xticks(range(width), [f"{value:g}" for value in axes[shown[0]]])
    plot.set_xlabel(shown[0])
    plot.set_yticks([])
    for name in shown[1:]:
        plot.set_yticks(range(height), [f"{value:g}" for value in axes[name]])
        plot.set_ylabel(name)
    others = [name for name in axes if name not in shown and len(axes[name]) > 1]
    plot.set_title(metric + (f", best over {', '.join(others)}" if others else ""), fontsize=10)
    with writing(path):
        write_atomic(path, lambda partial: figure.savefig(partial, format="png", dpi=150))
