"""Networks and objectives from outside mfengine, through all commands; sweeps; and runs of version 0.1."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import run_command
from PIL import Image
from safetensors import safe_open

from mfengine import evaluate
from mfengine.engine.checkpoint import newest_checkpoint
from mfengine.engine.presets import PRESETS
from mfengine.engine.weights import load_model
from mfengine.evaluation import sweep
from mfengine.evaluation.samples import SampleSet
from mfengine.methods import OBJECTIVES
from mfengine.networks import NETWORKS

V01 = Path(__file__).parent / "v01"


@pytest.fixture
def run(tmp_path):
    """Run `python -m user_script COMMAND ...` in this process."""
    kept = [(table, dict(table)) for table in (NETWORKS, OBJECTIVES, PRESETS)]
    yield lambda *args: run_command("user_script", *args, cwd=tmp_path)
    for table, before in kept:
        table.clear()
        table.update(before)


def succeed(done):
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_external_network_through_all_commands(run, digits, tmp_path):
    """It has two heads, one of which samples, a condition besides the label, and parameters outside all units."""
    train = ("mfengine.train", "sketch", f"--data={digits}", "--model.width=8", "--sample-every=2", "--log-every=1")
    out, _ = succeed(run(*train, "--dry-run", "--ranks=2", "--reshard"))
    assert "6 x all-gather over 2 ranks" in out  # three groups, each for forward and backward
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
    for conditions, message in (
        (("strenth", "9"), "there is no condition strenth; the nearest is strength, all are strength, t_min"),
        (("t_min", "9"), "t_min must be between 0 and 1, not 9.0"),
    ):
        done = run("mfengine.generate", "runs/sketch", "--conditions", *conditions)
        assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
    _, err = succeed(run(*train, "--steps=1", "--name=again", "--init=model.safetensors"))
    assert "model.safetensors leaves v_head.weight, v_head.bias as initialised" in err


# ----------------------------------------------------------------------------
# Sweeps.

SWEEP = ("--num-samples=80", "--sweep", "strength=0,9", "t_min=0.6,2", "steps=1,2", "ema_decay=0.5,0.9")
ROWS = 8  # t_min 2 is rejected


@pytest.fixture
def swept(run, digits, tmp_path):
    """A run with two moving averages, and a function that sweeps over it with further options."""
    shutil.copytree(digits, tmp_path / "data")
    path = tmp_path / "data/dataset.json"
    description = read(path)
    del description["space"]["pixel_range"]  # skips reading labels, the slowest part
    path.write_text(json.dumps(description))
    succeed(run("mfengine.train", "sketch", "--data=data", "--steps=3", "--sample-every=0",
                "--optim.ema-decays", "0.9", "0.5"))  # fmt: skip
    return lambda *args: run("mfengine.evaluate", "runs/sketch", "--data=data", *(args or SWEEP))


def read(path):
    return json.loads(path.read_text())


def test_sweep_shows_the_best_first(swept, run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    out, err = succeed(swept())
    assert "note: 8 combination(s) left out, such as strength 0, t_min 2, steps 1, ema_decay 0.5: t_min must be" in err
    assert f"row {ROWS} of {ROWS}: 100%" in err
    rows = read(tmp_path / "runs/sketch/sweep.json")
    distances = [row["frechet"] for row in rows]
    assert len(set(distances)) == ROWS
    assert distances == sorted(distances)
    best = rows[0]
    shown = [f"{best['conditions']['strength']:g}", f"{best['conditions']['t_min']:g}", str(best["steps"])]
    head, first, *_ = (line.split() for line in out.splitlines())
    assert head == ["strength", "t_min", "steps", "ema_decay", "frechet"]
    assert first[:5] == [*shown, f"{best['ema_decay']:g}", f"{min(distances):.4g}"]
    assert Image.open(tmp_path / "runs/sketch/sweep.png").format == "PNG"

    conditions = [str(part) for pair in best["conditions"].items() for part in pair]
    succeed(run("mfengine.evaluate", "runs/sketch", "--data=data", "--num=80", "--steps", best["steps"],
                "--ema-decay", best["ema_decay"], "--conditions", *conditions))  # fmt: skip
    alone = read(tmp_path / "runs/sketch/metrics.json")
    assert alone[f"frechet_{best['steps']}nfe"] == pytest.approx(best["frechet"], rel=1e-9)
    assert alone["frechet_floor"] == best["frechet_floor"]


def test_killed_sweep_continues(swept, tmp_path, monkeypatch):
    """Existing rows are not repeated; weights are read once per average, and the data once."""
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    drawn, read_weights, begun = [], [], []
    draw, load, evaluation = SampleSet.draw, evaluate.load_model, evaluate.Evaluation

    def draw_some(samples, model, steps, world):
        if len(drawn) == stop:
            raise KeyboardInterrupt
        drawn.append(steps)
        return draw(samples, model, steps, world)

    monkeypatch.setattr(SampleSet, "draw", draw_some)
    monkeypatch.setattr(evaluate, "load_model", lambda *args: read_weights.append(args[1]) or load(*args))
    monkeypatch.setattr(evaluate, "Evaluation", lambda *a, **k: begun.append(1) or evaluation(*a, **k))
    path, stop = tmp_path / "runs/sketch/sweep.json", 3
    assert swept().returncode == 130
    kept = read(path)
    assert len(kept) == 3
    stop = None
    out, _ = succeed(swept())
    assert (len(drawn), read_weights, len(begun)) == (ROWS, [0.5, 0.5, 0.9], 2)
    rows = read(path)
    assert len(rows) == ROWS
    assert all(row in rows for row in kept)

    again, _ = succeed(swept())
    assert (again, len(drawn), len(begun), read(path)) == (out, ROWS, 2, rows)
    succeed(swept(*SWEEP, "--seed=1", "--steps", "1"))  # other samples: their rows come first, and old rows stay
    assert (len(drawn), read(path)[ROWS:]) == (2 * ROWS, rows)


def test_heat_map_shows_the_best_over_other_settings(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    axes = {"steps": (1, 2), "omega": (1.0, 2.0, 4.0), "t_min": (0.0, 0.5, 1.0, 1.5)}
    rows = [
        {"steps": steps, "conditions": {"omega": omega, "t_min": t_min}, "fid": 10 * i + j + steps}
        for i, omega in enumerate(axes["omega"])
        for j, t_min in enumerate(axes["t_min"])
        for steps in axes["steps"]
        if (omega, t_min) != (4, 1.5)
    ]
    shown, best = sweep.best_cells(rows, axes, "fid")
    assert shown == ["t_min", "omega"]
    assert best.tolist() == [[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, None]]
    for some in (axes, {"steps": (1, 2)}, {"steps": (1,)}):
        drawn = [row for row in rows if row["steps"] in some["steps"]]
        sweep.heat_map(drawn, some, "fid", tmp_path / "x.png")
        assert Image.open(tmp_path / "x.png").format == "PNG"


@pytest.mark.slow
def test_two_ranks_sweep_as_one(swept, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    args = ("--num-samples=80", "--batch-size=32", "--sweep", "strength=0,4", "ema_decay=0.5,0.9")
    succeed(swept(*args))
    one = read(tmp_path / "runs/sketch/sweep.json")
    done = run_command("user_script", "mfengine.evaluate", "runs/sketch", "--data=data", *args, "--out=two.json",
                       cwd=tmp_path, ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row, same in zip(read(tmp_path / "two.json"), one, strict=True):
        assert row.pop("frechet") == pytest.approx(same.pop("frechet"), rel=1e-8)
        assert row == same


def test_wrong_sweeps(swept, run, tmp_path):
    succeed(run("mfengine.export", "runs/sketch", "x.safetensors"))
    (tmp_path / "other.json").write_text('{"not": "rows"}')
    for args, message in (
        (("--sweep", "strenth=1"), "no setting to sweep strenth; the nearest is strength, all are strength, t_min, st"),
        (("--sweep", "t_min=2"), "no combination of --sweep can be drawn: t_min 2: t_min must be between 0 and 1"),
        (("--sweep", "t_min=1", "--conditions", "strenth", "2"), "no condition strenth; the nearest is strength"),
        (("--sweep", "strength=1", "--conditions", "strength", "2"), "strength is given twice: omit it from --sweep"),
        (("--sweep", "ema_decay=0.5", "--ema-decay=0.9"), "ema_decay is given twice: omit it from --sweep"),
        (("--sweep", "steps=1", "--out=other.json"), "other.json is not a list of rows written by a sweep"),
    ):
        done = swept(*args)
        assert (done.returncode, done.stderr.count("\n"), message in done.stderr) == (2, 1, True), done.stderr
    for args, message in (
        (("--sweep", "steps=1"), "x.safetensors is not in a run folder: give --out to name the file"),
        (("--sweep", "ema_decay=0.5", "--out=x.json"), "x.safetensors is an export with only one moving average"),
    ):
        done = run("mfengine.evaluate", "x.safetensors", "--data=data", *args)
        assert (done.returncode, done.stderr.count("\n"), message in done.stderr) == (2, 1, True), done.stderr


def test_sweep_without_matplotlib(swept, monkeypatch):
    monkeypatch.setattr("mfengine.evaluation.sweep.find_spec", lambda name: None)
    done = swept()
    assert (done.returncode, done.stderr) == (2, "error: --sweep needs matplotlib: pip install 'mfengine[bench]'\n")


def test_network_without_tangents_through_the_engine(run, digits):
    """It is counted and trained through `torch.func.jvp`."""
    train = ("mfengine.train", "plain", f"--data={digits}", "--sample-every=0")
    out, _ = succeed(run(*train, "--dry-run"))
    assert "TFLOP per step" in out
    succeed(run(*train, "--steps=2"))


@pytest.mark.slow
def test_external_network_on_two_ranks(digits, tmp_path):
    done = run_command("user_script", "mfengine.train", "sketch", f"--data={digits}", "--steps=2", "--reshard",
                       cwd=tmp_path, ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("key", "name", "nearest"), [("network", "dti", "dit"), ("objective", "minflow", "meanflow")])
def test_unknown_name_in_a_checkpoint(old, tmp_path, key, name, nearest):
    path = newest_checkpoint(old / "runs/a") / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: name}))
    args = ("mfengine.generate", old / "runs/a")
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert f"there is no {key} {name}; the nearest is {nearest}" in done.stderr
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------
# Version 0.1, whose files name neither network nor objective.


@pytest.fixture
def old(tmp_path):
    """A run of 4 steps written by version 0.1, and its export after 8 steps, which holds the expected averages."""
    with tarfile.open(V01 / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_run_of_version_01_continues(old, digits):
    """It reaches exactly the weights of version 0.1."""
    args = (
        "mfengine.train", "digits", f"--data={digits}", "--model.hidden-size=16", "--model.depth=1",
        "--model.num-heads=2", "--batch-size=32", "--sample-every=0", "--name=a", "--steps=8",
    )  # fmt: skip
    done = run_command(*args, "--resume=auto", "--model.depth=2", cwd=old)
    assert (done.returncode, "has a run with model.depth 1, not 2" in done.stderr) == (2, True)
    succeed(run_command(*args, "--resume=auto", cwd=old))
    reached, expected = (load_model(old / path) for path in ("runs/a", "b.safetensors"))
    assert expected.objective.conditions == {}
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(reached.model.state_dict()[name], value, rtol=0, atol=1e-6)
