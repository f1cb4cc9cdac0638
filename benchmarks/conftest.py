"""Times the cases of `pytest benchmarks/`, prints the table at the end, and adds options."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import guard
from benchmarks.cases import Case, Machine, cases
from benchmarks.measure import RESULTS, Row, ceilings, environment, make_clock, short_name
from benchmarks.report import render


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mfengine")
    group.addoption("--guard", action="store_true", help="fail if a figure is worse than its accepted value")
    group.addoption("--accept", action="store_true", help="accept the figures of this run, under benchmarks/results")
    group.addoption("--results", type=Path, default=RESULTS, metavar="FOLDER", help="folder of accepted figures")
    group.addoption("--record", type=Path, metavar="FILE", help="write all figures as JSON, for benchmarks.report")
    group.addoption(
        "--peer",
        metavar="MODULE:FUNCTION",
        help="also time another training step on the same work: "
        "function(model config, objective config, batch, device, dtype) returns a function that does one step",
    )


class Session:
    """The measurements of a session."""

    def __init__(self, config: pytest.Config) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="mfengine-benchmarks-")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)  # several threads wait for each other and stall as soon as anything else runs
        self.machine = Machine(device, Path(self.folder.name))
        self.cases = list(cases(self.machine, _load_peer(config.option.peer)))
        self.rows: list[Row] = []
        self.counts: dict[str, dict[str, Any]] = {}
        self.splits: dict[str, dict[str, float]] = {}
        self._ceilings: dict[str, float] = {}

    @property
    def ceilings(self) -> dict[str, float]:
        """The machine's ceilings, measured once, before the first row."""
        self._ceilings = self._ceilings or ceilings(self.machine.device, self.machine.dtype)
        return self._ceilings

    def report(self) -> dict[str, Any]:
        return {
            "environment": environment(self.machine.device),
            "ceilings": self._ceilings,
            "rows": [asdict(row) for row in self.rows],
            "counts": self.counts,
            "splits": self.splits,
        }

    def guarded(self) -> dict[str, Any]:
        found = guard.figures(self.rows, self.ceilings, self.machine.gpu) if self.rows else {}
        return {"environment": environment(self.machine.device), "figures": found}

    def confirmed_regressions(self, accepted: guard.Figures) -> list[str]:
        """Regressions that remain when the cases are measured again, with implementations in turns."""
        tolerance = guard.TOLERANCE["gpu" if self.machine.gpu else "cpu"]
        suspects = guard.regressions(self.guarded()["figures"], accepted, tolerance)
        if not suspects:
            return []
        again = [
            case for case in self.cases if any(line.startswith(f"{case.suite}: {case.name}: ") for line in suspects)
        ]
        rows = [row for case in again for row in guard.in_turns(case, self.machine)]
        return guard.regressions(guard.figures(rows, self.ceilings, self.machine.gpu), accepted, tolerance)


def _load_peer(name: str | None) -> Any:
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--peer must be MODULE:FUNCTION, not {name}: {error}") from None


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # our table replaces that of pytest-benchmark
    config.stash[SESSION] = Session(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        session = metafunc.config.stash[SESSION]
        pairs = [(case, name) for case in session.cases for name in case.implementations]
        ids = [f"{case.suite}: {case.name}: {name}" for case, name in pairs]
        metafunc.parametrize(("case", "implementation"), pairs, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    session = config.stash[SESSION]
    options = {"min_time": 2e-3, "max_time": 0.6, "min_rounds": 5, "warmup": True, "warmup_iterations": 2}
    timers = {hide_host: make_clock(session.machine.device, hide_host) for hide_host in (False, True)}
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            timer = timers[item.callspec.params["case"].hide_host]  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.benchmark(**options, timer=timer, disable_gc=True))


@pytest.fixture
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[SESSION]


@pytest.fixture
def record(session: Session, benchmark: Any) -> Callable[[Case, str], Row]:
    """Time one implementation of a case and keep the row."""

    def run(case: Case, implementation: str) -> Row:
        limits = session.ceilings
        try:
            benchmark(case.implementations[implementation]())
        except torch.OutOfMemoryError:
            pytest.skip("out of memory")
        row = case.row(implementation, list(benchmark.stats.stats.data))
        session.rows.append(row)
        benchmark.extra_info.update(asdict(row), **limits, share_of_ceiling=row.floor(limits) / row.seconds)
        return row

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if session.rows or session.counts:
        terminalreporter.write_line(render(session.report()))
    for line in config.stash.get(MESSAGES, []):
        terminalreporter.write_line(line)


MESSAGES = pytest.StashKey[list[str]]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    config, measured = session.config, session.config.stash[SESSION]
    messages = config.stash.setdefault(MESSAGES, [])
    if config.option.record:
        config.option.record.write_text(json.dumps(measured.report(), indent=1) + "\n")
    folder = config.option.results
    accepted_file = folder / short_name(measured.machine.device) / "accepted.json"
    counts_file = folder / "counts.json"
    now = {"torch": torch.__version__.partition("+")[0], "counts": measured.counts}
    if config.option.guard:
        failures = []
        if measured.rows:
            accepted = guard.read(accepted_file)
            if accepted is None:
                messages.append(f"times are not guarded: {accepted_file} does not exist; --accept writes it")
            else:
                failures += measured.confirmed_regressions(accepted["figures"])
        if measured.counts:
            failures += guard.changed_counts(now, guard.read(counts_file) or {"torch": "", "counts": {}})
        messages += [f"REGRESSION {line}" for line in failures] or ["guard: no regressions"]
        if failures and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.option.accept:
        if measured.rows:
            guard.write(accepted_file, measured.guarded())
        if measured.counts:
            guard.write(counts_file, now)
        messages.append(f"accepted: commit the changes under {folder}")
    measured.folder.cleanup()
