"""Tasks of benchmarks.gpu that go wrong in every way, for workers that import no more than this."""

import os
import time

import torch

from benchmarks.gpu import Task


def raises(error):
    raise error


def fine():
    return {"splits": {"fine": {"step": 1.0}}}


GOES_WRONG = {
    "has no message": lambda: raises(ValueError()),
    "has two lines": lambda: raises(RuntimeError("first\nsecond")),
    "runs out of memory": lambda: raises(torch.OutOfMemoryError("CUDA out of memory. Tried")),
    "ends its process": lambda: os._exit(3),
    "hangs": lambda: time.sleep(1000),
}


def broken_plan(machine, many):
    """Each of them in a parallel stage, then alone; each followed by one that is fine."""
    tasks = {}
    for stage in ("parallel", "alone"):
        for name, run in GOES_WRONG.items():
            for label, act in (
                (name, run),
                (f"after {name}", lambda: {"checks": [{"check": "x", "error": 0, "bound": 0}]}),
            ):
                tasks[f"{stage}: {label}"] = Task(stage, f"{stage}: {label}", 0.0, stage == "alone", act)
    return tasks


def endless_plan(machine, many):
    """One that never ends, and one for which there is no time."""
    tasks = [Task("stage", "endless", 1.0, True, lambda: time.sleep(1000)), Task("stage", "late", 1.0, True, fine)]
    return {task.name: task for task in tasks}
