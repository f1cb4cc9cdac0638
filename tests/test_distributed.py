"""Several gloo processes against one: the same weights, resuming, and layouts that must not change the result."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import SMALL, checkpoint_contents, run_command
from golden_cases import relative_error
from rank_worker import CHECKS

from benchmarks.one_rank import check_one_rank
from mfengine.data.format import LatentSpace
from mfengine.data.writer import ArraySamples, order, write_dataset
from mfengine.engine.weights import load_model
from mfengine.ranks import world

GUIDED = ("--method.omega=0.2", "--method.kappa=0.92", "--method.t-end=0.75")
STEPS = ("--steps=20", "--checkpoint-every=10")
CLIPPED = ("--steps=5", "--optim.clip-norm=0.01", "--optim.eps=1e-4", "--log-every=1", *GUIDED)


def train(digits, cwd, name, *args, ranks=1):
    done = run_command("mfengine.train", *SMALL, f"--data={digits}", f"--name={name}", *args, cwd=cwd, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done


def weights(cwd, name):
    """Weights of the network itself: its moving average is still close to the common start."""
    return {k: v for k, v in checkpoint_contents(cwd / "runs" / name).items() if k.startswith("/model/")}


def assert_near(actual, expected, tolerance=1e-5):
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, (worst, errors[worst])


@pytest.fixture(scope="module")
def single(digits, tmp_path_factory):
    """20 steps of one process that takes the global batch in two passes."""
    cwd = tmp_path_factory.mktemp("ranks")
    train(digits, cwd, "single", *STEPS, *GUIDED, "--accumulation=2")
    return cwd


@pytest.fixture(scope="module")
def sharded(single, digits):
    """20 steps of two processes, one pass each."""
    train(digits, single, "sharded", *STEPS, *GUIDED, ranks=2)
    return single


@pytest.fixture(scope="module")
def clipped(digits, tmp_path_factory):
    """Five steps of each, with gradients clipped to a norm over all ranks."""
    cwd = tmp_path_factory.mktemp("clipped")
    train(digits, cwd, "single", *CLIPPED, "--accumulation=2")
    train(digits, cwd, "sharded", *CLIPPED, ranks=2)
    return cwd


@pytest.mark.forks
def test_two_processes_reach_the_weights_of_one(clipped):
    assert_near(weights(clipped, "sharded"), weights(clipped, "single"))
    lines = [(clipped / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("single", "sharded")]
    one, two = map(json.loads, lines)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


@pytest.mark.forks
def test_another_number_of_processes_resumes(clipped, digits):
    before = checkpoint_contents(clipped / "runs/sharded")
    # This small rate leaves the weights as they were read, and shows that a resumed run takes the new rate.
    done = train(digits, clipped, "sharded", *CLIPPED, "--steps=6", "--optim.lr=1e-20", "--resume=auto")
    assert "continuing runs/sharded/checkpoints/step-00000005" in done.stderr
    assert "dealt in 2 part(s), now in 1: its position restarts at the beginning of the epoch" in done.stderr
    after = checkpoint_contents(clipped / "runs/sharded")
    weights = [name for name in before if name.startswith("/model/")]
    assert len(weights) > 10
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert {float(value) for name, value in after.items() if name.endswith("/step")} == {6.0}


@pytest.mark.slow
def test_twenty_steps_of_two_processes_are_those_of_one(single, sharded):
    assert_near(weights(single, "sharded"), weights(single, "single"))


@pytest.mark.slow
def test_hsdp_resharding_and_recomputing_reach_the_same_weights(single, digits):
    train(digits, single, "layouts", *STEPS, *GUIDED, "--replicas=2", "--reshard", "--recompute", ranks=2)
    assert_near(weights(single, "layouts"), weights(single, "single"))


@pytest.mark.slow
def test_two_processes_stop_and_resume(single, sharded, digits):
    train(digits, single, "stopped", "--steps=7", *GUIDED, ranks=2)
    train(digits, single, "stopped", *STEPS, *GUIDED, "--resume=auto", ranks=2)
    stopped, through = (checkpoint_contents(single / "runs" / name) for name in ("stopped", "sharded"))
    for name, value in through.items():
        assert torch.equal(stopped[name], value) if isinstance(value, torch.Tensor) else stopped[name] == value, name


@pytest.mark.slow  # other tests cover each half
def test_one_process_in_two_passes_continues_a_run_of_two(single, digits):
    train(digits, single, "passes", "--steps=7", *GUIDED, ranks=2)
    done = train(digits, single, "passes", *STEPS, *GUIDED, "--resume=auto", "--accumulation=2")
    assert "restarts" not in done.stderr
    assert_near(weights(single, "passes"), weights(single, "single"))


def test_one_rank_mesh_equals_no_mesh():
    for row in check_one_rank(torch.device("cpu")):
        assert row["error"] == 0, row


def test_one_rank_mesh_and_no_mesh_continue_each_other(digits, tmp_path):
    def run(name, *args):
        command = ("mfengine.train", *SMALL, *GUIDED, f"--data={digits}", f"--name={name}", "--resume=auto", *args)
        done = run_command(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    run("alone", "--steps=6")
    for steps, shard in ((2, "auto"), (4, "always"), (6, "auto")):
        run("to and from", f"--steps={steps}", f"--shard={shard}")
    expected, actual = (checkpoint_contents(tmp_path / "runs" / name) for name in ("alone", "to and from"))
    for key, value in expected.items():
        assert torch.equal(actual[key], value) if isinstance(value, torch.Tensor) else actual[key] == value, key


@pytest.mark.forks
def test_error_on_every_rank_is_reported_once(digits, tmp_path):
    done = run_command("mfengine.train", *SMALL, f"--data={digits}", "--batch-size=33", cwd=tmp_path, ranks=2)
    assert done.returncode != 0
    line = "error: --batch-size 33 is not a multiple of ranks x --accumulation = 2 x 1"
    assert done.stderr.splitlines().count(line) == 1
    assert done.stderr.splitlines()[-2].endswith(f"traceback : {line}")  # torchrun's own report comes last


def write_bad(folder, make):
    """64 samples in two shards, one per rank; `make(i)` is the mean of the i-th sample written."""
    space = LatentSpace(shape=(1, 8, 8), num_classes=10)
    moments = np.empty((64, 1, 2, 1, 8, 8))
    for i, sample in enumerate(order(64, 0)):
        moments[sample] = make(i)
    return write_dataset(folder, ArraySamples("bad", space, moments, np.arange(64) % 10), shard_samples=32)


@pytest.mark.slow
def test_loss_that_is_not_finite_on_one_rank(tmp_path):
    write_bad(tmp_path / "bad", lambda i: np.inf if i >= 32 else 0)
    args = ("mfengine.train", *SMALL, "--data=bad", "--steps=3", "--evaluate-every=0")
    done = run_command(*args, cwd=tmp_path, ranks=2)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith("error: the loss is not finite at step 1 on rank 1, after 0 skipped step(s)")
    done = run_command(*args, "--name=lenient", "--max-skipped-steps=3", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    model, *_ = load_model(tmp_path / "runs/lenient")
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_unreadable_data_on_one_rank(tmp_path):
    dataset = write_bad(tmp_path / "bad", lambda i: 0)
    index = dataset.folder / "000001.idx"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([*lines[:2], *["moments 99999999 256 x label 0 4 y"] * 31]) + "\n")
    done = run_command("mfengine.train", *SMALL, "--data=bad", "--steps=3", cwd=tmp_path, ranks=2)
    assert done.returncode != 0
    assert "cannot read bad: Malformed index file" in done.stderr


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_allocator_uses_expandable_segments_unless_told_otherwise(name, monkeypatch):
    at_start = []
    monkeypatch.setattr(os, "environ", {} if name is None else {name: "max_split_size_mb:64"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: at_start.append(dict(os.environ)))
    with world("cuda"):
        pass
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if name is None else {name: "max_split_size_mb:64"}
    assert at_start == [expected]


@pytest.mark.slow
def test_checks_on_two_ranks(host_library, tmp_path):
    """The checks in rank_worker.py, one after the other in one process group."""
    done = run_command("rank_worker", host_library.path, cwd=tmp_path, ranks=2, env={})  # torchrun itself
    assert done.returncode == 0, done.stderr
    passed = [line.removeprefix("passed ") for line in done.stdout.splitlines() if line.startswith("passed ")]
    assert sorted(passed) == sorted(2 * [check.__name__ for check in CHECKS])
