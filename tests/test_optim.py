"""AdamWEMA: every backend against torch.optim.AdamW and averages in float64, and the CUDA arithmetic on the host."""

import copy
import sys
import types

import pytest
import torch
from conftest import slow
from golden_cases import GoldenCase, relative_error
from torch import nn

from mfengine import optim
from mfengine.kernels import multi_tensor
from mfengine.optim import AdamWEMA

SHAPES = [(3, 5), (16385,), (), (0, 4), (2, 3, 4, 5), (40000,)]
DECAYS = (0.9, 0.9999)


@pytest.fixture(params=["host", "torch", "torch as on cuda", "apex", "cuda", "torch on cuda"])
def device(request, monkeypatch):
    """Device of a backend's parameters; "host" is the CUDA library's arithmetic, compiled for the CPU.

    All but "torch" leave flags unread, as on a GPU, although the parameters are on the CPU.
    """
    if request.param != "torch":
        monkeypatch.setattr(optim, "_makes_wait", lambda device: True)
    on_gpu = request.param in ("cuda", "torch on cuda")
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    if request.param == "host":
        library = request.getfixturevalue("host_library")
        monkeypatch.setattr(multi_tensor, "library", lambda: library)
    if request.param == "apex":
        monkeypatch.setitem(sys.modules, "amp_C", types.SimpleNamespace(multi_tensor_adam_capturable=apex_adam))
    return types.SimpleNamespace(
        type="cuda" if on_gpu else "cpu", backend=request.param.split()[0].replace("host", "cuda")
    )


def apex_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay, inverse_scale):
    """apex's function as documented, for decoupled weight decay with bias correction."""
    assert mode == bias_correction == 1
    assert all(p.numel() for p in lists[1])  # apex would skip whatever precedes an empty tensor
    if noop:
        return
    step, lr = int(step), float(lr)
    for g, p, m, v in zip(*lists, strict=True):
        g.mul_(inverse_scale.item())
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + weight_decay * p
        p.sub_(lr * update)


def make_parameters(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]


def set_gradients(parameters, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step + 1)
    for p in parameters:
        p.grad = None
        p.grad_dtype = dtype
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, dtype)


