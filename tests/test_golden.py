"""Agreement with the authors' own code: loss, intermediate values, gradients, training steps and samples."""

import copy

import pytest
import torch
from golden_cases import IMPROVED_NAMES, NAMES, golden_case, relative_error

from mfengine import sample
from mfengine.engine.config import OptimConfig
from mfengine.engine.optim import adamw_ema, averages

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[*NAMES, *IMPROVED_NAMES])
def case(request):
    return golden_case(request.param)


@pytest.fixture(scope="module")
def step(case):
    case.model.zero_grad()
    loss, metrics = case.method.loss(case.model, *case.batch("in"))
    loss.backward()
    return loss, metrics


def test_loss(case, step):
    assert relative_error(step[0].detach(), case.arrays["out/loss"]) < TOLERANCE


def test_intermediate(case, step):
    for name in case.intermediate:
        expected, actual = case.image(f"mid/{name}"), step[1][name]
        assert relative_error(actual, expected[len(expected) - len(actual) :]) < TOLERANCE, name


def test_metrics(case, step):
    for name in case.figures:
        assert relative_error(step[1][name], case.arrays[f"out/{name}"]) < TOLERANCE, name


def test_every_gradient(case, step):
    expected = case.parameters("grads")
    actual = {name: p.grad for name, p in case.model.named_parameters()}
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE, (worst, errors[worst])


@pytest.mark.parametrize("steps", [1, 2])
def test_samples(case, steps):
    model = copy.deepcopy(case.model)
    if "train/losses" in case.arrays:
        model.load_state_dict(case.parameters("train/params"))  # the last weights in the file
    labels = torch.from_numpy(case.arrays["sample/y"]).long()
    actual = sample(model, case.image("sample/z"), labels, steps, **case.conditions)
    assert relative_error(actual, case.image(f"sample/nfe{steps}")) < TOLERANCE


@pytest.mark.parametrize(("name", "steps"), [("guided_omega_train", 4), ("imf_train", 3)])
def test_training_steps(name, steps):
    case = golden_case(name)
    optimizer = adamw_ema(case.model, OptimConfig(lr=1e-3, ema_decays=(0.99,)))
    losses = []
    for step in range(steps):
        loss, _ = case.method.loss(case.model, *case.batch(f"step{step}"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert relative_error(losses, case.arrays["train/losses"]) < TOLERANCE
    weights = dict(case.model.named_parameters())
    for actual, expected in ((weights, "train/params"), (averages(case.model, optimizer, 0.99), "train/ema")):
        for name, value in case.parameters(expected).items():
            assert relative_error(actual[name].detach(), value) < TOLERANCE, (expected, name)
