"""The benchmarks: the guard, the checks, and the timing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import slow

from benchmarks import cases, checks, guard, measure, report
from benchmarks.cases import Machine, fused_ops, rotating
from benchmarks.measure import Row
from benchmarks.split import Labelled, seconds_of_passes
from benchmarks.workload import OBJECTIVES
from mfengine import DiT, MeanFlow, ModelConfig, ops
from mfengine.engine import rates
from mfengine.kernels import multi_tensor
from mfengine.ops.backend import chosen
from mfengine.ops.table import Shape

ROOT = Path(__file__).parent.parent
SMALL = Shape(2, 5, 1, 24)
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


def test_regressions_beyond_tolerance():
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
    assert len(guard.changed_counts({**more, "torch": "2.14.0"}, accepted)) == 1  # PyTorch may launch differently
    assert guard.changed_counts({"torch": "", "counts": {"new": {"flops": 1}}}, accepted) == [
        "new: flops 1, accepted None"
    ]


def test_peers_of_attention_agree_with_ours(tmp_path, monkeypatch):
    """Causal, masked, with grouped queries, and with gradients through the tangent."""
    monkeypatch.setattr(cases, "find_spec", lambda name: None)  # hides what needs a GPU
    machine, count = Machine(torch.device("cpu"), tmp_path, rehearse=True), 0
    for case in cases.attention(machine, "xl2", 2):
        results = []
        for make in case.implementations.values():
            torch.manual_seed(0)
            results.append(make()())
        count += len(results[0])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert case.flops() > 0
    assert count == 3 * 2 + 4 * (2 + 6)


PLANTED = """
import dataclasses, mfengine.methods, torch
from mfengine.ops import OPS

usual_gelu, usual_loss = OPS["gelu"], mfengine.methods.MeanFlow.loss

def slow_gelu(*args):
    example = usual_gelu(*args)

    def function(*args):
        for _ in range(7):
            example.function(*args)
        return example.function(*args)

    return dataclasses.replace(example, function=function)

def costly_loss(self, model, latents, labels, draws):
    with torch.no_grad():
        model(latents, latents[:, 0, 0, 0], latents[:, 0, 0, 0], labels)
    return usual_loss(self, model, latents, labels, draws)

OPS["gelu"], mfengine.methods.MeanFlow.loss = slow_gelu, costly_loss
"""


PEER = """
def step(model, objective, batch, device, dtype):
    assert model.num_tokens == 64 and device.type == "cpu"
    return lambda: None
