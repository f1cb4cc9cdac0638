"""`python -m benchmarks.gpu`: is everything correct on this GPU, and how fast is it?

One command for ten minutes of GPU time, in order of value: checks of what XL/2 uses, its step at 32 rows, the kernels
beside their peers, its step at as many rows as fit, improved MeanFlow, B/2, the remaining checks, compiled peers. Every
line of the report is a separate task in another process, so a task that raises, runs out of memory, hangs or crashes
affects no other. Checks run in parallel on all cores, because compiling kernels takes most of their time, and the
timings reuse what they compiled. If OUT is set, $OUT/gpu.json is rewritten after each task; `python -m
benchmarks.report` makes full tables from it. `--resume gpu.json` does what an earlier run had no time for.

Needs only torch, triton and numpy. `--rehearse` runs everything in miniature on a CPU, so that no GPU time is spent on
debugging this script.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, checks
from benchmarks.cases import Case, Machine, fitting_batch, fused_ops, op_shape
from benchmarks.measure import ceilings, environment, make_clock, measure
from benchmarks.one_rank import check_one_rank
from benchmarks.report import compact
from benchmarks.split import guided_split, synchronise
from benchmarks.workload import IMPROVED, OBJECTIVES, of_blocks
from mfengine.device import expandable_segments
from mfengine.errors import InputError
from mfengine.files import write_atomic
from mfengine.ops.table import Shape
from mfengine.ranks import World

START_S = 20  # estimated time for a worker to import PyTorch and find its device
IMPROVED_STEPS = (("imf-xl2", 32), ("imf-xl2", 64), ("imf-b2", 256))  # 38, 61 and 52 GB by `mfengine.train --dry-run`
TIMEOUT_FACTOR, TIMEOUT_S = 8, 60.0  # a task's timeout: this factor times its estimate, plus these seconds

Part = dict[str, Any]  # of the report: lists are appended to those of the same name, dictionaries are merged

# ----------------------------------------------------------------------------
# Tasks.


@dataclass(frozen=True)
class Task:
    """One line of the report, and how to produce it."""

    stage: str
    name: str
    seconds: float  # estimate
    alone: bool  # nothing else runs meanwhile, because it is timed
    run: Callable[[], Part] | None = None  # set in a worker


def plan(machine: Machine, many: int) -> dict[str, Task]:
    """All tasks by name, most valuable first. `many` is the batch of XL/2 that fills the device."""
    tasks: dict[str, Task] = {}
    for task in _tasks(machine, many):
        tasks.setdefault(task.name, task)
    return tasks


def _tasks(machine: Machine, many: int) -> Iterator[Task]:
    gpu, device, dtype = machine.gpu, machine.device, machine.dtype
    few = 32 if gpu else 4

    yield from _checks_of_a_preset(machine, "xl2", "guided")
    for backend in ("cuda", "torch") if gpu else ("torch",):
        steps = 200 if gpu else 10
        yield _check("xl2", f"AdamWEMA {backend}", 10, partial(checks.check_optimizer, backend, device, steps))
    yield _check_of_waits("xl2", machine, "b2", "guided")
    yield Task("xl2", "FSDP2 on one rank", 20, False, lambda: {"checks": check_one_rank(device)})

    stage = f"xl2 of {few}"
    yield Task(stage, "ceilings", 5, True, lambda: {"ceilings": ceilings(device, dtype, 0.5 if gpu else 0.0)})
    yield from _timed(stage, machine, cases.step(machine, "xl2", few, "guided"))
    yield _split(stage, machine, "xl2", few)
    for objective in ("unguided", "flow matching"):
        yield from _timed(stage, machine, cases.step(machine, "xl2", few, objective))

    for batch in (few, 256) if gpu else (2,):
        for case in cases.kernels(machine, "xl2", batch):
            yield from _timed("kernels of xl2", machine, case)
    for case in cases.attention(machine, "xl2", few):
        yield from _timed("attention of xl2", machine, case)

    stage = f"xl2 of {many}"
    yield from _timed(stage, machine, cases.step(machine, "xl2", many, "guided"))
    yield _split(stage, machine, "xl2", many)
    for case in (*cases.optimizer(machine), *cases.sampler(machine)):
        yield from _timed(stage, machine, case)

    yield from _checks_of_a_preset(machine, "imf-xl2", "improved")
    yield _check_of_waits("imf-xl2", machine, "imf-b2", "improved")
    for preset, batch in IMPROVED_STEPS if gpu else (("imf-xl2", few),):
        yield from _timed("imf-xl2", machine, cases.step(machine, preset, batch, "improved"))

    if gpu:
        yield from _checks_of_a_preset(machine, "b2", "guided")
        for batch in (few, 256):
            yield from _timed("b2", machine, cases.step(machine, "b2", batch, "guided"))
        yield _split("b2", machine, "b2", few)
        for case in cases.kernels(machine, "b2", few):
            yield from _timed("b2", machine, case)

    yield from _remaining_checks(machine)
    yield from _timed("compiled peers", machine, cases.step(machine, "xl2", few, "guided"), compiled=True)


def _checks_of_a_preset(machine: Machine, preset: str, objective: str) -> Iterator[Task]:
    """Checks of its step at two blocks, and of each op at its shapes. They compile all kernels of its timings."""
    config, method = of_blocks(machine.model(preset), 2), (OBJECTIVES | IMPROVED)[objective]
    shape, dtype = op_shape(config, 4), machine.dtype
    name = f"{objective} step, {machine.name(preset)} of {config.depth} blocks"
    run = partial(checks.check_step, config, method, 8, dtype, name, machine.device, machine.backend)
    yield _check(preset, name, 60, run)
    yield from _op_checks(preset, machine, shape, dtype)


def _check_of_waits(stage: str, machine: Machine, preset: str, objective: str) -> Task:
    config, method = of_blocks(machine.model(preset), 2), (OBJECTIVES | IMPROVED)[objective]
    name = f"the host does not wait in a step, {objective}"
    return _check(stage, name, 20, partial(checks.check_waits, config, method, machine.dtype, name, machine.device))


def _remaining_checks(machine: Machine) -> Iterator[Task]:
    """Golden cases; ops over dtypes, head dims and odd lengths; every implementation of attention."""
    gpu, device = machine.gpu, machine.device
    for name in ("guided_kappa", "guided_omega_train", "unguided", "imf_train", "imf_beta"):
        yield _check("remaining", f"golden {name}", 60, partial(checks.check_golden, name, device))
    examples = [(Shape(2, 7, 1, 24), torch.float16)]
    if gpu:
        heads = ((16, 64), (16, 72), (8, 80), (8, 96), (4, 128))
        # At least two tokens: with one, the softmax is constant, plain PyTorch is exact, and twice its error is no
        # bound.
        examples = [(Shape(3, tokens, *head), torch.bfloat16) for head in heads for tokens in (2, 257)]
        examples += [(Shape(3, 257, 16, 72), torch.float32), (Shape(3, 257, 16, 72), torch.float16)]
        examples += [(Shape(3, 100, 4, 128), torch.float16)]
    for shape, dtype in examples:
        yield from _op_checks("remaining", machine, shape, dtype)
        for by in checks.attentions(shape, dtype, device):
            name = f"attention by {by}, {_describe(shape, dtype)}"
            yield _check("remaining", name, 10, partial(checks.check_attention, by, shape, dtype, name, device))


def _op_checks(stage: str, machine: Machine, shape: Shape, dtype: torch.dtype) -> Iterator[Task]:
    for op in fused_ops():
        name = f"{op}, {_describe(shape, dtype)}"
        run = partial(checks.check_op, op, shape, dtype, name, machine.device, machine.backend)
        yield _check(stage, name, 20, run)


def _describe(shape: Shape, dtype: torch.dtype) -> str:
    return f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


def _check(stage: str, name: str, seconds: float, check: Callable[[], checks.Check]) -> Task:
    return Task(stage, name, seconds, False, lambda: {"checks": [check()]})


def _timed(stage: str, machine: Machine, case: Case, compiled: bool = False) -> Iterator[Task]:
    """One row per implementation of a case: those that PyTorch compiles, which takes minutes, or else the others."""
    for name, make in case.implementations.items():
        if ("compiled" in name) == compiled:
            budget = (0.3 if case.hide_host else 2.0) if machine.gpu else 0.0
            expected = budget + (90 if compiled else {"kernels": 1, "step": 6}.get(case.suite, 2))
            run = partial(_time, machine, case, name, make, budget)
            yield Task(stage, f"{case.suite}: {case.name}: {name}", expected, True, run)


def _time(machine: Machine, case: Case, name: str, make: Callable[[], cases.Call], seconds: float) -> Part:
    call, clock = make(), make_clock(machine.device, case.hide_host)
    return {"rows": [asdict(case.row(name, measure(call, clock, seconds, warmup=2 if machine.gpu else 0)))]}


def _split(stage: str, machine: Machine, preset: str, batch: int) -> Task:
    name = f"{machine.name(preset)} of {batch}"
    ranks = World(0, 1, machine.device)
    return Task(
        stage, f"split: {name}", 20, True, lambda: {"splits": {name: guided_split(machine.model(preset), batch, ranks)}}
    )


# ----------------------------------------------------------------------------
# Workers.


Plan = Callable[[Machine, int], dict[str, Task]]


def work(connection: Connection, make_plan: Plan, rehearse: bool, folder: str, many: int | None) -> None:
    """A worker: sends its device and its tasks, then runs tasks on request, one at a time.

    Args:
        connection: to the parent.
        make_plan: `plan`.
        rehearse: on a CPU.
        folder: for data.
        many: the batch of XL/2 that fills the device; None determines it here.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = torch.device("cpu" if rehearse else "cuda:0")
    machine = Machine(device, Path(folder), rehearse)
    if rehearse:
        torch.set_num_threads(1)
    else:
        expandable_segments()
        torch.cuda.set_device(device)
    many = many or (4 if rehearse else fitting_batch(machine, "xl2"))
    tasks = make_plan(machine, many)
    connection.send((environment(device), many, [(t.stage, t.name, t.seconds, t.alone) for t in tasks.values()]))
    well = True
    while well:
        try:
            task = tasks[connection.recv()]
        except EOFError:
            return
        part, well = attempt(task, device)
        connection.send((part, well))


