"""The guard of `pytest benchmarks/`: what trips it, what does not, and that a slower or costlier step does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import guard, report
from benchmarks.measure import Row
from benchmarks.split import Labelled
from benchmarks.workload import OBJECTIVES
from mfengine import DiT, MeanFlow, ModelConfig

ROOT = Path(__file__).parent.parent
CEILINGS = {"memory_bytes_per_s": 1e9, "matrix_flops_per_s": 1e12}


def row(implementation, seconds, case="gelu"):
    return Row("kernels", case, implementation, seconds, seconds * 0.9, seconds * 1.1, 5, samples=4, flops=0, bytes=1e6)


def test_figures_are_ratios_of_one_run():
    rows = [row("mfengine", 0.01), row("plain", 0.03), row("peer", 1.0), row("mfengine", 0.02, "adaln")]
    assert guard.figures(rows, CEILINGS, gpu=False) == pytest.approx(
        {
            "kernels: gelu: share of the ceiling": 1e-3 / 0.009,
            "kernels: gelu: speed over plain": 3.0,
            "kernels: adaln: share of the ceiling": 1e-3 / 0.018,
        }
    )
    assert guard.figures(rows, CEILINGS, gpu=True)["kernels: gelu: calls per second"] == pytest.approx(100)


def test_tolerance():
    accepted = {"a": 2.0, "b": 1.0, "gone": 1.0}
    assert guard.regressions({"a": 1.81, "b": 5.0, "new": 0.1}, accepted, 0.1) == []
    assert guard.regressions({"a": 1.79}, accepted, 0.1) == ["a: 1.79, accepted 2, tolerance 10%"]


def test_counts_are_exact():
    accepted = {"torch": "2.13.0", "counts": {"guided": {"flops": 1000, "launches": 7}}}
    assert guard.changed_counts(accepted, accepted) == []
    more = {"torch": "2.13.0", "counts": {"guided": {"flops": 1001, "launches": 8}}}
    assert guard.changed_counts(more, accepted) == [
        "guided: flops 1,001, accepted 1,000",
        "guided: launches 8, accepted 7",
    ]
    assert len(guard.changed_counts({**more, "torch": "2.14.0"}, accepted)) == 1  # it may launch otherwise
    assert guard.changed_counts({"torch": "", "counts": {"new": {"flops": 1}}}, accepted) == [
        "new: flops 1, accepted None"
    ]


PLANTED = """
import mfengine.ops, mfengine.methods, torch

usual_gelu, usual_loss = mfengine.ops.gelu, mfengine.methods.MeanFlow.loss

def slow_gelu(*args):
    for _ in range(7):
        usual_gelu(*args)
    return usual_gelu(*args)

def costly_loss(self, model, latents, labels, draws):
    with torch.no_grad():
        model(latents, latents[:, 0, 0, 0], latents[:, 0, 0, 0], labels)
    return usual_loss(self, model, latents, labels, draws)

mfengine.ops.gelu, mfengine.methods.MeanFlow.loss = slow_gelu, costly_loss
"""


PEER = """
def step(model, objective, batch, device, dtype):
    assert model.num_tokens == 64 and device.type == "cpu"
    return lambda: None
"""
SELECTION = "(gelu and dual) or (counts and b2 and guided and mfengine) or (step and peer)"


def run_benchmarks(*options, cwd, plugin=None):
    # Nothing of the session that runs this: kernels are timed compiled, and not beside others under xdist.
    inherited = ("TRITON_INTERPRET", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    environment["PYTHONPATH"] = str(cwd)
    planted = ("-p", plugin) if plugin else ()
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *planted,
            "benchmarks",
            "-k",
            SELECTION,
            f"--results={cwd / 'results'}",
            *options,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_guard_trips_on_a_slow_op_and_on_an_extra_forward(tmp_path):
    (tmp_path / "somebody.py").write_text(PEER)
    accepted = run_benchmarks("--accept", f"--record={tmp_path / 'run.json'}", "--peer=somebody:step", cwd=tmp_path)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert "| peer " in accepted.stdout
    assert "of ceiling" in accepted.stdout
    (tmp_path / "planted.py").write_text(PLANTED)
    guarded = run_benchmarks("--guard", cwd=tmp_path, plugin="planted")
    assert guarded.returncode == 1, guarded.stdout + guarded.stderr
    assert "REGRESSION kernels: bias gelu, dual" in guarded.stdout
    assert "REGRESSION b2, guided, mfengine: flops" in guarded.stdout

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", tmp_path / "run.json", "--out", tmp_path / "report"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Kernels" in text
    assert "## Counts" in text
    assert (tmp_path / "report" / "kernels.png").stat().st_size > 5_000


def test_peer_that_is_not_there(tmp_path):
    done = run_benchmarks("--peer=mfengine:nobody", cwd=tmp_path)
    assert done.returncode == 4
    assert "--peer mfengine:nobody is not MODULE:FUNCTION" in done.stderr


def test_split_takes_tangents_as_training_does(monkeypatch):
    """Not by `torch.func.jvp`, which is for networks without explicit ones."""
    monkeypatch.setattr(torch.func, "jvp", None)
    config = ModelConfig(8, 2, 4, hidden_size=24, depth=1, num_heads=2, num_classes=3)
    method = MeanFlow(OBJECTIVES["guided"])
    draws = method.draw((8, 4, 8, 8), torch.Generator().manual_seed(0))
    loss, _ = method.loss(Labelled(DiT(config)), torch.randn(8, 4, 8, 8), torch.zeros(8, dtype=torch.long), draws)
    assert loss.requires_grad


def test_report_of_something_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.json").write_text(json.dumps({"rows": 3}))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "x.json")])
    assert report.main() == 2
    assert "is not the JSON of a benchmark run" in capsys.readouterr().err
