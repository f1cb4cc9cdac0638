"""Correctness checks for a device. Each check gives a row of the report: its name, error and bound.

The bound is twice the error of plain PyTorch in the same dtype; both errors are against float64. Golden cases have a
bound of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.cases import outputs_of, random_on
from benchmarks.measure import ROOT
from benchmarks.workload import make_model, training_step
from mfengine.methods import OBJECTIVES, ObjectiveConfig
from mfengine.networks.layers import TransformerConfig
from mfengine.ops import OPS, Dual, use_attention, use_backend
from mfengine.ops.backend import Backend
from mfengine.ops.choice import Attention, why_not
from mfengine.ops.table import Example, Shape
from mfengine.optim import AdamWEMA
from mfengine.optim import Backend as OptimBackend

GOLDEN_BOUND = 1e-5
Check = dict[str, Any]  # check: name; error, bound; note: any other failure


def passed(check: Check) -> bool:
    return check["error"] <= check["bound"] and not check.get("note")


def compare(
    name: str, actual: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], note: str = ""
) -> Check:
    """The error and bound of the tensor that is nearest to its bound, or furthest beyond it."""

    def error(x: Tensor, e: Tensor) -> float:
        return float((x.detach().double() - e.detach()).norm() / e.detach().norm().clamp_min(1e-300))

    # Everything is computed in float32, so a few units of it are allowed where plain PyTorch is nearly exact.
    least = 4 * torch.finfo(torch.float32).eps
    found = [(error(x, e), max(2 * error(p, e), least)) for x, p, e in zip(actual, plain, exact, strict=True)]
    # NaN is worse than any number.
    worst = max(found, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else torch.inf)
    return {"check": name, "error": worst[0], "bound": worst[1], "note": note}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and similar functions return NaN inside, so that elements a kernel fails to write show."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # PyTorch's default
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ----------------------------------------------------------------------------
# Ops.


def check_op(
    op: str, shape: Shape, dtype: torch.dtype, name: str, device: torch.device, backend: Backend = "triton"
) -> Check:
    """Output, tangent and gradients of an op with our kernels; three runs must agree bit for bit.

    The first row has no tangent, and memory is poisoned.
    """
    torch.manual_seed(0)
    case, along = (OPS[op](shape, random_on(device, dtype)) for _ in range(2))
    rows = len(case.arguments) - case.parameters

    def run(case: Example, along: Example) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in case.arguments]
        duals = [Dual(x, dx[1:]) for x, dx in zip(leaves[:rows], along.arguments, strict=False)]
        outputs = outputs_of(case.function(*duals, *leaves[rows:]))
        primals = [o.primal for o in outputs]
        gradients = [torch.empty_like(o).copy_(torch.linspace(-1, 1, o.shape[-1])) for o in primals]
        return [x.detach() for o in outputs for x in o] + list(torch.autograd.grad(primals, leaves, gradients))

    with use_backend("torch"):
        exact, plain = run(case.double(), along.double()), run(case, along)
    with use_backend(backend), poisoned_memory():
        runs = [run(case, along) for _ in range(3)]
    pairs = [pair for again in runs[1:] for pair in zip(runs[0], again, strict=True)]
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    return compare(name, runs[0], plain, exact, "" if same else "three runs differ")


def attentions(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Attention]:
    """The implementations, except the plain one, that support such heads here."""
    names = [name for name in get_args(Attention) if name not in ("auto", "torch")]
    return [name for name in names if why_not(name, device, dtype, shape.dim) is None]


def check_attention(by: Attention, shape: Shape, dtype: torch.dtype, name: str, device: torch.device) -> Check:
    """Output and gradient of attention without tangents."""
    torch.manual_seed(0)
    case = OPS["attention_packed"](shape, random_on(device, dtype))

    def run(case: Example) -> list[Tensor]:
        leaf = case.arguments[0].detach().requires_grad_()
        o = case.function(leaf)
        return [o.detach(), *torch.autograd.grad((o * torch.linspace(-1, 1, shape.width).to(o)).sum(), leaf)]

    with use_attention("torch"):
        exact, plain = run(case.double()), run(case)
    with use_attention(by):
        return compare(name, run(case), plain, exact)


# ----------------------------------------------------------------------------
# The network, the step and the optimizer.


def check_golden(name: str, device: torch.device) -> Check:
    """Loss and gradients against the paper's own code, in float32."""
    sys.path.insert(0, str(ROOT / "tests"))
    from golden_cases import golden_case, relative_error

    case = golden_case(name)
    case.model.to(device)
    latents, labels, draws = case.batch("in")
    draws = draws._replace(noise=draws.noise.to(device))
    loss, _ = case.method.loss(case.model, latents.to(device), labels.to(device), draws)
    loss.backward()
    gradients = case.parameters("grads")
    worst = max(relative_error(p.grad.cpu(), gradients[n]) for n, p in case.model.named_parameters())
    error = max(worst, relative_error(loss.detach().cpu(), case.arrays["out/loss"]))
    return {"check": f"golden {name}", "error": error, "bound": GOLDEN_BOUND, "note": ""}


