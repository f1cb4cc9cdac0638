"""Networks and objectives that the engine does not know: through all commands; and what version 0.1 left behind."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import run_command, run_in_process
from safetensors import safe_open

from mfengine.engine.checkpoint import load_model, newest_checkpoint
from mfengine.engine.presets import PRESETS
from mfengine.methods import OBJECTIVES
from mfengine.networks import NETWORKS

V01 = Path(__file__).parent / "v01"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`python -m sketch COMMAND ...` in this process: (exit code, stdout, stderr)."""
    kept = [(table, dict(table)) for table in (NETWORKS, OBJECTIVES, PRESETS)]
    yield lambda *args: run_in_process("sketch", *args, cwd=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    for table, before in kept:
        table.clear()
        table.update(before)


def succeed(done):
    code, out, err = done
    assert code == 0, err
    return out, err


def test_sketch_through_all_commands(run, digits, tmp_path):
    """Two heads, one of which samples; a condition beside the label; parameters that no unit holds."""
    train = ("mfengine.train", "sketch", f"--data={digits}", "--model.width=8", "--sample-every=2", "--log-every=1")
    out, _ = succeed(run(*train, "--dry-run", "--ranks=2", "--reshard"))
    assert "6 x all-gather over 2 ranks" in out  # three groups, for forward and backward
    assert "ready to start" in out
    _, err = succeed(run(*train, "--steps=2", "--evaluate-every=2"))
    assert "runs/sketch: sketch by two-heads, 0.0 M parameters" in err
    out, _ = succeed(run(*train, "--steps=4", "--resume=auto", "--dry-run"))
    assert "ready to continue at step 2" in out
    succeed(run(*train, "--steps=4", "--resume=auto"))

    folder = tmp_path / "runs/sketch"
    config = json.loads((folder / "config.json").read_text())
    assert (config["network"], config["model"]["width"], config["objective"]) == ("sketch", 8, "two-heads")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] == pytest.approx(line["loss_u"] + line["loss_v"]) for line in lines if "loss" in line)
    description = json.loads((newest_checkpoint(folder) / "checkpoint.json").read_text())
    assert (description["network"], description["objective"]) == ("sketch", "two-heads")

    succeed(run("mfengine.export", "runs/sketch", "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any(name.startswith("v_head") for name in file.keys())  # noqa: SIM118
    pictures = []
    for source, more in (
        ("runs/sketch", ()),
        ("model.safetensors", ()),
        ("runs/sketch", ("--conditions", "strength", "9")),
    ):
        succeed(run("mfengine.generate", source, "--per-label=2", *more))
        pictures.append((tmp_path / "samples.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    out, _ = succeed(
        run("mfengine.evaluate", "model.safetensors", f"--data={digits}", "--num=80", "--conditions", "strength", "9")
    )
    assert "frechet_1nfe" in out
    code, _, err = run("mfengine.generate", "runs/sketch", "--conditions", "strenth", "9")
    assert (code, err) == (2, "error: there is no condition strenth; the nearest is strength, all are strength\n")
    _, err = succeed(run(*train, "--steps=1", "--name=again", "--init=model.safetensors"))
    assert "model.safetensors leaves v_head.weight, v_head.bias as initialised" in err


def test_network_without_tangents_through_the_engine(run, digits):
    """Counted and trained through `torch.func.jvp`."""
    train = ("mfengine.train", "plain", f"--data={digits}", "--sample-every=0")
    out, _ = succeed(run(*train, "--dry-run"))
    assert "TFLOP per step" in out
    succeed(run(*train, "--steps=2"))


def test_two_ranks(digits, tmp_path):
    done = run_command("sketch", "mfengine.train", "sketch", f"--data={digits}", "--steps=2", "--reshard", cwd=tmp_path,
                       ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("key", "name", "nearest"), [("network", "dti", "dit"), ("objective", "minflow", "meanflow")])
def test_unknown_name_in_a_checkpoint(old, tmp_path, monkeypatch, capsys, key, name, nearest):
    path = newest_checkpoint(old / "runs/a") / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: name}))
    args = ("mfengine.generate", old / "runs/a")
    code, _, err = run_in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert f"there is no {key} {name}; the nearest is {nearest}" in err
    assert err.count("\n") == 1


# ----------------------------------------------------------------------------
# Version 0.1, which named neither network nor objective.


@pytest.fixture
def old(tmp_path):
    """A run of 4 steps as version 0.1 wrote it, and its export after 8 steps: averages to reach."""
    with tarfile.open(V01 / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_run_of_version_01_goes_on(old, digits, monkeypatch, capsys):
    """To the very weights that version 0.1 came to."""
    args = (
        "mfengine.train", "digits", f"--data={digits}", "--model.hidden-size=16", "--model.depth=1",
        "--model.num-heads=2", "--batch-size=32", "--sample-every=0", "--name=a", "--steps=8",
    )  # fmt: skip
    where = {"cwd": old, "monkeypatch": monkeypatch, "capsys": capsys}
    code, _, err = run_in_process(*args, "--resume=auto", "--model.depth=2", **where)
    assert (code, "has a run with model.depth 1, not 2" in err) == (2, True)
    succeed(run_in_process(*args, "--resume=auto", **where))
    reached, expected = (load_model(old / path) for path in ("runs/a", "b.safetensors"))
    assert expected.objective.conditions == {}
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(reached.model.state_dict()[name], value, rtol=0, atol=1e-6)