def attempt(task: Task, device: torch.device) -> tuple[Part, bool]:
    """The result of a task, or the reason for its failure; and whether this process can run another task."""
    assert task.run is not None
    try:
        part = task.run()
        synchronise(device)
    except torch.OutOfMemoryError as error:
        part = {"missing": {task.name: describe(error)}}
    except Exception as error:
        part = {"errors": {task.name: describe(error)}}
    gc.collect()
    try:
        synchronise(device)
        torch.cuda.empty_cache()  # no effect without a GPU
    except RuntimeError:  # CUDA does not recover from some errors, such as an invalid address
        return part, False
    return part, True


def describe(error: Exception) -> str:
    """An error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Worker:
    """A process that runs tasks."""

    def __init__(self, timeout: float, *args: Any) -> None:
        """Takes the arguments of `work` after the connection; RuntimeError if the process does not start in time."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()
        self.environment, self.many, tasks = self._answer(timeout)
        self.tasks = [Task(*values) for values in tasks]

    def run(self, name: str, timeout: float) -> tuple[Part, bool]:
        """The result of a task, or the reason for its failure; and whether the worker can run another task."""
        self._connection.send(name)
        try:
            return self._answer(timeout)
        except RuntimeError as error:
            return {"errors": {name: str(error)}}, False

    def stop(self, timeout: float = 5.0) -> int | None:
        """End the process, which exits by itself when its connection closes; returns its exit code."""
        self._connection.close()
        self._process.join(timeout)
        self._process.kill()
        self._process.join()
        return self._process.exitcode

    def _answer(self, timeout: float) -> Any:
        if not self._connection.poll(timeout):
            self.stop(0.0)
            raise RuntimeError(f"stopped after {timeout:.0f} s")
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process ended with exit code {self.stop()}") from None


