"""Planned collectives against real processes, and the model of step time."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec

import pytest
from conftest import ROOT, run_command
from scaling_worker import CONFIG, LAYOUTS, as_json, record_fake

from benchmarks.measure import Row
from benchmarks.roofline import roofline
from benchmarks.scaling import (
    STRATEGIES,
    Hardware,
    collective_seconds,
    model_point,
    nodes,
    phase_seconds,
    plan,
    sent_between_nodes,
)

HARDWARE = Hardware()


@pytest.fixture(scope="module")
def plans():
    return {(n, s): plan(CONFIG, n, s, 32, HARDWARE) for n in (8, 16) for s in STRATEGIES}


def test_hybrid_reduces_shards_between_nodes(plans):
    hybrid, once = plans[16, "hybrid"].communication, plans[16, "gathered once"].communication
    lies = {(c.phase, c.kind): (c.ranks, nodes(c, HARDWARE)) for c in hybrid}
    assert lies == {
        ("guidance", "all-gather"): (8, 1), ("backward", "reduce-scatter"): (8, 1),
        ("backward", "all-reduce"): (2, 2), ("optimizer", "all-reduce"): (8, 1),
    }  # fmt: skip
    assert {(c.ranks, nodes(c, HARDWARE)) for c in once} == {(16, 2)}
    sent = [sum(sent_between_nodes(c, HARDWARE) for c in these) for these in (hybrid, once)]
    assert sent[0] < sent[1]


@pytest.mark.slow
def test_fake_processes_match_real_ones(tmp_path):
    """Two real gloo processes with real tensors make the same collectives, byte for byte."""
    done = run_command("scaling_worker", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    real = json.loads((tmp_path / "collectives.json").read_text())
    for name, layout in LAYOUTS.items():
        assert real[name] == as_json(record_fake(dataclasses.replace(CONFIG, **layout), 2)), name


@pytest.mark.slow
def test_counts_without_the_interpreter(tmp_path):
    """As for a user: kernels cannot run on a CPU then, and need not."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--preset=b4", "--gpus", "2"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| 2 | gathered once |" in done.stdout


def test_model_of_time(plans):
    def point(ranks, strategy, batch=32, **changes):
        hw = dataclasses.replace(HARDWARE, **changes)
        step = roofline(CONFIG.model, CONFIG.method, batch, "h200", hw, gathered=True)
        return model_point(plan(CONFIG, ranks, strategy, batch, hw), strategy, step, hw)

    fast_host = {"host_operator_us": 1e-6, "host_launch_us": 1e-6}
    for ranks, strategy in plans:
        full, host = point(ranks, strategy, **fast_host), point(ranks, strategy)
        assert full.step > full.device
        assert host.step > host.host > full.step
        assert point(ranks, strategy, roofline_share=0.5, **fast_host).device == pytest.approx(2 * full.device)
        assert point(ranks, strategy, 64, **fast_host).device > full.device
        assert point(ranks, strategy, bandwidth_share=0.1, **fast_host).step > full.step
    for ranks in (8, 16):  # where only communication counts
        full, once = (point(ranks, s, 4, bandwidth_share=1e-6).step for s in ("full", "gathered once"))
        assert full > once
    slow = {"network_gb_per_s": 0.001, **fast_host}
    assert point(16, "hybrid", 4, **slow).step < point(16, "gathered once", 4, **slow).step


def test_rings_and_overlap(plans):
    gathers = [c for c in plans[16, "gathered once"].communication if c.kind == "all-gather"]
    gather = max(gathers, key=lambda c: c.bytes)
    assert gather.sent == gather.bytes * 15 / 16
    assert sent_between_nodes(gather, HARDWARE) == gather.sent / 8
    expected = (14 + 14 * 1.9 + 1 * 4.0) / 1e6 + gather.sent / (400e9 * 0.8)
    assert collective_seconds(gather, HARDWARE) == pytest.approx(expected)
    assert phase_seconds(1.0, [gather] * 3, HARDWARE) == pytest.approx(1 + expected)
    assert phase_seconds(0.0, [gather] * 3, HARDWARE) == pytest.approx(3 * expected)
    assert phase_seconds(1.0, [], HARDWARE) == 1


def command(*args, tmp_path):
    return run_command("benchmarks.scaling", "--rehearse", *args, cwd=tmp_path)


def test_command(tmp_path):
    row = Row("step", "guided, xl2 of 32", "mfengine", 0.32, 0.3, 0.4, 5, samples=32, flops=0, bytes=0)
    (tmp_path / "gpu.json").write_text(json.dumps({"rows": [asdict(row)]}))
    plot = ["--plot=out.png"] if find_spec("matplotlib") else []
    done = command("--gpus", "1", "16", "128", "--measured=gpu.json", "--json=out.json", *plot, tmp_path=tmp_path)
    assert done.returncode == 0
    assert not plot or (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "Modelled, not measured" in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    alone = next(p for p in report["points"] if p["ranks"] == 1 and p["batch"] == 32)
    assert alone["device"] == pytest.approx(0.32)  # the measured share of the roofline
    assert [(row["ranks"], row["strategy"]) for row in report["counts"]] == [
        (1, "gathered once"), (16, "full"), (16, "gathered once"), (16, "hybrid"),
        (128, "full"), (128, "gathered once"), (128, "hybrid"),
    ]  # fmt: skip
    assert {p["batch"] for p in report["points"] if p["regime"] == "the preset's global batch"} == {256, 16}
    assert list(report["infeasible"]["the preset's global batch"]) == ["128"]  # two rows
    for point in report["points"]:
        assert point["gpu_hours"] == pytest.approx(point["days"] * 24 * point["ranks"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--gpus", "12"), "a multiple of 8, not 12"),
        (("--gpus", "0"), "at least 1"),
        (("--hardware.matrix-share=0",), "--hardware.matrix-share must be positive"),
        (("--measured=nowhere.json",), "cannot read nowhere.json"),
        (("--measured=other.json",), "has no measured step"),
        (("--json=nowhere/out.json",), "cannot write nowhere/out.json: the folder nowhere does not exist"),
        (("--nodes=3",), "there is no option --nodes"),
        (("--gpu=h400",), "unknown GPU h400"),
    ],
)
def test_bad_arguments(args, message, tmp_path):
    (tmp_path / "other.json").write_text('{"rows": []}')
    done = command(*args, tmp_path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
