"""Profiles steps: a trace for chrome://tracing or Perfetto, and a table of time by pass and operator."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mfengine.files import write_atomic, writing

PASSES = ("data", "guidance", "forward", "backward", "optimizer")  # and tangent, inside the forward
# An operator or kernel belongs to the first kind with one of these words in its name.
KINDS = {
    "communication": ("nccl", "gloo", "all_gather", "reduce_scatter", "all_reduce"),
    "attention": ("attention", "flash", "softmax", "bmm"),
    "matrix product": ("mm", "linear", "gemm", "nvjet", "cutlass"),
    "norm": ("adaln", "norm"),
    "activation": ("gelu", "swiglu", "silu", "rope", "rotary"),
    "optimizer": ("adam", "multi_tensor", "lerp", "foreach"),
    "copy": ("copy", "memcpy", "memset", "_to", "cat", "clone", "fill", "zero"),
}
OPERATORS, KERNELS = ("cpu_op",), ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")  # PyTorch launches through the runtime, Triton through the driver

Spent = dict[tuple[str, str], float]
"""Seconds by pass and kind of operator."""


class Profile:
    """Profiles the steps from `start` to `stop`, counted from 1, both included.

    Args:
        span: `start` and `stop`, or None for no step.
        folder: where trace.json and table.txt are written.
        model: the network; a call without a graph counts as guidance, any other as forward.
    """

    def __init__(self, span: tuple[int, int] | None, folder: Path, model: nn.Module) -> None:
        self._span, self._folder, self._model = span, folder, model
        self._profiler: profile | None = None

    def label(self, name: str) -> AbstractContextManager[Any]:
        """Label the work inside the context as one of `PASSES`, while steps are profiled."""
        return nullcontext() if self._profiler is None else record_function(name)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps each step. After the last step of the span, it writes trace and table.

        Raises:
            InputError: they cannot be written.
        """
        if self._span is not None and number == self._span[0]:
            self._start()
        yield
        if self._profiler is not None and self._span is not None and number == self._span[1]:
            self._stop(self._profiler)

    def _start(self) -> None:
        calls: list[record_function] = []

        def begin(*_: Any) -> None:
            calls.append(record_function("forward" if torch.is_grad_enabled() else "guidance"))
            calls[-1].__enter__()

        def end(*_: Any) -> None:
            calls.pop().__exit__(None, None, None)

        self._hooks = [self._model.register_forward_pre_hook(begin), self._model.register_forward_hook(end)]
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profiler.start()

    def _stop(self, profiler: profile) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.stop()
        self._profiler = None
        for hook in self._hooks:
            hook.remove()
        trace = self._folder / "trace.json"
        with writing(trace):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(trace, lambda partial: profiler.export_chrome_trace(str(partial)))
            events = json.loads(trace.read_bytes())["traceEvents"]
            write_atomic(self._folder / "table.txt", table(spent(events)) + "\n")


def spent(events: list[dict[str, Any]]) -> Spent:
    """Seconds of a Chrome trace by pass and kind: those of kernels if there are any, else those of operators.

    Passes are labelled ranges on the training thread. A kernel belongs to the pass that launched it. A kernel or
    operator named `dual` computes output and tangent together and counts as tangent. So do operators without a graph
    inside the forward, on plain PyTorch. On fused ops, matrix products of tangents count as forward.
    """
    ranges = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"] in PASSES
    )

    def pass_at(time: float) -> str:
        return next((name for begin, end, name in ranges if begin <= time < end), "other")

    found: Spent = defaultdict(float)
    kernels = [e for e in events if e.get("cat") in KERNELS]
    if kernels:
        launches = [e for e in events if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})]
        launched = {e["args"]["correlation"]: e["ts"] for e in launches}
        for e in kernels:
            name = pass_at(launched.get(e["args"].get("correlation"), -1.0))
            name = "tangent" if name == "forward" and "dual" in e["name"] else name
            found[name, kind_of(e["name"])] += e["dur"] / 1e6
        return found
    for outer, e, seconds in own_time([e for e in events if e.get("cat") in OPERATORS]):
        name = pass_at(e["ts"])
        without_graph = "Sequence number" not in outer.get("args", {})
        name = "tangent" if name == "forward" and ("dual" in e["name"] or without_graph) else name
        found[name, kind_of(e["name"])] += seconds
    return found


def own_time(operators: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any], float]]:
    """For each operator: the outermost one around it, itself, and its seconds without those of operators inside it."""
    inside: defaultdict[int, float] = defaultdict(float)  # keyed by the identity of the outer operator
    stacks: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)  # keyed by thread
    outermost = []
    for e in sorted(operators, key=lambda e: (e["ts"], -e["dur"])):
        stack = stacks[e["pid"], e["tid"]]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= e["ts"]:
            stack.pop()
        if stack:
            inside[id(stack[-1])] += e["dur"]
        stack.append(e)
        outermost.append((stack[0], e))
    for outer, e in outermost:
        yield outer, e, max(0.0, e["dur"] - inside[id(e)]) / 1e6


def kind_of(name: str) -> str:
    """The kind of an operator or kernel, from its name."""
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def table(found: Spent) -> str:
    """A table of pass, kind, milliseconds and share, largest first, after the sums of the passes."""
    total = sum(found.values()) or 1.0
    passes: defaultdict[str, float] = defaultdict(float)
    for (name, _), seconds in found.items():
        passes[name] += seconds
    rows = [(name, "all", seconds) for name, seconds in passes.items()]
    rows = sorted(rows, key=lambda row: -row[2])
    rows += sorted(((name, kind, seconds) for (name, kind), seconds in found.items()), key=lambda row: -row[2])
    lines = [f"{name:10}  {kind:15} {1e3 * seconds:10.2f} {seconds / total:7.1%}" for name, kind, seconds in rows]
    return "\n".join([f"{'pass':10}  {'operators':15} {'ms':>10} {'share':>7}", *lines])
