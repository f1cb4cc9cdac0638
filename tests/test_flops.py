"""The FLOP count that the progress line's MFU rests on is what PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mfengine import DiT, MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.engine.flops import forward_flops, step_flops
from mfengine.engine.rates import matrix_rate
from mfengine.ops import use_attention

CONFIG = ModelConfig(8, 2, 4, hidden_size=24, depth=3, num_heads=2, num_classes=3)


@pytest.fixture(autouse=True)
def _products_to_count():
    """PyTorch's counter knows no flash attention on a CPU."""
    with use_attention("torch"):
        yield


def test_forward():
    with FlopCounterMode(display=False) as counter:
        DiT(CONFIG)(torch.randn(1, 4, 8, 8), torch.rand(1), torch.rand(1), torch.tensor([0]))
    assert counter.get_total_flops() == forward_flops(CONFIG)


@pytest.mark.parametrize(
    "settings",
    [{"interval_share": 0.0}, {}, {"omega": 2.0}, {"omega": 0.5, "kappa": 0.5}, {"omega": 0.2, "kappa": 0.92}],
    ids=str,
)
def test_step(settings):
    config = MeanFlowConfig(label_dropout=0.0, **settings)  # and all t in range: every row is guided
    method, batch = MeanFlow(config), 16
    draws = method.draw((batch, 4, 8, 8), torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        loss, _ = method.loss(DiT(CONFIG), torch.randn(batch, 4, 8, 8), torch.zeros(batch, dtype=torch.long), draws)
        loss.backward()
    # The backward of the inputs themselves, z and the sinusoids, is not needed.
    first = 2 * (CONFIG.num_tokens * 16 * 24 + 2 * 256 * 24)
    assert counter.get_total_flops() == pytest.approx(batch * (step_flops(CONFIG, config) - first), rel=1e-12)


def test_share_of_guided_rows():
    config = MeanFlowConfig(omega=0.2, kappa=0.92, t_start=0.3, t_end=0.75, interval_share=0.0, label_dropout=0.0)
    draws = MeanFlow(config).draw((100_000, 1, 1, 1), torch.Generator().manual_seed(0))
    share = ((draws.t >= 0.3) & (draws.t <= 0.75)).double().mean()
    guidance = step_flops(CONFIG, config) / forward_flops(CONFIG) - 3
    assert guidance == pytest.approx(float(share), abs=0.005)


def test_matrix_rate_is_a_rate():
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32) < 1e14