class Run:
    """The report, and the workers that fill it.

    Args:
        rehearse: on a CPU.
        minutes: the time limit.
        folder: for data.
        make_plan: `plan`.
        report: of an earlier run, to complete.
    """

    def __init__(
        self, rehearse: bool, minutes: float, folder: str, make_plan: Plan = plan, report: Part | None = None
    ) -> None:
        self.report: Part = dict(report or {})
        self._rehearse, self._folder, self._plan = rehearse, folder, make_plan
        self._begin = time.monotonic()
        self._deadline = self._begin + 60 * minutes
        self._lock = threading.Lock()
        self._out = None
        if out := os.environ.get("OUT"):
            Path(out).mkdir(parents=True, exist_ok=True)
            self._out = Path(out, "gpu.json")
        self._workers: list[Worker | None] = []
        self._many: int | None = None
        self._cores = min(2 if rehearse else 16, os.cpu_count() or 1)

    def run(self) -> None:
        """Run all tasks that the report does not answer.

        Raises:
            RuntimeError: no worker starts.
            InputError: the earlier report is of another device, version or commit.
        """
        first = self._start()
        self._many, self._workers = first.many, [first] + [None] * (self._cores - 1)
        for key, value in self.report.get("environment", {}).items():
            if value != (here := first.environment.get(key)):
                self._stop(0)
                raise InputError(f"it has {key} {value}, and this is {here}")
        finished = set(self.report.get("finished", ()))
        unanswered = [task for task in first.tasks if task.name not in finished]
        for kind, task in product(("missing", "errors"), unanswered):
            self.report.get(kind, {}).pop(task.name, None)
        self._keep({"environment": first.environment})
        print(self._estimate(unanswered), flush=True)
        for stage in dict.fromkeys(task.stage for task in unanswered):
            tasks = [task for task in unanswered if task.stage == stage]
            self._serve([task for task in tasks if not task.alone], self._cores)
            self._stop(1)  # idle workers would hold memory
            self._serve([task for task in tasks if task.alone], 1)
            print(f"\n--- after {stage}\n{compact(self.report)}\n", flush=True)
        self._stop(0)

    def _stop(self, first: int) -> None:
        """Stop the workers from `first` on, all at once."""
        ending = [worker for worker in self._workers[first:] if worker]
        self._workers[first:] = [None] * (self._cores - first)
        with ThreadPoolExecutor(self._cores) as pool:
            list(pool.map(Worker.stop, ending))

    def _estimate(self, tasks: list[Task]) -> str:
        lines, total = [], float(START_S)
        for stage in dict.fromkeys(task.stage for task in tasks):
            found = [task for task in tasks if task.stage == stage]
            seconds = sum(t.seconds / (1 if t.alone else self._cores) for t in found)
            total += seconds
            lines.append(f"{stage}: {len(found)} tasks, {seconds / 60:.1f} min")
        left = (self._deadline - time.monotonic()) / 60
        return f"estimated {total / 60:.1f} min, of which {left:.1f} are left: {'; '.join(lines)}"

    def _serve(self, tasks: list[Task], workers: int) -> None:
        """Run tasks in order on this many workers; each has its own thread."""
        queue, lock = iter(tasks), threading.Lock()

        def following() -> Task | None:
            with lock:
                return next(queue, None)

        def serve(i: int) -> None:
            while task := following():
                self._keep(self._result(i, task))

        workers = min(workers, len(tasks))
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(serve, range(workers)))

    def _result(self, i: int, task: Task) -> Part:
        """The result of a task from worker i, which is started if needed."""
        left = self._deadline - time.monotonic()
        if left < task.seconds:
            return {"missing": {task.name: "no time left"}}
        try:
            worker = self._workers[i] or self._start()
        except RuntimeError as error:
            return {"errors": {task.name: f"no worker: {error}"}}
        timeout = TIMEOUT_FACTOR * task.seconds + TIMEOUT_S
        part, well = worker.run(task.name, min(left, timeout))
        if not well:
            worker.stop()
        self._workers[i] = worker if well else None
        return part if not well and left < timeout else {**part, "finished": [task.name]}

    def _start(self) -> Worker:
        left = max(1.0, self._deadline - time.monotonic())
        return Worker(
            min(left, TIMEOUT_FACTOR * START_S + TIMEOUT_S), self._plan, self._rehearse, self._folder, self._many
        )

    def _keep(self, part: Part) -> None:
        """Add a result to the report, write the report, and print the result."""
        with self._lock:
            for key, value in part.items():
                if isinstance(value, list):
                    self.report.setdefault(key, []).extend(value)
                else:
                    self.report.setdefault(key, {}).update(value)
            if self._out:
                write_atomic(self._out, json.dumps(self.report, indent=1) + "\n")
            for line in _lines(part):
                print(f"{time.monotonic() - self._begin:4.0f} s {line}", flush=True)


