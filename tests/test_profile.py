"""The profile of steps by pass and operator."""

import json

import pytest
from conftest import SMALL, run_command

from mfengine.engine.profile import spent, table


def test_steps_of_a_run_are_profiled(digits, tmp_path):
    args = (
        "mfengine.train",
        *SMALL,
        f"--data={digits}",
        "--steps=4",
        "--profile=2:3",
        "--method.omega=2",
        "--tracker=none",
    )
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/digits/profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    labels = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert [labels.count(name) for name in ("data", "guidance", "forward", "backward", "optimizer")] == [2] * 5
    lines = (folder / "table.txt").read_text().splitlines()
    shares = {tuple(line.split("  ")[:1]): float(line.split()[-1].rstrip("%")) for line in lines if " all " in line}
    assert {"guidance", "forward", "tangent", "backward", "optimizer"} <= {name.strip() for (name,) in shares}
    assert sum(shares.values()) == pytest.approx(100, abs=1)


def event(cat, name, ts, dur, **args):
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "ph": "X", "pid": 1, "tid": 1, "args": args}


def test_kernels_belong_to_the_pass_that_launched_them():
    """PyTorch's through the runtime, Triton's through the driver; kernels run later than their launches."""
    events = [
        event("user_annotation", "forward", 0, 10),
        event("user_annotation", "backward", 10, 10),
        event("cuda_driver", "cuLaunchKernelEx", 1, 1, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 5, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=3),
        event("kernel", "_attention_dual", 100, 3e6, correlation=1),
        event("kernel", "nvjet_tst_128x256", 200, 2e6, correlation=2),
        event("kernel", "ncclDevKernel_ReduceScatter", 300, 1e6, correlation=3),
        event("cpu_op", "aten::mm", 5, 2),  # does not count if there are kernels
    ]
    assert spent(events) == {
        ("tangent", "attention"): 3.0,
        ("forward", "matrix product"): 2.0,
        ("backward", "communication"): 1.0,
    }
    assert table(spent(events)).splitlines()[1].split() == ["tangent", "all", "3000.00", "50.0%"]


def test_time_of_an_operator_excludes_inner_ones():
    events = [
        event("user_annotation", "forward", 0, 100),
        event("cpu_op", "aten::linear", 0, 10, **{"Sequence number": 7}),
        event("cpu_op", "aten::addmm", 1, 8),
        event("cpu_op", "aten::linear", 20, 5),  # without a graph
        event("cpu_op", "aten::gelu", 200, 5),
    ]
    assert {key: round(1e6 * seconds) for key, seconds in spent(events).items()} == {
        ("forward", "matrix product"): 10,
        ("tangent", "matrix product"): 5,
        ("other", "activation"): 5,
    }
