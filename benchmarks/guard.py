"""Detects regressions of throughput: compares this run with the accepted figures of the same machine.

It compares ratios measured within one run: ours over each baseline, and the share of the machine's ceiling. Absolute
times are compared only on GPUs, whose model says what to expect. Counts must be equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS, Case, Machine
from benchmarks.measure import Row, make_clock, measure

VERSIONED = ("operators", "launches", "moved_bytes", "least_ms")
"""Counts that depend on how a version of PyTorch decomposes its operators."""

TOLERANCE = {"cpu": 0.35, "gpu": 0.1}  # of a ratio; larger on a CPU, which other work disturbs more

Figures = dict[str, float]  # higher is better


def figures(rows: list[Row], ceilings: dict[str, float], gpu: bool) -> Figures:
    """The guarded figures, from the fastest rounds, which nothing disturbed."""
    found: Figures = {}
    baselines = [row for row in rows if row.implementation != OURS]
    for ours in (row for row in rows if row.implementation == OURS):
        if floor := ours.floor(ceilings):
            found[f"{ours.label}: share of the ceiling"] = floor / ours.fastest
        for row in baselines:
            if row.label == ours.label and row.implementation != "peer":
                found[f"{ours.label}: speed over {row.implementation}"] = row.fastest / ours.fastest
        if gpu:
            found[f"{ours.label}: calls per second"] = 1 / ours.seconds
    return found


def regressions(now: Figures, accepted: Figures, tolerance: float) -> list[str]:
    """A line for each figure below tolerance. A figure missing on either side is not compared."""
    return [
        f"{name}: {now[name]:.3g}, accepted {accepted[name]:.3g}, tolerance {tolerance:.0%}"
        for name in now
        if name in accepted and now[name] < accepted[name] * (1 - tolerance)
    ]


def changed_counts(now: dict[str, Any], accepted: dict[str, Any]) -> list[str]:
    """A line for each count that differs from the accepted one.

    Those in `VERSIONED` are compared only for the accepted version of PyTorch.
    """
    lines = []
    same_torch = now["torch"] == accepted["torch"]
    for name, counts in now["counts"].items():
        for kind, value in counts.items():
            before = accepted["counts"].get(name, {}).get(kind)
            if value != before and (same_torch or kind not in VERSIONED):
                lines.append(f"{name}: {kind} {value:,}, accepted {before if before is None else f'{before:,}'}")
    return lines


def in_turns(case: Case, machine: Machine, rounds: int = 12) -> list[Row]:
    """Time the implementations of a case in turns, so that disturbances affect all of them alike."""
    clock = make_clock(machine.device, case.hide_host)
    calls = {name: make() for name, make in case.implementations.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name] += measure(call, clock, 0.05, warmup=1)
    return [case.row(name, rounds) for name, rounds in seconds.items()]


def read(path: Path) -> dict[str, Any] | None:
    """The accepted figures; None if there are none."""
    return json.loads(path.read_text()) if path.exists() else None


def write(path: Path, values: dict[str, Any]) -> None:
    """Accept figures. Earlier figures of cases missing in this run are kept."""
    before = read(path) or {}
    kept = {name: {**before.get(name, {}), **value} for name, value in values.items() if isinstance(value, dict)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**values, **kept}, indent=1) + "\n")
