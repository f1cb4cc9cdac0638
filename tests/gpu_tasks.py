"""Tasks of benchmarks.gpu that fail in every way, for workers that import nothing else."""

import os
import time

import torch

from benchmarks.gpu import Task


def raises(error):
    raise error


def fine():
    return {"checks": [{"check": "fine", "error": 0.0, "bound": 0.0}]}


GOES_WRONG = {
    "has no message": lambda: raises(ValueError()),
    "has two lines": lambda: raises(RuntimeError("first\nsecond")),
    "runs out of memory": lambda: raises(torch.OutOfMemoryError("CUDA out of memory. Tried")),
    "ends its process": lambda: os._exit(3),
    "hangs": lambda: time.sleep(1000),
}


def broken_plan(machine, many):
    """Each failing task alone, followed by one that succeeds; the worst also beside one that succeeds."""
    runs = {}
    for name, run in GOES_WRONG.items():
        runs |= {name: (run, True), f"after {name}": (fine, True)}
    runs |= {"ends its process, beside": (GOES_WRONG["ends its process"], False), "beside": (fine, False)}
    return {name: Task(name.partition(",")[0], name, 0.0, alone, run) for name, (run, alone) in runs.items()}


def endless_plan(machine, many):
    """A task that never ends, and one that has no time left."""
    tasks = [Task("stage", "endless", 1.0, True, lambda: time.sleep(1000)), Task("stage", "late", 1.0, True, fine)]
    return {task.name: task for task in tasks}


def hopeless_plan(machine, many):
    """Only a check that raises."""
    return {"check": Task("stage", "check", 0.0, False, lambda: raises(ValueError()))}


def planless(machine, many):
    """A worker that never gets to its tasks."""
    time.sleep(1000)
