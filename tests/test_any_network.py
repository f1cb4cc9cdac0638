"""The objective with networks that have no explicit tangents: agreement, calls, wrappers, errors."""

import pytest
import torch
from golden_cases import NAMES, GoldenCase, relative_error
from stock_network import StockNetwork
from torch import nn
from torch.utils.checkpoint import checkpoint

import mfengine
from benchmarks.baselines.port import sdpa
from mfengine import MeanFlow, MeanFlowConfig, ModelConfig

TOLERANCE = 1e-5
CONFIG = ModelConfig(4, 2, 2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
GUIDED = MeanFlowConfig(omega=0.2, kappa=0.92, t_end=0.75)


def stock_network(**kwargs):
    torch.manual_seed(0)
    network = StockNetwork(CONFIG, **kwargs)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.2)
    return network


def loss(network, config=GUIDED, seed=0, batch=8):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 2, 4, 4, generator=generator)
    labels = torch.randint(0, 3, (batch,), generator=generator)
    method = MeanFlow(config)
    return method.loss(network, latents, labels, method.draw(latents.shape, generator))


def gradients(network, parameters, **kwargs):
    return torch.autograd.grad(loss(network, **kwargs)[0], list(parameters))


@pytest.mark.parametrize("name", NAMES)
def test_agreement_with_the_papers_own_code(name):
    case = GoldenCase(name)
    network = StockNetwork(case.model.config)
    network.load_state_dict(case.parameters("params"))
    value, metrics = case.method.loss(network, *case.batch("in"))
    value.backward()
    assert relative_error(value.detach(), case.arrays["out/loss"]) < TOLERANCE
    for key in ("v_g", "u", "du_dt"):
        expected = case.image(f"mid/{key}")
        assert relative_error(metrics[key], expected[len(expected) - len(metrics[key]) :]) < TOLERANCE, key
        assert not metrics[key].requires_grad
    expected = case.parameters("grads")
    for key, p in network.named_parameters():
        assert relative_error(p.grad, expected[key]) < TOLERANCE, key


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_sequence_of_calls(share):
    """Only interval rows go through a JVP; the sequence of calls is always the same, and never has zero rows."""
    guidance, sequences = set(), set()
    for seed in range(8):
        network = stock_network()
        loss(network, MeanFlowConfig(omega=2.0, t_start=0.8, interval_share=share), seed)
        guidance.add(network.calls[0])
        sequences.add(tuple(network.calls[1:]))
    interval = int(8 * share)
    expected = [(rows, jvp) for rows, jvp in ((8 - interval, False), (interval, True)) if rows]
    assert sequences == {tuple(expected)}
    assert {jvp for _, jvp in guidance} == {False}
    assert len(guidance) > 1  # its number of rows varies


def test_zero_guided_rows():
    network = stock_network()
    config = MeanFlowConfig(omega=2.0, t_start=1.0)
    _, metrics = loss(network, config)
    assert network.calls[0] == (1, False)
    assert torch.equal(metrics["v_g"], loss(network, MeanFlowConfig())[1]["v_g"])


def test_plain_function_as_network():
    network = stock_network()

    def u(z, t, h, y):
        return network(z, t, h, y)

    u.num_classes = 3
    assert torch.equal(loss(u)[0], loss(network)[0])


@pytest.mark.slow
def test_compiled_network():
    """The compiled network runs without a JVP; under a JVP, the network inside runs uncompiled."""
    expected = gradients(reference := stock_network(), reference.parameters())
    network = stock_network()
    compiled = torch.compile(network, backend="eager")
    actual = gradients(compiled, network.parameters())
    assert max(map(relative_error, actual, expected)) < TOLERANCE


def test_pytorch_attention_inside_jvp_attention():
    expected = gradients(reference := stock_network(), reference.parameters())
    network = stock_network(attend=sdpa)
    with mfengine.jvp_attention():
        actual = gradients(network, network.parameters())
    assert max(map(relative_error, actual, expected)) < TOLERANCE


def test_autocast():
    """Every parameter gets a gradient, although guidance has cast the weights without one before."""
    expected = gradients(reference := stock_network(), reference.parameters())
    network = stock_network()
    with torch.autocast("cpu", torch.bfloat16):
        value, metrics = loss(network)
    assert metrics["u"].dtype == metrics["du_dt"].dtype == torch.float32
    actual = torch.autograd.grad(value, list(network.parameters()))
    total = [torch.cat([g.flatten() for g in gradients]) for gradients in (actual, expected)]
    assert relative_error(*total) < 0.05


# ----------------------------------------------------------------------------
# Errors, and the remedies in their messages.


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Around(nn.Module):
    """A network with a function applied to its output or its call."""

    num_classes = 3

    def __init__(self, around, **kwargs):
        super().__init__()
        self.network = stock_network(**kwargs)
        self.around = around

    def forward(self, *args):
        return self.around(self.network, *args)


JVP_ATTENTION = r"If this is attention, compute the loss inside `with mfengine.jvp_attention\(\):`"


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (lambda: Around(lambda u, *args: (u(*args),)), TypeError, "Around returned tuple; u.* must return one tensor"),
        (
            lambda: Around(lambda u, *args: u(*args).repeat(1, 2, 1, 1)),
            ValueError,
            r"Around returned \(6, 4, 4, 4\); u must have the shape of z, \(6, 2, 4, 4\)",
        ),
        (lambda: nn.Identity(), ValueError, r"Identity does not say .* set it: `model.num_classes = 1000`"),
        (
            lambda: stock_network(attend=sdpa),
            NotImplementedError,
            f"StockNetwork cannot be .*attention.*{JVP_ATTENTION}",
        ),
        (
            lambda: Around(lambda u, *args: Function.apply(u(*args))),
            NotImplementedError,
            "autograd.Function of your own, give it setup_context and jvp",
        ),
        (
            lambda: Around(lambda u, *args: checkpoint(u, *args, use_reentrant=False)),
            NotImplementedError,
            "activation checkpointing.* turn it off",
        ),
    ],
    ids=["tuple", "shape", "num_classes", "attention", "function", "checkpoint"],
)
def test_error_names_the_remedy(network, error, message):
    with pytest.raises(error, match=message):
        loss(network(), MeanFlowConfig())


def test_errors_of_the_network_are_not_rewritten():
    with pytest.raises(RuntimeError, match=r"^mine$"):
        loss(Around(raising), MeanFlowConfig(interval_share=1.0))


def raising(*args):
    raise RuntimeError("mine")
