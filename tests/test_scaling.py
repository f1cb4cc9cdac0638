"""Counted collectives against what each layout must move, against real processes, and the model of step time."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import run_in_process
from scaling_worker import CONFIG, collectives

from benchmarks.measure import Row
from benchmarks.scaling import (
    STRATEGIES,
    Collective,
    Hardware,
    collective_seconds,
    count_fake,
    count_flops,
    model_point,
    phase_seconds,
)
from mfengine import DiT
from mfengine.engine.flops import forward_flops

WORKER = Path(__file__).parent / "scaling_worker.py"
NODE = 8
GROUPS = 6  # two blocks, three embedders, and the rest


@pytest.fixture(scope="module")
def steps():
    return {(n, s): count_fake(CONFIG, n, s, NODE) for n in (2, 16) for s in STRATEGIES}


@pytest.fixture(scope="module")
def sizes():
    """Elements of all parameters, and of those gathered in float32: the embedders'."""
    parameters = dict(DiT(CONFIG.model).named_parameters())
    single = sum(p.numel() for n, p in parameters.items() if n.startswith(("t_embedder", "h_embedder", "y_embedder")))
    return sum(p.numel() for p in parameters.values()), single


def total(these):
    return sum(c.bytes for c in these)


def test_gathered_once_gathers_each_parameter_once(steps, sizes):
    every, single = sizes
    step = steps[2, "gathered once"]
    gathers = step.of_kind("all-gather")
    # 17 classes and the null class are 18 rows, and all else is even too: nothing is padded for two ranks.
    assert total(gathers) == 2 * (every - single) + 4 * single
    assert len(gathers) == GROUPS
    assert step.phases["guidance"].each == gathers


