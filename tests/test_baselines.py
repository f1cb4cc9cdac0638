"""The benchmarks' peers compute the paper's loss, at the expected cost."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from golden_cases import NAMES, GoldenCase, relative_error

from benchmarks.baselines.port import Port, PortDiT, jvp_flash_attention, plain_attention, sdpa
from benchmarks.counts import count
from benchmarks.workload import OBJECTIVES
from mfengine import MeanFlow, ModelConfig

TOLERANCE = 1e-5


def loss_and_gradients(port, network, inputs):
    loss = port.loss(network, *inputs)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return loss.detach(), dict(zip(dict(network.named_parameters()), gradients, strict=True))


def worst_error(actual, expected):
    """The largest relative error of the loss and of any parameter's gradient."""
    assert actual[1].keys() == expected[1].keys()
    gradients = [relative_error(actual[1][name].cpu(), expected[1][name].cpu()) for name in expected[1]]
    return max(relative_error(actual[0].cpu(), expected[0]), *gradients)


def golden(name):
    case = GoldenCase(name)
    network = PortDiT(case.model.config)
    network.load_state_dict(case.parameters("params"))
    return network, case.method.config, case.batch("in"), (case.arrays["out/loss"], case.parameters("grads"))


def random_case(config, device="cpu", batch=8):
    """A network with nonzero output, a guided objective, and a batch."""
    torch.manual_seed(0)
    network = PortDiT(config).to(device)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.05)
    objective = OBJECTIVES["guided"]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    labels = torch.randint(config.num_classes, (batch,), generator=generator)
    draws = MeanFlow(objective).draw(latents.shape, generator, device)
    return network, objective, (latents.to(device), labels.to(device), draws)


# ----------------------------------------------------------------------------
# Correctness.


@pytest.mark.parametrize("attention", [plain_attention, sdpa])
@pytest.mark.parametrize("name", NAMES)
def test_port_agrees_with_the_papers_own_code(name, attention):
    network, config, inputs, expected = golden(name)
    assert worst_error(loss_and_gradients(Port(config, attention=attention), network, inputs), expected) < TOLERANCE


def test_port_in_bfloat16_is_near_float32():
    """Guidance without gradient must not leave autocast with weights that have none."""
    network, config, inputs, expected = golden("guided_kappa")
    actual = loss_and_gradients(Port(config, torch.bfloat16), network, inputs)
    assert 1e-4 < worst_error(actual, expected) < 0.03


@pytest.mark.slow  # the eager port is compared above
def test_compiled_port_agrees_with_the_papers_own_code(monkeypatch):
    """With Dynamo and AOTAutograd, whose graphs could lose a JVP; Inductor takes a minute of C++ on two cores."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    network, config, inputs, expected = golden("guided_kappa")
    assert worst_error(loss_and_gradients(Port(config, compiled=True), network, inputs), expected) < TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; on a CPU Inductor's C++ takes a minute")
def test_port_compiled_by_inductor():
    network, objective, inputs = random_case(ModelConfig(8, 2, 4, 64, 2, 2, num_classes=10), "cuda")
    expected = loss_and_gradients(Port(objective), network, inputs)
    actual = loss_and_gradients(Port(objective, compiled=True), network, inputs)
    assert worst_error(actual, expected) < TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(not find_spec("jvp_flash_attention"), reason="needs the package jvp_flash_attention")
@pytest.mark.parametrize("dim", [64, 72])
def test_port_with_jvp_flash_attention(dim):
    """In bfloat16, against float32: the golden cases have fewer tokens than the package supports."""
    network, objective, inputs = random_case(ModelConfig(16, 2, 4, 2 * dim, 2, 2, num_classes=10), "cuda")
    expected = loss_and_gradients(Port(objective), network, inputs)
    flash = Port(objective, torch.bfloat16, jvp_attention=jvp_flash_attention, attention=sdpa)
    assert worst_error(loss_and_gradients(flash, network, inputs), expected) < 0.05


@pytest.mark.skipif(find_spec("jvp_flash_attention") is not None, reason="the package jvp_flash_attention is there")
def test_missing_jvp_flash_attention_is_an_import_error():
    q = torch.randn(1, 1, 32, 16)
    with pytest.raises(ImportError, match="jvp_flash_attention"):
        jvp_flash_attention(q, q, q)


# ----------------------------------------------------------------------------
# Cost, in forward passes of one sample.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "objective", "low", "high"),
    [
        ("mfengine", "flow matching", 3.0, 3.1),  # the backward computes attention's scores again
        ("mfengine", "unguided", 3.25, 3.4),
        ("mfengine", "guided", 4.1, 4.5),
        ("port", "flow matching", 2.99, 3.0),
        ("port", "unguided", 4.95, 5.0),  # PyTorch's JVP of a linear layer multiplies by the weight's zero tangent
        ("port", "guided", 6.3, 6.8),
    ],
)
def test_cost_of_a_step(implementation, objective, low, high):
    config = ModelConfig(16, 2, 4, hidden_size=384, depth=4, num_heads=6, num_classes=10)
    assert low <= count(config, OBJECTIVES[objective], implementation)["forwards"] <= high