def everything(optimizer):
    """Parameters and the whole state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [x.detach().clone() for p in parameters for x in (p, *optimizer.state[p].values())]


def same_bits(a, b):
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(map(at_least_1d, a), map(at_least_1d, b), strict=True)
    )


def at_least_1d(x):
    return torch.atleast_1d(x).cpu()


class Reference:
    """torch.optim.AdamW, with averages in float64."""

    def __init__(self, parameters, clip_norm=None, **settings):
        self.parameters, self.clip_norm = parameters, clip_norm
        self.optimizer = torch.optim.AdamW(parameters, **settings)
        self.averages = {decay: [p.detach().double() for p in parameters] for decay in DECAYS}

    def step(self):
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        for decay, averages in self.averages.items():
            for average, p in zip(averages, self.parameters, strict=True):
                average.lerp_(p.detach().double(), 1 - decay)


def assert_near(optimizer, parameters, reference, bound=1e-6):
    for p, expected in zip(parameters, reference.parameters, strict=True):
        if p.numel():
            assert relative_error(p.detach().cpu(), expected.detach()) < bound, p.shape
    for decay, averages in reference.averages.items():
        for p, average in zip(parameters, averages, strict=True):
            if p.numel():
                assert relative_error(optimizer.average(p, decay).cpu(), average) < bound, (p.shape, decay)


@pytest.mark.parametrize(("clip_norm", "weight_decay"), [slow(None, 0.0), (1.0, 0.1)])
def test_two_hundred_random_steps(device, clip_norm, weight_decay):
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": weight_decay}
    parameters = make_parameters(device.type)
    optimizer = AdamWEMA(parameters, ema_decays=DECAYS, clip_norm=clip_norm, backend=device.backend, **settings)
    reference = Reference(make_parameters(), clip_norm, **settings)
    for step in range(200):
        for side in (parameters, reference.parameters):
            set_gradients(side, step)
        optimizer.step()
        reference.step()
    # apex adds the decay to the update, and its rounding errors accumulate over many steps.
    assert_near(optimizer, parameters, reference, 1e-5 if device.backend == "apex" and weight_decay else 1e-6)


def test_learning_rate_of_the_group_is_used(device):
    """It is set between steps, as by PyTorch's schedulers and by a warm-up."""
    parameters = make_parameters(device.type)
    optimizer = AdamWEMA(parameters, lr=1e-3, ema_decays=DECAYS, backend=device.backend)
    reference = Reference(make_parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(10):
        for side, group in ((parameters, optimizer), (reference.parameters, reference.optimizer)):
            set_gradients(side, step)
            group.param_groups[0]["lr"] = 1e-3 * (step + 1)
        optimizer.step()
        reference.step()
    assert_near(optimizer, parameters, reference)


def test_decay_by_name_is_used(device):
    """It is set between steps, as by a half-life that grows with the run."""
    parameters = make_parameters(device.type)
    optimizer = AdamWEMA(parameters, ema_decays={500.0: 0.0}, backend=device.backend)
    expected = [p.detach().double().cpu() for p in parameters]
    for step, decay in enumerate((0.0, 0.5, 0.9)):
        set_gradients(parameters, step)
        optimizer.ema_decays[500.0] = decay
        optimizer.step()
        expected = [a.lerp(p.detach().double().cpu(), 1 - decay) for a, p in zip(expected, parameters, strict=True)]
    for p, average in zip(parameters, expected, strict=True):
        if p.numel():
            assert relative_error(optimizer.average(p, 500.0).cpu(), average) < 1e-6


def test_golden_training_case(device):
    case = GoldenCase("guided_omega_train")
    case.model.to(device.type)
    optimizer = AdamWEMA(case.model.parameters(), lr=1e-3, betas=(0.9, 0.95), ema_decays=DECAYS, backend=device.backend)
    twin = copy.deepcopy(case.model).cpu()
    reference = Reference(list(twin.parameters()), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    for step in range(4):
        latents, labels, draws = case.batch(f"step{step}")
        draws = draws._replace(noise=draws.noise.to(device.type))
        loss, _ = case.method.loss(case.model, latents.to(device.type), labels.to(device.type), draws)
        optimizer.zero_grad()
        loss.backward()
        for p, q in zip(case.model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.cpu().clone()
        optimizer.step()
        reference.step()
    assert_near(optimizer, list(case.model.parameters()), reference)
    expected = case.parameters("train/params")
    for name, p in case.model.named_parameters():
        assert relative_error(p.detach().cpu(), expected[name]) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e25])
def test_gradient_that_is_not_finite_changes_nothing(device, bad):
    parameters = make_parameters(device.type)
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in parameters]
    optimizer = AdamWEMA(
        parameters,
        ema_decays=DECAYS,
        clip_norm=1.0,
        copies=copies,
        backend=device.backend,
    )
    with torch.no_grad():
        optimizer.average(parameters[0], 0.9).fill_(-0.0)  # adding zero would change it
    first = everything(optimizer) + [c.clone() for c in copies]
    set_gradients(parameters, 0)
    parameters[0].grad[0] = bad
    optimizer.step()
    assert optimizer.skipped == 1
    assert same_bits(everything(optimizer) + copies, first)
    set_gradients(parameters, 0)
    optimizer.step()
    assert optimizer.skipped == 0
    before = everything(optimizer) + [c.clone() for c in copies]
    set_gradients(parameters, 1)
    parameters[-1].grad[-1] = bad
    gradients = [p.grad.clone() for p in parameters]
    optimizer.step()
    assert optimizer.skipped == 1
    assert same_bits(everything(optimizer) + copies, before)
    assert same_bits([p.grad for p in parameters], gradients)
    set_gradients(parameters, 1)
    optimizer.step()
    assert optimizer.skipped == 0
    assert not same_bits(everything(optimizer) + copies, before)


