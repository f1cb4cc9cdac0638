"""The recipes of docs/backend.md run as they stand, and do what they say."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs/backend.md"
RECIPES = dict(re.findall(r"^## Recipe: (.*?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))


def run(title):
    """What a recipe leaves behind, by name."""
    names = {"__name__": "recipe"}
    exec(compile(RECIPES[title], f"{PAGE.name}: {title}", "exec"), names)
    return names


def class_means(names, labels):
    return [names["images"][names[labels] == label].mean().item() for label in (0, 1)]


def test_every_block_is_a_recipe():
    assert len(RECIPES) == PAGE.read_text().count("```python") == 3


def test_meanflow_in_a_trainer_of_ones_own():
    names = run("MeanFlow, your network, your trainer")
    assert class_means(names, "labels") == pytest.approx([-1, 1], abs=0.2)


def test_jvp_through_a_diffusers_model():
    pytest.importorskip("diffusers")
    names = run("a JVP through a diffusers model")
    assert names["error"] < 0.02
    assert (names["swapped"] - names["du_dt"]).norm() < 1e-5 * names["du_dt"].norm()
    assert all(p.grad is not None for p in names["model"].transformer_blocks.parameters())


def test_consistency_with_the_tangent_normalised():
    names = run("continuous-time consistency, with the tangent normalised")
    assert class_means(names, "y") == pytest.approx([-0.5, 0.5], abs=0.1)