"""
SELECTION = "(gelu and dual) or (counts and b2-guided-mfengine) or (step and peer)"


def run_benchmarks(*options, cwd, plugin=None):
    # In a separate environment: kernels must be compiled for timing, and pytest-xdist must not run beside them.
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


@pytest.mark.slow
def test_guard_trips_on_a_slow_op_and_on_an_extra_forward(tmp_path):
    (tmp_path / "somebody.py").write_text(PEER)
    accepted = run_benchmarks("--accept", f"--record={tmp_path / 'run.json'}", "--peer=somebody:step", cwd=tmp_path)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert "| peer " in accepted.stdout
    assert "of ceiling" in accepted.stdout
    (tmp_path / "planted.py").write_text(PLANTED)
    guarded = run_benchmarks("--guard", cwd=tmp_path, plugin="planted")
    assert guarded.returncode == 1, guarded.stdout + guarded.stderr
    assert "REGRESSION kernels: gelu, dual" in guarded.stdout
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


@pytest.mark.slow
def test_missing_peer(tmp_path):
    done = run_benchmarks("--peer=mfengine:nobody", cwd=tmp_path)
    assert done.returncode == 4
    assert "--peer must be MODULE:FUNCTION, not mfengine:nobody" in done.stderr


def test_split_takes_tangents_as_training_does(monkeypatch):
    """It does not use `torch.func.jvp`, which is for networks without explicit tangents."""
    monkeypatch.setattr(torch.func, "jvp", None)
    config = ModelConfig(8, 2, 4, hidden_size=24, depth=1, num_heads=2, num_classes=3)
    method = MeanFlow(OBJECTIVES["guided"])
    draws = method.draw((8, 4, 8, 8), torch.Generator().manual_seed(0))
    loss, _ = method.loss(Labelled(DiT(config)), torch.randn(8, 4, 8, 8), torch.zeros(8, dtype=torch.long), draws)
    assert loss.requires_grad


def test_report_of_an_unrelated_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.json").write_text(json.dumps({"rows": 3}))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "x.json")])
    assert report.main() == 2
    assert "is not the JSON of a benchmark run" in capsys.readouterr().err


def test_split_counts_launches_through_the_runtime_and_through_the_driver():
    def event(category, name, start, duration, **args):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": args}

    trace = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "step", 0, 100),
        event("user_annotation", "forward", 10, 20),
        event("user_annotation", "backward", 40, 20),
        event("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 15, 1, correlation=2),
        event("cuda_driver", "cuLaunchKernelEx", 45, 1, correlation=3),
        event("cuda_driver", "cuModuleLoad", 46, 1),
        event("kernel", "gemm", 30, 5, correlation=1),
        event("kernel", "forward_kernel", 50, 7, correlation=2),
        event("kernel", "backward_kv_kernel", 70, 11, correlation=3),
    ]
    spent = seconds_of_passes(trace, gpu=True)
    assert spent["forward"] == pytest.approx(12e-6)
    assert spent["backward"] == pytest.approx(11e-6)


# ----------------------------------------------------------------------------
# Timing.


class SimulatedDevice:
    """A GPU that works through a queue while a host fills it; times in seconds."""

    def __init__(self):
        self.host = self.free = 0.0

    def launch(self, host, device):
        self.host += host
        self.free = max(self.free, self.host) + device

    def event(self, enable_timing):
        return SimulatedEvent(self)


class SimulatedEvent:
    def __init__(self, device):
        self.device, self.at = device, 0.0

    def record(self):
        self.at = max(self.device.free, self.device.host)

    def query(self):
        return self.at <= self.device.host

    def synchronize(self):
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("host", [5e-5, 1e-3])
def test_kernel_timings_exclude_the_host(host, monkeypatch):
    device = SimulatedDevice()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(measure, "other_work", lambda _: lambda: device.launch(1e-5, 7e-4))

    def median(hide_host):
        clock = measure.make_clock(torch.device("cuda"), hide_host)
        return sorted(measure.measure(lambda: device.launch(host, 2.5e-5), clock, 0.0, warmup=2))[1]

    assert median(hide_host=True) == pytest.approx(2.5e-5, rel=0.01)
    assert median(hide_host=False) == pytest.approx(host, rel=0.1)  # the time that a step waits counts


def test_inputs_exceed_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 60_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    made = []
    following = rotating(lambda: made.append(torch.empty(250_000)) or made[-1], torch.device("cuda"))
    assert sum(x.numel() * x.element_size() for x in made) > 2 * Properties.L2_cache_size
    assert len({following().data_ptr() for _ in made}) == len(made)


# ----------------------------------------------------------------------------
# Checks.


@pytest.mark.parametrize("op", [slow(op) if "attention" in op or op == "adaln_modulate" else op for op in fused_ops()])
def test_kernels_pass_the_checks(op):
    check = checks.check_op(op, SMALL, torch.float16, op, torch.device("cpu"))
    assert checks.passed(check), check


def lost_tangent(o):
    return ops.Dual(o.primal, torch.zeros_like(o.tangent))


def unwritten(o):
    hole = torch.empty_like(o.tangent)
    hole[1:] = o.tangent[1:]
    return ops.Dual(o.primal, hole)


def inexact(o):
    return ops.Dual(o.primal, o.tangent.half().float())


def different_each_time(o):
    return ops.Dual(o.primal, o.tangent * (1 + 1e-7 * torch.rand(())))


@pytest.mark.parametrize("fault", [lost_tangent, unwritten, inexact, different_each_time])
def test_checks_detect_faults(fault, monkeypatch):
    """They detect faults that occur only in our kernels."""
    usual = ops.OPS["gelu"]

    def planted(*args):
        example = usual(*args)

        def function(*args):
            o = example.function(*args)
            return fault(o) if chosen() == "triton" else o

        return replace(example, function=function)

    monkeypatch.setitem(ops.OPS, "gelu", planted)
    check = checks.check_op("gelu", SMALL, torch.float32, "gelu", torch.device("cpu"))
    assert not checks.passed(check), check
    assert bool(check["note"]) == (fault is different_each_time)


def test_optimizer_without_its_library_fails(monkeypatch, tmp_path):
    """It must not check PyTorch's optimizer instead."""
    monkeypatch.setattr(multi_tensor, "LIBRARY", tmp_path / "libmfengine_cuda.so")
    multi_tensor.library.cache_clear()
    with pytest.raises(ValueError, match="not built"):
        checks.check_optimizer("cuda", torch.device("cpu"), steps=1)
    assert checks.passed(checks.check_optimizer("torch", torch.device("cpu"), steps=10))


# ----------------------------------------------------------------------------
# The MFU.


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_data_sheets(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(rates, "matrix_rate", lambda device, dtype: 1e12)
    device = torch.device("cuda")
    assert rates.data_sheet_rate(device, torch.bfloat16) == (tflops and pytest.approx(tflops * 1e12))
    assert rates.peak_rate(device, torch.bfloat16) == pytest.approx(1e12 * (tflops or 1))
    assert rates.peak_rate(device, torch.float32) == 1e12


def test_tables_show_prediction_and_shares():
    step = Row(
        "step", "guided, xl2 of 32", "mfengine", 0.1, 0.1, 0.1, 5, samples=32, flops=4e13, bytes=0, predicted=0.066
    )
    peer = Row("step", "guided, xl2 of 32", "port", 0.3, 0.3, 0.3, 5, samples=32, flops=4e13, bytes=0)
    limits = {"memory_bytes_per_s": 3e12, "matrix_flops_per_s": 8e14, "peak_flops_per_s": 1e15}
    found = {"environment": dict.fromkeys(("device", "torch", "cuda", "triton", "python", "commit"), "x")}
    found |= {"ceilings": limits, "rows": [vars(step), vars(peer)]}
    for text in (report.render(found), report.compact(found)):
        assert "MFU" in text
        assert "predicted ms" in text
        assert "66.000" in text
        assert "40.0%" in text
        assert "50%" in text
        assert "3.00 x" in text


def test_late_rows_are_grouped_with_their_case():
    rows = [("A", "mfengine"), ("B", "mfengine"), ("B", "port"), ("A", "port compiled")]
    found = {"environment": dict.fromkeys(("device", "torch", "cuda", "triton", "python", "commit"), "x")}
    found["rows"] = [vars(Row("step", *row, 0.1, 0.1, 0.1, 5, samples=32, flops=0, bytes=0)) for row in rows]
    lines = report.render(found).partition("## Step")[2].splitlines()[4:]
    cells = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines]
    assert cells == [("A", "mfengine"), ("", "port compiled"), ("B", "mfengine"), ("", "port")]
