"""The row plan against the plain algorithm, which computes every term for every row; its cost; its draws."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mfengine import DiT, MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.engine.presets import PRESETS
from mfengine.methods import OBJECTIVES
from mfengine.ops import use_attention


def small_model(**changes):
    torch.manual_seed(0)
    config = ModelConfig(**{"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "depth": 2,
                            "num_heads": 2, "num_classes": 3, **changes})  # fmt: skip
    model = DiT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def draw(method, batch, seed, size=4, channels=2):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, channels, size, size, generator=generator)
    labels = torch.randint(0, 3, (batch,), generator=generator)
    return latents, labels, method.draw(latents.shape, generator)


def algorithm(model, cfg, x, labels, draws):
    """The paper's algorithm as written: guidance and JVP for all rows."""
    t, r, e = draws.t, draws.r, draws.noise
    dropped = torch.arange(len(x)) < draws.num_dropped
    col = lambda a: a[:, None, None, None]  # noqa: E731
    z, v = (1 - col(t)) * x + col(t) * e, e - x
    null = torch.full_like(labels, model.num_classes)
    with torch.no_grad():
        zero = torch.zeros_like(t)
        inside = (t >= cfg.t_start) & (t <= cfg.t_end) & ~dropped
        guided = (
            cfg.omega * v
            + (1 - cfg.omega - cfg.kappa) * model(z, t, zero, null)
            + cfg.kappa * model(z, t, zero, labels)
        )
        v_g = torch.where(col(inside), guided, v)
    y = torch.where(dropped, null, labels)
    u, du_dt = torch.func.jvp(
        lambda z, t, r: model(z, t, t - r, y), (z, t, r), (v_g, torch.ones_like(t), torch.zeros_like(r))
    )
    target = (v_g - col((t - r).clamp(0, 1)) * du_dt).detach()
    error = (u - target).square().flatten(1).sum(1)
    return (error / (error.detach() + cfg.norm_eps) ** cfg.norm_p).mean(), v_g, u, du_dt


CONFIGS = {
    "unguided": MeanFlowConfig(),
    "omega and kappa": MeanFlowConfig(omega=0.2, kappa=0.92, t_end=0.75),
    "omega": MeanFlowConfig(omega=2.0, t_start=0.3, t_end=0.6),
    "kappa": MeanFlowConfig(omega=1.0, kappa=0.5, norm_p=0.75),
    "no unconditional term": MeanFlowConfig(omega=0.5, kappa=0.5),
    "all rows have an interval": MeanFlowConfig(omega=0.2, kappa=0.92, interval_share=1.0, label_dropout=0.4),
    "dropped rows among interval rows": MeanFlowConfig(omega=1.5, kappa=0.3, interval_share=0.75, label_dropout=0.6),
    "nothing is in the guided range": MeanFlowConfig(omega=2.0, t_start=1.0, t_end=1.0),
    "plain flow matching": MeanFlowConfig(interval_share=0.0),
    "guided flow matching": MeanFlowConfig(omega=1.0, kappa=0.5, interval_share=0.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_row_plan_equals_the_plain_algorithm(name):
    cfg = CONFIGS[name]
    model, method = small_model(), MeanFlow(cfg)
    latents, labels, draws = draw(method, 12, seed=3)
    kept = labels.clone()
    loss, metrics = method.loss(model, latents, labels, draws)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected, v_g, u, du_dt = algorithm(model, cfg, latents, labels, draws)
    expected.backward()
    rows = cfg.num_interval(12)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["v_g"], v_g, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["u"], u.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["du_dt"], du_dt.detach()[12 - rows :], rtol=1e-3, atol=1e-4)
    scale = max(p.grad.norm() for p in model.parameters())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (gradient - p.grad).norm() < 1e-5 * scale
    assert torch.equal(labels, kept)  # the caller's labels are unchanged


class CallRecorder:
    """A network that records which calls carry tangents."""

    def __init__(self):
        self.network, self.calls = small_model(depth=1), []
        self.num_classes = self.network.num_classes

    def __call__(self, *args, **tangents):
        self.calls.append(bool(tangents))
        return self.network(*args, **tangents)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_batch_makes_the_same_sequence_of_calls(name):
    """Sharded ranks must gather together, whatever rows they drew."""
    method, calls = MeanFlow(CONFIGS[name]), set()
    for seed in range(8):
        model = CallRecorder()
        method.loss(model, *draw(method, 4, seed))
        calls.add(tuple(model.calls))
    assert len(calls) == 1


# ----------------------------------------------------------------------------
# Cost, in F: the FLOPs of one forward pass of one sample.


@use_attention("torch")  # PyTorch's counter does not support flash attention on a CPU
def counted_cost(cfg, batch=256):
    model = small_model(input_size=8, hidden_size=48, depth=4, num_heads=4)
    method = MeanFlow(cfg)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(torch.randn(1, 2, 8, 8), torch.rand(1), torch.rand(1), torch.zeros(1, dtype=torch.long))
    costs = []
    for seed in range(4):
        inputs = draw(method, batch, seed, size=8)
        with FlopCounterMode(display=False) as step:
            method.loss(model, *inputs)[0].backward()
        costs.append(step.get_total_flops() / forward.get_total_flops() / batch)
    return sum(costs) / len(costs)


@pytest.mark.slow  # `test_flops.py` checks the cost by its formula
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("xl2", 4.0, 4.5), ("l2", 4.0, 4.5), ("unguided", 3.0, 3.4), ("flow matching", 2.8, 3.05)],
)
def test_cost_of_a_step(name, low, high):
    cfg = {"unguided": MeanFlowConfig(), "flow matching": MeanFlowConfig(interval_share=0)}.get(name)
    cost = counted_cost(cfg or PRESETS[name][1].method)
    print(f"{name}: {cost:.2f} F per sample")
    assert low <= cost <= high