def _lines(part: Part) -> Iterator[str]:
    for check in part.get("checks", []):
        verdict = "ok    " if checks.passed(check) else "FAILED"
        yield f"{verdict} {check['check']}: {check['error']:.2e} of {check['bound']:.1e} {check.get('note', '')}"
    for row in part.get("rows", []):
        yield f"timed  {row['suite']}: {row['case']}: {row['implementation']}: {1e3 * row['seconds']:.3f} ms"
    for name in part.get("splits", {}):
        yield f"timed  split: {name}"
    for kind in ("missing", "errors"):
        for name, why in part.get(kind, {}).items():
            yield f"{kind}: {name}: {why}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run everything in miniature, on a CPU")
    parser.add_argument("--minutes", type=float, default=9, help="time limit for everything, in minutes")
    parser.add_argument("--resume", type=Path, help="gpu.json of an earlier run here: keep its results, do the rest")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("error: torch finds no GPU; `python -m benchmarks.gpu --rehearse` runs on a CPU", file=sys.stderr)
        return 2
    try:
        report = dict(json.loads(args.resume.read_text())) if args.resume else None
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {args.resume}: {describe(error)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args.rehearse, args.minutes, folder, report=report)
        try:
            run.run()
        except RuntimeError as error:
            print(f"error: no worker: {error}", file=sys.stderr)
            return 1
        except InputError as error:
            print(f"error: {args.resume}: {error}", file=sys.stderr)
            return 2
    failed = [check for check in run.report.get("checks", []) if not checks.passed(check)]
    return 1 if failed or run.report.get("errors") else 0


if __name__ == "__main__":
    sys.exit(main())
