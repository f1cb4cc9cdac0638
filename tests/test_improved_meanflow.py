"""Improved MeanFlow: the row plan against the plain algorithm, which computes every term for every row; cost; draws."""

import dataclasses
import math

import pytest
import torch
from golden_cases import relative_error

from mfengine import IMFDiT, IMFDiTConfig, ImprovedMeanFlow, ImprovedMeanFlowConfig
from mfengine.engine.flops import sample_flops, step_flops
from mfengine.engine.presets import PRESETS
from mfengine.errors import InputError
from mfengine.methods.intervals import column
from mfengine.ops import use_backend


def small_model(**changes):
    torch.manual_seed(0)
    config = IMFDiTConfig(**{"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "depth": 2,
                             "num_heads": 2, "num_classes": 3, "head_depth": 1, "class_tokens": 1, "omega_tokens": 1,
                             "interval_tokens": 1, "time_tokens": 1, **changes})  # fmt: skip
    model = IMFDiT(config)
    with torch.no_grad():
        for p in model.parameters():  # zero gates and outputs would hide most of the network
            p.add_(0.2 * torch.randn_like(p))
    return model


def draw(method, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 2, 4, 4, generator=generator)
    labels = torch.randint(0, 3, (batch,), generator=generator)
    return latents, labels, method.draw(latents.shape, generator)


def algorithm(model, cfg, x, labels, draws):
    """The paper's algorithm as written: guidance and JVP for all rows, through both heads."""
    t, r, e, _, omega, t_min, t_max = draws
    dropped = torch.arange(len(x)) < draws.num_dropped
    z, v_t = (1 - column(t)) * x + column(t) * e, e - x
    null, zero, one = torch.full_like(labels, model.num_classes), torch.zeros_like(t), torch.ones_like(t)

    def v_of(y, omega):
        return model(z, zero, y, omega=omega, t_min=zero, t_max=one)[1]

    with torch.no_grad():
        omega_now = torch.where((t_min <= t) & (t <= t_max), omega, one)
        v_c, v_u = v_of(labels, omega_now), v_of(null, one)
        v_g = torch.where(column(dropped), v_t, v_t + column(1 - 1 / omega_now) * (v_c - v_u))
    y = torch.where(dropped, null, labels)
    u, du_dt, v = torch.func.jvp(
        lambda z, t, r: model(z, t - r, y, omega=omega, t_min=t_min, t_max=t_max),
        (z, t, r),
        (v_c, one, torch.zeros_like(r)),
        has_aux=True,
    )
    loss = 0
    for velocity in (u + column(t - r) * du_dt.detach(), v):
        error = (velocity - v_g).square().flatten(1).sum(1)
        loss = loss + (error / (error.detach() + cfg.norm_eps) ** cfg.norm_p).mean()
    return loss, {"v_g": v_g, "v_c": v_c, "u": u, "v": v, "du_dt": du_dt}