# ----------------------------------------------------------------------------
# Draws.


def test_draws_follow_their_distributions():
    method = MeanFlow(MeanFlowConfig())
    draws = method.draw((40_000, 1, 2, 2), torch.Generator().manual_seed(0))
    assert torch.equal(draws.t[:30_000], draws.r[:30_000])
    assert (draws.t[30_000:] > draws.r[30_000:]).all()
    logit = torch.logit(draws.t)  # the larger of two normals: mean -0.4 + 1 / sqrt(pi)
    assert logit.mean() == pytest.approx(-0.4 + 1 / math.sqrt(math.pi), abs=0.02)
    assert draws.num_dropped == pytest.approx(4_000, abs=200)
    assert draws.noise.mean().abs() < 0.02
    assert draws.noise.std() == pytest.approx(1, abs=0.01)


def test_draws_follow_from_the_generator():
    method = MeanFlow(MeanFlowConfig())
    a, b = (method.draw((8, 1, 2, 2), torch.Generator().manual_seed(5)) for _ in range(2))
    assert a.num_dropped == b.num_dropped
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_batch_that_the_share_does_not_divide():
    with pytest.raises(ValueError, match=r"interval share of 0\.25 does not divide a local batch of 10"):
        MeanFlow(MeanFlowConfig()).draw((10, 1, 2, 2), torch.Generator())


@pytest.mark.parametrize(
    ("field", "value"), [("interval_share", 1.5), ("label_dropout", -0.1), ("kappa", -1.0), ("norm_eps", 0.0)]
)
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(MeanFlowConfig(), **{field: value})


@pytest.mark.parametrize("name", ["labels", "draws.t", "draws.noise"])
@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_rows_of_another_batch_raise(objective, name):
    """A single row would broadcast: training on wrong times, noise or labels without a word."""
    method = objective(objective.Config())
    latents, labels, draws = draw(method, 4, seed=0)
    if name == "labels":
        labels = labels[:1]
    else:
        field = name.removeprefix("draws.")
        draws = draws._replace(**{field: getattr(draws, field)[:1]})
    with pytest.raises(ValueError, match=rf"^{name} must be of shape \("):
        method.loss(small_model(), latents, labels, draws)