@pytest.mark.parametrize(
    ("first", "second"), [("torch", "cuda"), ("cuda", "torch"), ("torch", "apex"), ("apex", "cuda")]
)
def test_run_continues_with_another_backend(first, second, host_library, monkeypatch):
    monkeypatch.setattr(multi_tensor, "library", lambda: host_library)
    monkeypatch.setitem(sys.modules, "amp_C", types.SimpleNamespace(multi_tensor_adam_capturable=apex_adam))
    shapes = [p for p in make_parameters() if p.numel()]
    settings = {"lr": 1e-3, "ema_decays": DECAYS, "clip_norm": 1.0}
    stays = AdamWEMA(shapes, backend=first, **settings)
    for step in range(10):
        set_gradients(shapes, step)
        stays.step()
    moved = [nn.Parameter(p.detach().clone()) for p in shapes]
    changes = AdamWEMA(moved, backend=second, **settings)
    changes.load_state_dict(copy.deepcopy(stays.state_dict()))
    for step in range(10, 20):
        for parameters, optimizer in ((shapes, stays), (moved, changes)):
            set_gradients(parameters, step)
            optimizer.step()
    for a, b in zip(everything(stays), everything(changes), strict=True):
        assert relative_error(b, a) < 1e-6


def test_bfloat16_gradients(device):
    """Gradients in bfloat16, or in both dtypes at once, act like the same numbers in float32."""
    parameters, twins = make_parameters(device.type), make_parameters(device.type)
    one, two = (AdamWEMA(side, clip_norm=1.0, backend=device.backend) for side in (parameters, twins))
    for step in range(3):
        set_gradients(parameters, step, torch.bfloat16)
        set_gradients(twins, step)
        for p, q in zip(parameters, twins, strict=True):
            q.grad.copy_(p.grad)
        set_gradients(parameters[1:2], step)
        twins[1].grad.copy_(parameters[1].grad)
        one.step()
        two.step()
    for a, b in zip(everything(one), everything(two), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_parameter_without_gradient_is_left_alone(device):
    if device.backend == "apex":
        pytest.skip("apex counts steps for all parameters; see test_backend_apex_needs_every_gradient")
    parameters = make_parameters(device.type)
    optimizer = AdamWEMA(parameters, ema_decays=(0.5,), backend=device.backend)
    set_gradients(parameters, 0)
    optimizer.step()
    still, average = parameters[0].detach().clone(), optimizer.average(parameters[0], 0.5).clone()
    set_gradients(parameters, 1)
    parameters[0].grad = None
    optimizer.step()
    assert torch.equal(parameters[0], still)
    assert optimizer.state[parameters[0]]["step"] == 1
    assert optimizer.state[parameters[1]]["step"] == 2
    torch.testing.assert_close(optimizer.average(parameters[0], 0.5), (average + still) / 2)


def test_groups_keep_their_settings(device):
    """Like torch.optim.AdamW with the same groups and a schedule."""
    parameters, twins = make_parameters(device.type), make_parameters(device.type)

    def groups(side):
        return [{"params": side[:2], "weight_decay": 0.1}, {"params": side[2:], "betas": (0.5, 0.6), "lr": 1e-2}]

    ours = AdamWEMA(groups(parameters), backend=device.backend)
    theirs = torch.optim.AdamW(groups(twins), lr=1e-3, weight_decay=0)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (ours, theirs)]
    for step in range(3):
        for side, optimizer, schedule in zip((parameters, twins), (ours, theirs), schedules, strict=True):
            set_gradients(side, step)
            optimizer.step()
            schedule.step()
    for p, q in zip(parameters, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------
# Memory: any alignment, any strides.


def test_unaligned_and_transposed(device):
    """Slices that begin anywhere, and a transposed parameter with a gradient that is not transposed."""
    flat = torch.arange(103.0, device=device.type) / 50 - 1
    parameters = [nn.Parameter(flat[1:50]), nn.Parameter(flat[50:53]), nn.Parameter(flat[53:95].view(6, 7).t())]
    twins = [nn.Parameter(p.detach().cpu().clone()) for p in parameters]
    optimizer = AdamWEMA(parameters, lr=0.1, backend=device.backend)
    reference = torch.optim.AdamW(twins, lr=0.1, weight_decay=0)
    set_gradients(twins, 0)
    for p, q in zip(parameters, twins, strict=True):
        p.grad = q.grad.to(device.type).contiguous()
    optimizer.step()
    reference.step()
    for p, q in zip(parameters, twins, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-6, atol=1e-6)
    assert torch.equal(flat[[0, *range(95, 103)]].cpu(), (torch.arange(103.0) / 50 - 1)[[0, *range(95, 103)]])


def test_gradients_of_any_layout(device):
    """Expanded, part of a wider buffer, float16; the norm also covers only the gradient's own elements."""
    parameters = [nn.Parameter(torch.ones(4, 4, device=device.type)) for _ in range(3)]
    optimizer = AdamWEMA(parameters, lr=0.1, clip_norm=1.0, backend=device.backend)
    parameters[0].grad = torch.ones(1, device=device.type).expand(4, 4)
    parameters[1].grad = torch.arange(32.0, device=device.type).view(4, 8)[:, :4]
    parameters[2].grad = None
    parameters[2].grad_dtype = torch.float16
    parameters[2].grad = torch.ones(4, 4, device=device.type, dtype=torch.float16)
    exact = sum(p.grad.double().square().sum() for p in parameters).sqrt()
    optimizer.step()
    assert relative_error(optimizer.grad_norm.cpu(), exact.cpu()) < 1e-6
    torch.testing.assert_close(parameters[0], torch.full_like(parameters[0], 0.9))


def test_group_without_parameters(device):
    optimizer = AdamWEMA([{"params": make_parameters(device.type)}], skip_nonfinite=False, backend=device.backend)
    optimizer.add_param_group({"params": []})
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()


def test_step_does_not_wait_for_the_device(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    parameters = make_parameters("cuda")
    optimizer = AdamWEMA(parameters, clip_norm=1.0, backend=device.backend)
    set_gradients(parameters, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------
# Copies in bfloat16.


def test_copies_follow_the_parameters(device):
    parameters = make_parameters(device.type)
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in parameters]
    optimizer = AdamWEMA(parameters, copies=copies, backend=device.backend)
    for step in range(3):
        assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, parameters, strict=True))
        set_gradients(parameters, step)
        optimizer.step()
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, parameters, strict=True))


