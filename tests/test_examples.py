"""The scripts of examples/ run, and their pictures show what docs/gallery.md says."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command
from PIL import Image

from mfengine import DiT, ModelConfig
from mfengine.data.pictures import labelled_grid
from mfengine.errors import InputError

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example in an empty folder, with other constants if given; returns its variables and its picture."""
    monkeypatch.chdir(tmp_path)

    def run(name, *args, **constants):
        monkeypatch.setattr(sys, "argv", [name, *args])
        names = {"__name__": "example"}
        exec(compile((EXAMPLES / f"{name}.py").read_text(), name, "exec"), names)
        if "main" in names:
            names.update(constants)
            names["main"](args)
        return names, np.asarray(Image.open(f"{name}.png").convert("L"), float)

    return run


def test_meanflow_in_40_lines(run):
    assert len((EXAMPLES / "meanflow.py").read_text().splitlines()) <= 40
    names, picture = run("meanflow", "15")
    assert picture.shape == (500, 500)
    assert picture.std() > 10
    assert names["metrics"]["v_loss"].mean() < 110  # 128 for a network that predicts nothing


@pytest.mark.slow
def test_meanflow_draws_its_labels(run):
    """According to the nearest image in the data."""
    names, _ = run("meanflow", "600")
    distances = names["digits"].flatten(1).unsqueeze(1) - names["images"].flatten(1)
    found = names["labels"][distances.square().sum(2).argmin(1)].view(10, 10)
    share = (found == found.new_tensor(range(10))[:, None]).float().mean().item()
    print(f"{share:.0%} of the samples are nearest to an image of their label")
    assert share > 0.8


@pytest.mark.slow
def test_jvp_of_a_diffusers_model_beats_finite_differences(run):
    pytest.importorskip("diffusers")
    names, picture = run("jvp_diffusers")
    assert names["distance"](names["du_dt"]) < 1e-5 < 1e-4 < min(names["errors"])
    assert names["distance"](names["accelerated"]) < 1e-5
    assert picture.shape == (350, 600)


@pytest.mark.slow
def test_sit_is_fine_tuned_to_one_step(run, digits):
    Path("data").mkdir()
    Path("data/digits").symlink_to(digits)
    rows = {}

    def keep(blocks, columns):
        rows.update(blocks)
        return labelled_grid(blocks, columns)

    run("finetune_sit", STEPS=300, labelled_grid=keep)
    blurred, *_, sharp = (images.std() for images in rows.values())
    assert blurred < 0.9 * sharp  # one step of the SiT is a mean; one step of the fine-tuned network is a digit


@pytest.mark.slow
def test_given_sit_checkpoint_is_used(run, digits, capsys):
    model = DiT(ModelConfig(8, 2, 1, hidden_size=384, depth=1, num_heads=6, num_classes=10))
    torch.save({name: p for name, p in model.state_dict().items() if "h_embedder" not in name}, "sit.pt")
    _, picture = run("finetune_sit", "sit.pt", str(digits), STEPS=1)
    assert picture.std() > 10
    assert "stand-in" not in capsys.readouterr().out
    with pytest.raises(InputError, match="a checkpoint and a data set, or no argument at all, not 1 argument"):
        run("finetune_sit", "sit.pt")


@pytest.mark.slow
def test_guidance_changes_samples_of_one_model(run, digits, tmp_path, capsys):
    done = run_command("mfengine.train", "digits-imf", "--data", digits, "--epochs", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names, picture = run("imf_guidance", SAMPLES=200)
    assert picture.std() > 10
    assert capsys.readouterr().out.count("Frechet distance") == len(names["OMEGAS"])
