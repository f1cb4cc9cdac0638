"""Counts of a training step without a GPU, and its time by pass; `--guard` compares the counts exactly."""

import itertools

import pytest
import torch

from benchmarks.cases import UPDATES
from benchmarks.counts import count, count_optimizer, count_roofline
from benchmarks.split import guided_split
from benchmarks.workload import IMPROVED, OBJECTIVES
from mfengine.engine.presets import PRESETS
from mfengine.ranks import World


@pytest.mark.parametrize(
    ("preset", "objective", "name"),
    [
        *itertools.product(["b2", "l2", "xl2"], OBJECTIVES, ["mfengine", "port"]),
        *itertools.product(["imf-b2", "imf-xl2"], IMPROVED, ["mfengine"]),
    ],
)
def test_counts(preset, objective, name, session):
    counts = count(PRESETS[preset][1].model, (OBJECTIVES | IMPROVED)[objective], name)
    session.counts[f"{preset}, {objective}, {name}"] = counts
    assert counts["forwards"] >= 3 - 1e-3
    assert counts.get("host_waits", 0) == 0


@pytest.mark.parametrize(
    ("preset", "rows"),
    [("b2", 32), ("b2", 256), ("xl2", 32), ("xl2", 256), ("imf-b2", 128), ("imf-xl2", 32), ("imf-xl2", 128)],
)
def test_roofline(preset, rows, session):
    counts = count_roofline(PRESETS[preset][1], rows)
    session.counts[f"roofline, {preset} of {rows}"] = counts
    assert counts["launches"] < counts["operators"]


@pytest.mark.parametrize("name", ["mfengine", "pair"])
@pytest.mark.parametrize("update", UPDATES)
def test_optimizer(update, name, session):
    counts = session.counts[f"optimizer{update.label}, {name}"] = count_optimizer(name, update)
    assert counts["bytes_per_parameter"] >= 36


@pytest.mark.parametrize("preset", ["b2", "xl2"])
def test_split(preset, session):
    gpu = session.machine.gpu
    if not gpu and preset != "xl2":
        pytest.skip("in miniature, all networks are alike")
    for batch in (32, 256) if gpu else (16,):
        world = World(0, 1, torch.device("cuda", 0) if gpu else torch.device("cpu"))
        found = guided_split(session.machine.model(preset), batch, world)
        session.splits[f"{session.machine.name(preset)} of {batch}"] = found
        assert 0 < found["primal"] < found["step"]