# ----------------------------------------------------------------------------
# The norm.


def test_sum_of_squares(device):
    optimizer = AdamWEMA(make_parameters(device.type), backend=device.backend)
    parameters = optimizer.param_groups[0]["params"]
    norms = []
    for _ in range(2):
        set_gradients(parameters, 7)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    exact = sum(p.grad.double().square().sum() for p in parameters).sqrt()
    assert norms[0] == norms[1]
    assert relative_error(norms[0].cpu(), exact.cpu()) < 1e-6


# ----------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "fast"}, "backend fast does not exist; it must be one of auto, cuda, torch, apex"),
        ({"ema_decays": (1.0,)}, r"ema_decays must be different numbers in \[0, 1\)"),
        ({"ema_decays": (0.9, 0.9)}, "different"),
        ({"ema_decays": tuple(i / 10 for i in range(9))}, "there must be at most 8 ema_decays, not 9"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, not 0"),
        ({"lr": -1.0}, "lr must be at least 0, not -1"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"copies": []}, "there are 1 parameters, but 0 copies"),
        ({"copies": [torch.zeros(3)]}, "must be bfloat16"),
        ({"copies": [torch.zeros(3, 2, dtype=torch.bfloat16)[:, 0]]}, "same shape, strides and device"),
        ({"backend": "cuda"}, "backend cuda: "),
        ({"backend": "apex"}, "backend apex: apex is not installed"),
    ],
)
def test_wrong_settings(settings, message, monkeypatch):
    monkeypatch.setattr(multi_tensor, "library", missing_library)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(ValueError, match=message):
        AdamWEMA([nn.Parameter(torch.zeros(3))], **settings)


