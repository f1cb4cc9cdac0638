"""The recipes of docs/backend.md run unchanged and do what they say; the commands on other pages parse."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import slow
from torch.distributed.run import get_args_parser

from benchmarks import scaling
from benchmarks.roofline import roofline
from mfengine import cli, evaluate, export, prepare, train
from mfengine.engine.flops import sample_flops, step_flops
from mfengine.engine.presets import PRESETS

PAGE = Path(__file__).parent.parent / "docs/backend.md"
RECIPES = dict(re.findall(r"^## Recipe: (.*?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))


def run(title):
    """The variables of a recipe after it ran."""
    names = {"__name__": "recipe"}
    exec(compile(RECIPES[title], f"{PAGE.name}: {title}", "exec"), names)
    return names


def class_means(names, labels):
    return [names["images"][names[labels] == label].mean().item() for label in (0, 1)]


def test_every_block_is_a_recipe():
    assert len(RECIPES) == PAGE.read_text().count("```python") == 4


@pytest.mark.slow
def test_meanflow_in_your_own_trainer():
    names = run("MeanFlow, your network, your trainer")
    assert class_means(names, "labels") == pytest.approx([-1, 1], abs=0.2)


def test_jvp_through_a_diffusers_model():
    pytest.importorskip("diffusers")
    names = run("a JVP through a diffusers model")
    assert names["error"] < 0.02
    assert (names["swapped"] - names["du_dt"]).norm() < 1e-5 * names["du_dt"].norm()
    assert all(p.grad is not None for p in names["model"].transformer_blocks.parameters())


@pytest.mark.slow
def test_consistency_with_the_tangent_normalised():
    names = run("continuous-time consistency, with the tangent normalised")
    assert class_means(names, "y") == pytest.approx([-0.5, 0.5], abs=0.1)


@pytest.mark.slow
def test_terminal_velocity_matching_through_the_tangent():
    names = run("terminal velocity matching, through the tangent")
    assert class_means(names, "labels") == pytest.approx([-1, 1], abs=0.15)
    assert names["dF"].requires_grad


# ----------------------------------------------------------------------------
# docs/recipes.md and docs/cluster.md: every command parses, with the commands' own parsers and torchrun's.

DOCS = PAGE.parent
RECIPES_PAGE = (DOCS / "recipes.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in RECIPES_PAGE.splitlines()
    if "`mfengine.train" in line and line.startswith("|")
]
ROWS, IMPROVED_ROWS = ([row for row in ROWS if ("iMF" in row[0]) == improved] for improved in (False, True))


def commands(page):
    """Commands on a page as lists of words: indented lines, and code in tables that begins with a command's name."""
    text = (DOCS / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(\S.*)$", text, re.M) + re.findall(r"^\|.*`(mfengine\.\w+ [^`]*)`", text, re.M)
    return [shlex.split(line) for line in lines if "mfengine." in line]


def parse(words):
    """Parse a command with the parser of what it runs; returns the module and its parsed arguments."""
    if words[0] == "sbatch":
        words = words[words.index("scripts/slurm/run.sh") + 1 :]
    elif words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        assert given.module
        words = [given.training_script, *given.training_script_args]
    elif words[:2] == ["python", "-m"]:
        words = words[2:]
    module, *args = words
    if module == "mfengine.train":
        return module, train.parse(args)
    if module == "mfengine.prepare":
        return module, cli.parse(prepare.COMMANDS[args[0]][1], args[1:], module)
    if module == "mfengine.export":
        return module, cli.parse(export.ExportArgs, args, module)
    assert module == "mfengine.evaluate"
    return module, cli.parse(evaluate.EvaluateArgs, args, module)


@pytest.mark.parametrize(
    "words", [pytest.param(c, id=f"{p}: {' '.join(c)}") for p in ("recipes.md", "cluster.md") for c in commands(p)]
)
def test_command_parses(words):
    parse(words)


def test_commands_are_found():
    assert len(ROWS) == 8
    assert len(IMPROVED_ROWS) == 4
    assert len(commands("recipes.md")) == len(ROWS) + len(IMPROVED_ROWS) + 8
    assert len(commands("cluster.md")) >= 8


def test_rows_match_the_paper():
    runs = [parse(shlex.split(row[1].strip("`")))[1].run for row in ROWS]
    assert len({run.name for run in runs}) == len(runs)  # no run overwrites another
    assert [run.epochs for run in runs] == [80, 80, 80, 240, 240, 240, 240, 1000]
    assert [run.model.patch_size for run in runs] == [4] * 3 + [2] * 5
    assert [(run.method.omega, run.method.kappa) for run in runs[:4]] == [(1, 0), (2, 0), (1, 0.5), (1, 0.5)]
    assert [run.method.guided for run in runs] == [False] + [True] * 7
    assert [float(row[2].split(",")[0]) for row in ROWS] == [61.1, 20.2, 19.2, 6.17, 5.01, 3.84, 3.43, 2.20]
    assert all((run.batch_size, run.optim.lr) == (256, 1e-4) for run in runs)
    for row, run in zip(ROWS, runs, strict=True):
        assert f"{run.epochs:g} epochs" in row[0] or run.epochs == 1000
        assert float(row[4].replace(",", "")) == pytest.approx(8 * float(row[3]), abs=0.9)


def test_rows_of_improved_meanflow_match_the_paper():
    runs = [parse(shlex.split(row[1].strip("`")))[1].run for row in IMPROVED_ROWS]
    assert [float(row[2].split(",")[0]) for row in IMPROVED_ROWS] == [3.39, 2.27, 1.86, 1.72]
    for run in runs:
        assert (run.batch_size, run.epochs, run.optim.lr, run.optim.warmup_epochs) == (1024, 640, 1e-4, 10)
        assert run.normalisation == "sd-vae-ft-mse"


@pytest.mark.slow
@pytest.mark.parametrize("row", IMPROVED_ROWS)
def test_costs_of_improved_meanflow_are_counted(row):
    run = parse(shlex.split(row[1].strip("`")))[1].run
    cost = step_flops(run.model, run.method, 128) / sample_flops(run.model, run.method)
    assert float(row[6]) == pytest.approx(cost, abs=0.03)


@pytest.mark.parametrize("preset", ["b2", slow("imf-b2")])
def test_modelled_times_match_the_model(preset):
    """One row of each table, because all rows are made the same way."""
    row = next(row for row in (*ROWS, *IMPROVED_ROWS) if row[1] == f"`mfengine.train {preset}`")
    config = PRESETS[preset][1]
    for cell, hardware in ((row[4], scaling.Hardware()), (row[5], scaling.Hardware(roofline_share=0.5))):
        planned = scaling.plan(config, 8, "gathered once", config.local_batch(8), hardware)
        step = roofline(config.model, config.method, config.local_batch(8), "h200", hardware, gathered=True)
        point = scaling.model_point(planned, "gathered once", step, hardware)
        assert float(cell) == pytest.approx(point.gpu_hours(config.epochs), rel=0.02)