CONFIGS = {
    "published": ImprovedMeanFlowConfig(),
    "dropped rows among interval rows": ImprovedMeanFlowConfig(interval_share=0.75, label_dropout=0.6, omega_beta=2.0),
    "all rows are dropped": ImprovedMeanFlowConfig(label_dropout=1.0),
    "all rows have an interval": ImprovedMeanFlowConfig(interval_share=1.0, norm_p=0.8),
    "no row has an interval": ImprovedMeanFlowConfig(interval_share=0.0),
    "there is nothing to guide": ImprovedMeanFlowConfig(interval_share=0.0, label_dropout=1.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_row_plan_equals_the_plain_algorithm(name):
    cfg = CONFIGS[name]
    model, method = small_model(), ImprovedMeanFlow(cfg)
    latents, labels, draws = draw(method, 12, seed=3)
    kept = labels.clone()
    loss, metrics = method.loss(model, latents, labels, draws)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected, terms = algorithm(model, cfg, latents, labels, draws)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for key, term in terms.items():
        torch.testing.assert_close(metrics[key], term.detach()[12 - len(metrics[key]) :], rtol=1e-3, atol=1e-4)
        assert len(metrics[key]) == (cfg.num_interval(12) if key in ("v_c", "du_dt") else 12)
    scale = max(p.grad.norm() for p in model.parameters())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (gradient - p.grad).norm() < 1e-5 * scale
    assert torch.equal(labels, kept)  # the caller's labels are unchanged


@pytest.mark.slow  # `test_node.py` tests one of its blocks
def test_fused_path_equals_the_plain_one():
    pytest.importorskip("triton", reason="the fused kernels need triton")
    model, method = small_model(), ImprovedMeanFlow(ImprovedMeanFlowConfig())
    batch, results = draw(method, 2, seed=3), []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            model.zero_grad()
            loss, metrics = method.loss(model, *batch)
            loss.backward()
        results.append([loss.detach(), metrics["du_dt"], metrics["v_c"], *(p.grad for p in model.parameters())])
    for plain, fused in zip(*results, strict=True):
        assert relative_error(fused, plain) < 1e-5


class CallRecorder:
    """A network that records what its calls request."""

    def __init__(self):
        self.network, self.calls = small_model(), []
        self.num_classes = self.network.num_classes

    def __call__(self, z, *args, tangents=None, heads="uv", **conditions):
        assert len(z)
        self.calls.append((tangents is not None, heads))
        return self.network(z, *args, tangents=tangents, heads=heads, **conditions)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_batch_makes_the_same_sequence_of_calls(name):
    """Sharded ranks must gather together, whatever rows they drew."""
    method, calls = ImprovedMeanFlow(CONFIGS[name]), set()
    for seed in range(8):
        model = CallRecorder()
        method.loss(model, *draw(method, 4, seed))
        calls.add(tuple(model.calls))
    assert calls == {((False, "v"), (bool(CONFIGS[name].interval_share), "uv"))}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most", "as_written"), [("imf-xl2", 5.3, 7.5), ("imf-b2", 6.8, 9)])
def test_cost_of_a_step(name, most, as_written):
    """In F, the FLOPs of drawing a sample in one step."""
    config = PRESETS[name][1]
    cost = step_flops(config.model, config.method, 64) / sample_flops(config.model, config.method)
    print(f"{name}: {cost:.2f} F per sample; as written {as_written} F")
    assert 0.95 * most <= cost <= most


def test_draws_follow_their_distributions():
    method = ImprovedMeanFlow(ImprovedMeanFlowConfig())
    draws = method.draw((40_000, 1, 2, 2), torch.Generator().manual_seed(0))
    instant, interval = slice(20_000), slice(20_000, None)
    assert torch.equal(draws.t[instant], draws.r[instant])
    assert (draws.t[interval] > draws.r[interval]).all()
    assert (draws.t_min[instant] == 0).all()
    assert (draws.t_max[instant] == 1).all()
    assert draws.t_min[interval].mean() == pytest.approx(0.25, abs=0.005)
    assert draws.t_max[interval].mean() == pytest.approx(0.75, abs=0.005)
    assert draws.num_dropped == pytest.approx(4_000, abs=200)
    assert draws.noise.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_guidance_weights_have_a_density_of_omega_to_the_minus_beta(beta):
    omega = ImprovedMeanFlowConfig(omega_beta=beta).draw_omega((torch.arange(100_000) + 0.5) / 100_000)
    assert (omega >= 1).all()
    assert (omega <= 8).all()

    def below(bound):  # integral of omega^-beta from 1
        return math.log(bound) if beta == 1 else (bound ** (1 - beta) - 1) / (1 - beta)

    for bound in (1.5, 4.0):
        assert (omega <= bound).float().mean() == pytest.approx(below(bound) / below(8), abs=1e-3)


def test_draws_follow_from_the_generator():
    method = ImprovedMeanFlow(ImprovedMeanFlowConfig())
    a, b = (method.draw((8, 1, 2, 2), torch.Generator().manual_seed(5)) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_samples_take_the_settings_of_the_objective_unless_told_otherwise():
    model, method = small_model(), ImprovedMeanFlow(ImprovedMeanFlowConfig(omega=3.0, t_min=0.2, t_max=0.9))
    noise, labels = torch.randn(2, 2, 4, 4), torch.tensor([0, 1])
    own = method.sampler({})(model, noise, labels, 2)
    assert torch.equal(own, method.sampler({"omega": 3, "t_min": 0.2})(model, noise, labels, 2))
    assert not torch.equal(own, method.sampler({"omega": 1.0})(model, noise, labels, 2))


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"omega": 0.5}, "omega must be at least 1, not 0.5"),
        ({"t_min": 0.8}, r"t_min must be at most t_max 0\.65, not 0\.8"),
        ({"t_max": 1.5}, "t_max must be between 0 and 1"),
        ({"kappa": 1.0}, "there is no condition kappa"),
    ],
)
def test_invalid_conditions(conditions, message):
    with pytest.raises(InputError, match=message):
        ImprovedMeanFlow(ImprovedMeanFlowConfig()).sampler(conditions)


@pytest.mark.parametrize(
    ("field", "value"), [("interval_share", 1.5), ("label_dropout", -0.1), ("omega_max", 1.0), ("omega", 0.0)]
)
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(ImprovedMeanFlowConfig(), **{field: value})