def test_full_gathers_for_guidance_forward_and_backward(steps):
    once, full = steps[2, "gathered once"], steps[2, "full"]
    for name in ("guidance", "forward", "backward"):
        gathers = [c for c in full.phases[name].each if c.kind == "all-gather"]
        assert Counter(gathers) == Counter(once.of_kind("all-gather"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_reduced_once_in_float32(strategy, steps, sizes):
    step = steps[2, strategy]
    reductions = step.of_kind("reduce-scatter")
    assert total(reductions) == 4 * sizes[0]
    assert len(reductions) == GROUPS
    assert step.of_kind("all-reduce") == [Collective("all-reduce", 2, 1, bytes=8)]  # the gradients' norm
    assert {c.kind for c in step.phases["backward"].each} <= {"reduce-scatter", "all-gather"}


def test_padding_is_counted(steps, sizes):
    assert total(steps[16, "gathered once"].of_kind("reduce-scatter")) > 4 * sizes[0]  # 18 labels to 32 rows


def test_hybrid_reduces_shards_between_nodes(steps):
    hybrid, once = steps[16, "hybrid"], steps[16, "gathered once"]
    assert {(c.ranks, c.nodes) for c in hybrid.of_kind("all-gather") + hybrid.of_kind("reduce-scatter")} == {(8, 1)}
    reduced = [c for c in hybrid.phases["backward"].each if c.kind == "all-reduce"]
    assert {(c.ranks, c.nodes) for c in reduced} == {(2, 2)}
    assert total(reduced) == total(hybrid.of_kind("reduce-scatter")) / 8
    assert hybrid.phases["optimizer"].each == [Collective("all-reduce", 8, 1, bytes=8)]  # the gradients' norm
    assert {(c.ranks, c.nodes) for c in once.of_kind("all-gather")} == {(16, 2)}
    sent = {name: sum(c.sent_between_nodes for p in step.phases.values() for c in p.each)
            for name, step in (("hybrid", hybrid), ("once", once))}  # fmt: skip
    assert sent["hybrid"] < sent["once"]


def test_two_processes_do_what_is_counted(tmp_path):
    """gloo between two real processes, with real tensors: the same collectives, byte for byte."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(WORKER)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    real = json.loads((tmp_path / "collectives.json").read_text())
    assert real["full"]["forward"]
    for strategy in STRATEGIES:
        assert real[strategy] == collectives(count_fake(CONFIG, 2, strategy, 1)), strategy


def test_counts_without_the_interpreter(tmp_path):
    """As a user runs it: kernels cannot run on a CPU there, and need not."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--preset=b4", "--gpus", "2"],
        cwd=WORKER.parent.parent, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| 2 | gathered once |" in done.stdout


def test_flops_are_those_of_the_method_page():
    flops = count_flops(CONFIG)
    assert flops["guidance"] > 0
    assert 3.9 < sum(flops.values()) / forward_flops(CONFIG.model) < 4.5


def test_model_of_time(steps):
    hw = Hardware(launch_us=1e-3)
    flops = {"guidance": 1e11, "forward": 1e11, "backward": 2e11}

    def seconds(ranks, strategy, batch=32, **changes):
        step = steps[ranks, strategy]
        hardware = dataclasses.replace(hw, **changes)
        return model_point(CONFIG, flops, step, batch, hardware).step

    compute = 4e11 * 32 / (989e12 * 0.5)
    for ranks, strategy in steps:
        assert seconds(ranks, strategy) > compute
        assert seconds(ranks, strategy, 64) > seconds(ranks, strategy, 32)
        assert seconds(ranks, strategy, matrix_share=0.25) > seconds(ranks, strategy)
        assert seconds(ranks, strategy, bandwidth_share=0.1) > seconds(ranks, strategy)
    for ranks in (2, 16):  # where communication is all that counts
        assert seconds(ranks, "full", 4, bandwidth_share=0.01) > seconds(
            ranks, "gathered once", 4, bandwidth_share=0.01
        )
    assert seconds(16, "hybrid", 4, network_gb_per_s=0.1) < seconds(16, "gathered once", 4, network_gb_per_s=0.1)


def test_rings_and_overlap(steps):
    hw = Hardware()
    gather = max(steps[16, "gathered once"].of_kind("all-gather"), key=lambda c: c.bytes)
    assert gather.sent == gather.bytes * 15 / 16
    assert gather.sent_between_nodes == gather.sent / 8
    expected = (14 + 14 * 1.9 + 1 * 4.0) / 1e6 + gather.sent / (400e9 * 0.8)
    assert collective_seconds(gather, hw) == pytest.approx(expected)
    assert phase_seconds(1.0, [gather] * 3, hw) == pytest.approx(1 + expected)
    assert phase_seconds(0.0, [gather] * 3, hw) == pytest.approx(3 * expected)
    assert phase_seconds(1.0, [], hw) == 1


def command(*args, tmp_path, monkeypatch, capsys):
    done = ("benchmarks.scaling", "--rehearse", *args)
    return run_in_process(*done, cwd=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


def test_command(tmp_path, monkeypatch, capsys):
    where = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    row = Row("step", "guided, xl2 of 32", "mfengine", 0.32, 0.3, 0.4, 5, samples=32, flops=0, bytes=0)
    (tmp_path / "gpu.json").write_text(json.dumps({"rows": [asdict(row)]}))
    plot = ["--plot=out.png"] if find_spec("matplotlib") else []
    code, out, _ = command("--gpus", "1", "16", "128", "--measured=gpu.json", "--json=out.json", *plot, **where)
    assert code == 0
    assert not plot or (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "Modelled, not measured" in out
    report = json.loads((tmp_path / "out.json").read_text())
    rate = report["hardware"]["matrix_tflops"] * 1e12 * report["hardware"]["matrix_share"]
    assert rate == pytest.approx(100 * sum(report["flops_per_sample"].values()))
    assert [(row["ranks"], row["strategy"]) for row in report["counts"]] == [
        (1, "gathered once"), (16, "full"), (16, "gathered once"), (16, "hybrid"),
        (128, "full"), (128, "gathered once"), (128, "hybrid"),
    ]  # fmt: skip
    assert {p["batch"] for p in report["points"] if p["regime"] == "global batch 256"} == {256, 16}
    assert list(report["infeasible"]["global batch 256"]) == ["128"]  # two rows: a quarter is no number of rows
    for point in report["points"]:
        assert point["gpu_hours"] == pytest.approx(point["days"] * 24 * point["ranks"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--gpus", "12"), "a multiple of it, not 12"),
        (("--gpus", "0"), "at least 1"),
        (("--hardware.matrix-share=0",), "matrix_share must be positive"),
        (("--measured=nowhere.json",), "cannot read nowhere.json"),
        (("--measured=other.json",), "has no measured step"),
        (("--json=nowhere/out.json",), "there is no folder nowhere"),
        (("--nodes=3",), "there is no option --nodes"),
    ],
)
def test_bad_arguments(args, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "other.json").write_text('{"rows": []}')
    code, _, err = command(*args, tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
