"""The counted FLOPs, on which the progress line's MFU is based, against the method's own arithmetic."""

import dataclasses

import pytest
import torch
from conftest import slow

from mfengine import MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.engine.flops import sample_flops, step_flops
from mfengine.engine.rates import matrix_rate

CONFIG = ModelConfig(8, 2, 4, hidden_size=24, depth=3, num_heads=2, num_classes=3)
WIDTH, TOKENS, FEATURES, PATCH = 24, 16, 256, 16
ATTENTION = 3 * 2 * 2 * TOKENS**2 * WIDTH
FORWARD = (
    TOKENS * (3 * 2 * 12 * WIDTH**2 + 2 * 2 * PATCH * WIDTH)
    + ATTENTION
    + 3 * 2 * 6 * WIDTH**2 + 2 * 2 * WIDTH**2 + 2 * 2 * (FEATURES * WIDTH + WIDTH**2)
)  # fmt: skip
INPUTS = 2 * (TOKENS * PATCH * WIDTH + 2 * FEATURES * WIDTH)  # inputs z and sinusoids, which need no gradient


def test_sample_is_one_forward():
    assert sample_flops(CONFIG, MeanFlowConfig()) == FORWARD


@pytest.mark.parametrize(
    ("settings", "guidance"),
    [
        ({"interval_share": 0.0}, 0),
        slow({}, 0),
        slow({"omega": 2.0}, 1),
        ({"omega": 0.5, "kappa": 0.5}, 0.25),  # the unconditional term has weight 0
        ({"omega": 0.2, "kappa": 0.92}, 1.25),
    ],
    ids=str,
)
def test_flops_of_a_step(settings, guidance):
    """Three forwards, the tangents of interval rows, and guidance; every row is guided."""
    config = MeanFlowConfig(label_dropout=0.0, **settings)
    tangents = config.interval_share * (FORWARD + ATTENTION)
    assert step_flops(CONFIG, config, 4) == pytest.approx((3 + guidance) * FORWARD - INPUTS + tangents, rel=1e-12)


def test_share_of_guided_rows():
    config = MeanFlowConfig(omega=0.2, kappa=0.92, t_start=0.3, t_end=0.75, interval_share=0.0, label_dropout=0.0)
    draws = MeanFlow(config).draw((100_000, 1, 1, 1), torch.Generator().manual_seed(1))
    share = ((draws.t >= 0.3) & (draws.t <= 0.75)).double().mean()
    unguided = dataclasses.replace(config, omega=1.0, kappa=0.0)
    guidance = (step_flops(CONFIG, config, 4) - step_flops(CONFIG, unguided, 4)) / FORWARD
    assert guidance == pytest.approx(float(share), abs=0.01)


def test_batch_that_is_not_a_power_of_two():
    assert step_flops(CONFIG, MeanFlowConfig(interval_share=1 / 3), 9) > 3 * FORWARD


def test_matrix_rate_is_a_rate():
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32) < 1e14