def check_step(
    config: TransformerConfig,
    objective: ObjectiveConfig,
    batch: int,
    dtype: torch.dtype,
    name: str,
    device: torch.device,
    backend: Backend = "triton",
) -> Check:
    """Loss and gradient of a step with our kernels."""
    method = OBJECTIVES.build(objective)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *config.latent_shape, generator=generator)
    labels = torch.arange(batch) % config.num_classes
    draws = method.draw(latents.shape, generator)

    def run(compute_dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
        model = make_model(config, device, compute_dtype).to(wide)
        inputs = type(draws)(*(x.to(wide) if isinstance(x, Tensor) else x for x in draws))
        inputs = inputs._replace(noise=inputs.noise.to(device))
        with use_backend(backend):
            loss, _ = method.loss(model, latents.to(device, wide), labels.to(device), inputs)
            loss.backward()
        return [loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]

    return compare(name, run(dtype, backend), run(dtype, "torch"), run(torch.float64, "torch"))


def check_waits(
    config: TransformerConfig, objective: ObjectiveConfig, dtype: torch.dtype, name: str, device: torch.device
) -> Check:
    """A step must not make the host wait for the device."""
    step = training_step(config, objective, 16, device, dtype)
    step()
    note = ""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        note = str(error)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {"check": name, "error": 0.0, "bound": 0.0, "note": note}


def check_optimizer(backend: OptimBackend, device: torch.device, steps: int = 200) -> Check:
    """A backend of AdamWEMA, beside torch.optim.AdamW and averages by lerp in float32, both against float64.

    Tensors have any alignment. A second run from the same start must give the same bits. Then a gradient that is not
    finite must change nothing. AdamWEMA raises ValueError if the backend is unavailable.
    """
    sizes, decays = (1, 3, 16383, 16385, 100_003), (0.9, 0.9999)
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def start(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        # Views into one buffer: all but the first start at an address that is not a multiple of 16 bytes.
        flat = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0)).to(device, dtype)
        return [torch.nn.Parameter(part) for part in flat.split(sizes)]

    def gradients(step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        return [torch.randn(n, generator=generator) for n in sizes]

    def by_torch(dtype: torch.dtype) -> list[Tensor]:
        parameters = start(dtype)
        averages = {d: [p.detach().clone() for p in parameters] for d in decays}
        optimizer = torch.optim.AdamW(parameters, **settings)
        for i in range(steps):
            for p, grad in zip(parameters, gradients(i), strict=True):
                p.grad = grad.to(device, dtype)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for d, values in averages.items():
                torch._foreach_lerp_(values, [p.detach() for p in parameters], 1 - d)
        return [*parameters, *(average for d in decays for average in averages[d])]

    runs = []
    for _ in range(2):
        parameters = start()
        with poisoned_memory():
            ours = AdamWEMA(parameters, ema_decays=decays, clip_norm=1.0, backend=backend, **settings)
            for i in range(steps):
                for p, grad in zip(parameters, gradients(i), strict=True):
                    p.grad = grad.to(device)
                ours.step()
        runs.append([*parameters, *(ours.average(p, d) for d in decays for p in parameters)])
    note = "" if all(torch.equal(a, b) for a, b in zip(*runs, strict=True)) else "two runs differ"
    found = [x.detach().clone() for x in runs[1]]
    parameters[-1].grad[-1] = torch.nan  # type: ignore[index]
    ours.step()
    if not ours.skipped or not all(torch.equal(x, b) for x, b in zip(runs[1], found, strict=True)):
        note = "a gradient that is not finite changed something"
    return compare(f"AdamWEMA {backend}", found, by_torch(torch.float32), by_torch(torch.float64), note)