def test_averaged_swaps_weights_in_and_out():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    copies = [torch.empty_like(p, dtype=torch.bfloat16, requires_grad=False) for p in model.parameters()]
    optimizer = AdamWEMA(model.parameters(), lr=0.1, ema_decays=(0.5, 0.9), copies=copies)
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    own = [p.detach().clone() for p in model.parameters()]
    for decay in (None, 0.5, 0.9):
        with optimizer.averaged(model, decay):
            for p, copy in zip(model.parameters(), copies, strict=True):
                assert torch.equal(p, optimizer.average(p, decay or 0.5))
                assert torch.equal(copy, p.detach().bfloat16())
            with pytest.raises(RuntimeError, match="leave `averaged` before the next step"):
                optimizer.step()
            with pytest.raises(RuntimeError, match="already"), optimizer.averaged(model):
                pass
        for p, copy, value in zip(model.parameters(), copies, own, strict=True):
            assert torch.equal(p, value)
            assert torch.equal(copy, value.bfloat16())
    with pytest.raises(ValueError, match="no moving average with decay"), optimizer.averaged(model, 0.7):
        pass
    with pytest.raises(ZeroDivisionError), optimizer.averaged(model):
        raise ZeroDivisionError
    assert all(map(torch.equal, model.parameters(), own))
    optimizer.step()


def test_missing_average():
    p, other = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = AdamWEMA([p], ema_decays=(0.9,))
    with pytest.raises(ValueError, match=r"a tensor of shape \(3,\) is not a parameter of this optimizer"):
        optimizer.average(other, 0.9)
    with pytest.raises(ValueError, match=r"no moving average with decay 0\.5; the decays are \(0\.9,\)"):
        optimizer.average(p, 0.5)
    assert list(optimizer.state) == [p]
    AdamWEMA([other], ema_decays=(0.9,)).load_state_dict(optimizer.state_dict())


def missing_library():
    raise OSError("the CUDA library was not built")


def test_wrong_parameters():
    with pytest.raises(ValueError, match="parameters must be float32, not"):
        AdamWEMA([nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    with pytest.raises(ValueError, match="on one device, not on cpu and meta"):
        AdamWEMA([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, device="meta"))])


def test_state_without_the_averages():
    p = nn.Parameter(torch.zeros(3))
    state = AdamWEMA([p], ema_decays=(0.9,)).state_dict()
    with pytest.raises(ValueError, match=r"no moving average with decay 0\.99"):
        AdamWEMA([p], ema_decays=(0.99,)).load_state_dict(state)


def test_state_of_another_shape():
    state = AdamWEMA([nn.Parameter(torch.zeros(3))]).state_dict()
    with pytest.raises(ValueError, match=r"of a parameter of \(50,\) must have its shape, not \(3,\)"):
        AdamWEMA([nn.Parameter(torch.zeros(50))]).load_state_dict(state)


def test_state_of_another_layout(device):
    """Elements meet their own moments, whatever the layouts of both."""
    parameters = [nn.Parameter(torch.arange(12.0, device=device.type).view(3, 4))]
    optimizer = AdamWEMA(parameters, lr=0.1, backend=device.backend)
    set_gradients(parameters, 0)
    optimizer.step()
    turned = [nn.Parameter(parameters[0].detach().t().contiguous().t())]
    other = AdamWEMA(turned, lr=0.1, backend=device.backend)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for side, each in ((parameters, optimizer), (turned, other)):
        set_gradients(side, 1)
        each.step()
    torch.testing.assert_close(turned[0], parameters[0])


def test_backend_apex_needs_every_gradient(monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", types.SimpleNamespace(multi_tensor_adam_capturable=apex_adam))
    parameters = make_parameters()
    optimizer = AdamWEMA(parameters, backend="apex")
    set_gradients(parameters[1:], 0)
    with pytest.raises(ValueError, match="each needs a gradient in every step"):
        optimizer.step()


def test_auto_falls_back_to_torch(monkeypatch):
    monkeypatch.setattr(multi_tensor, "library", missing_library)
    assert AdamWEMA(make_parameters()).backend == "torch"


def test_library_of_another_version_is_rejected(host_library, monkeypatch):
    monkeypatch.setattr(multi_tensor, "CHUNK", 1)
    with pytest.raises(OSError, match="was built from a different version"):
        multi_tensor.Library(host_library.path)
