"""`python -m benchmarks.gpu`: is everything right on this GPU, and how fast is it?

One script for ten minutes with a GPU: golden cases, ops against float64 (poisoned memory, fresh inputs, repeated), host
synchronisations, ceilings of the machine, where a step's time goes, implementations of attention, kernels and training
steps beside their baselines. Tables come last; with OUT set, everything goes to $OUT/gpu.json, and the times by which
mfengine chooses an attention to $OUT/attention_times.json, to be put into mfengine/ops. Needs torch, triton and numpy
only.
`--rehearse` runs all of it in miniature on a CPU, so that no time with a GPU is spent on debugging the script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, cases
from benchmarks.cases import Case, Machine
from benchmarks.measure import ROOT, Row, ceilings, environment, make_clock, measure
from benchmarks.report import render
from benchmarks.split import guided_split
from benchmarks.workload import OBJECTIVES, small, training_step
from mfengine import ops
from mfengine.engine.presets import PRESETS
from mfengine.ops import Dual
from mfengine.ops.choice import WORK, why_not
from mfengine.optim import AdamWEMA
from mfengine.ranks import World

MINUTES = 8  # for all of it: no timing begins later
COMPILE_SECONDS = 120  # of a peer's step of XL/2, at a guess


# ----------------------------------------------------------------------------
# Correctness.


def check_golden(device: torch.device) -> list[dict[str, Any]]:
    """Loss and gradients of the paper's own code, in float32."""
    sys.path.insert(0, str(ROOT / "tests"))
    from golden_cases import NAMES, GoldenCase, relative_error

    rows = []
    for name in NAMES:
        case = GoldenCase(name)
        case.model.to(device)
        latents, labels, draws = case.batch("in")
        draws = draws._replace(noise=draws.noise.to(device))
        loss, _ = case.method.loss(case.model, latents.to(device), labels.to(device), draws)
        loss.backward()
        gradients = case.parameters("grads")
        worst = max(relative_error(p.grad.cpu(), gradients[n]) for n, p in case.model.named_parameters())
        error = max(worst, relative_error(loss.detach().cpu(), case.arrays["out/loss"]))
        rows.append({"check": f"golden {name}", "error": error, "bound": 1e-5})
    return rows


def checked_ops(
    batch: int, tokens: int, width: int, heads: int
) -> dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]]:
    """Ops, and the shapes of their arguments."""
    stream, rows = (batch, tokens, width), (batch, width)
    return {
        "attention": (lambda qkv: (ops.attention_packed(qkv, heads),), [(batch, tokens, 3 * width)]),
        "adaln": (lambda *args: (ops.adaln_modulate(*args),), [stream, rows, rows]),
        "residual adaln": (ops.gated_residual_adaln, [stream, stream, rows, rows, rows]),
        "gelu": (lambda x: (ops.gelu(x),), [(batch, tokens, 4 * width)]),
    }


def run_op(op: Callable[..., Any], primals: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, tangents and gradients."""
    leaves = [x.detach().requires_grad_() for x in primals]
    outputs = op(*(Dual(x, dx) for x, dx in zip(leaves, tangents, strict=True)))
    total = sum((o.primal * torch.linspace(-1, 1, o.primal.shape[-1]).to(o.primal)).sum() for o in outputs)
    return [x.detach() for o in outputs for x in o] + list(torch.autograd.grad(total, leaves))


def check_ops(device: torch.device, rehearse: bool) -> list[dict[str, Any]]:
    """Output, tangent and gradients of each op against float64, over head dims and odd lengths.

    Memory is filled with nan before each run, so that what a kernel does not write shows; three runs must agree bit
    for bit, so that a race shows. Attention is ours alone: others add gradients up in any order.
    """
    bounds = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
    grid = (
        [(3, 17, 24, 1)]
        if rehearse
        else [
            (3, tokens, heads * dim, heads)
            for dim, heads in ((64, 16), (72, 16), (96, 8), (128, 4))
            for tokens in (1, 100, 257)
        ]
    )
    results = []
    for shape in grid:
        for name, (op, shapes) in checked_ops(*shape).items():
            for dtype, bound in bounds.items():
                primals = [torch.randn(s, device=device).to(dtype) for s in shapes]
                tangents = [torch.randn(s, device=device).to(dtype)[1:] for s in shapes]
                with ops.use_backend("torch"):
                    exact = run_op(op, [x.double() for x in primals], [x.double() for x in tangents])
                runs = []
                for _ in range(3):
                    poison = torch.full((2**20 if rehearse else 2**26,), float("nan"), device=device)
                    del poison
                    with ops.use_attention("triton"):
                        runs.append(run_op(op, primals, tangents))
                errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(runs[0], exact, strict=True)]
                same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
                label = f"{name} {shape} {str(dtype).removeprefix('torch.')}"
                error = max(errors) if same else float("nan")
                results.append({"check": label, "error": error, "bound": bound, "repeats": same})
    return results


def check_optimizer(device: torch.device) -> list[dict[str, Any]]:
    """Each backend of AdamWEMA against torch.optim.AdamW on the host and averages in float64, over 200 steps.

    On any alignment, and again from the same start, which must give the same bits; then a gradient that is not finite
    must change none.
    """
    rows = []
    sizes, decays = (1, 3, 16383, 16385, 1_000_003), (0.9, 0.9999)
    for backend in ("auto", "torch"):
        runs = []
        for _ in range(2):
            generator = torch.Generator().manual_seed(0)
            # Views into one buffer: all but the first begin where 16 bytes do not.
            flat = torch.randn(sum(sizes), generator=generator).to(device)
            parameters: list[torch.Tensor] = [torch.nn.Parameter(part) for part in flat.split(sizes)]
            host = [torch.nn.Parameter(p.detach().cpu().clone()) for p in parameters]
            exact = {d: [p.detach().double() for p in host] for d in decays}
            settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
            ours = AdamWEMA(parameters, ema_decays=decays, clip_norm=1.0, backend=backend, **settings)
            theirs = torch.optim.AdamW(host, **settings)
            for _ in range(200):
                for p, q in zip(parameters, host, strict=True):
                    q.grad = torch.randn(q.shape, generator=generator)
                    p.grad = q.grad.to(device)
                torch.nn.utils.clip_grad_norm_(host, 1.0)
                ours.step()
                theirs.step()
                for d in decays:
                    for average, q in zip(exact[d], host, strict=True):
                        average.lerp_(q.detach().double(), 1 - d)
            runs.append([*parameters, *(ours.average(p, d) for d in decays for p in parameters)])
        expected = [q.detach().double() for q in host] + [average for d in decays for average in exact[d]]
        error = max(float((x.detach().cpu() - e).norm() / e.norm()) for x, e in zip(runs[0], expected, strict=True))
        same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        before = [x.detach().clone() for x in runs[1]]
        parameters[-1].grad[-1] = torch.nan
        ours.step()
        kept = all(torch.equal(x, b) for x, b in zip(runs[1], before, strict=True)) and bool(ours.skipped)
        error = error if same and kept else float("nan")
        rows.append({"check": f"AdamWEMA {ours.backend}", "error": error, "bound": 1e-6, "repeats": same})
    return rows


def check_attention(device: torch.device, rehearse: bool) -> list[dict[str, Any]]:
    """Each implementation of attention against float64: beside duals output, tangent and gradient, and without."""
    bounds = {torch.float32: 1e-5, torch.float16: 2e-3}
    shapes = [(3, 17, 24, 1)]
    if not rehearse:
        bounds[torch.bfloat16] = 8e-3
        shapes = [(4, tokens, 16 * dim, 16) for dim in (64, 72) for tokens in (64, 257)]
    results = []
    for batch, tokens, width, heads in shapes:
        for dtype, bound in bounds.items():
            primal = torch.randn(batch, tokens, 3 * width, device=device).to(dtype)
            tangent = torch.randn(1, tokens, 3 * width, device=device).to(dtype)
            op = partial(ops.attention_packed, num_heads=heads)
            with ops.use_backend("torch"):
                exact = run_op(lambda x: (op(x),), [primal.double()], [tangent.double()])  # noqa: B023
            for name in WORK["training"]:
                if why_not(name, "training", device, dtype, width // heads):
                    continue
                leaf = primal.detach().requires_grad_()
                with ops.use_attention(name), torch.no_grad():
                    alone = [op(leaf)]
                with ops.use_attention(name):
                    beside = run_op(lambda x: (op(x),), [primal], [tangent])  # noqa: B023
                    o = op(leaf)
                weights = torch.linspace(-1, 1, width).to(o)
                alone += [o.detach(), *torch.autograd.grad((o * weights).sum(), leaf)]
                pairs = zip(beside + alone, [*exact, exact[0], exact[0], exact[2]], strict=True)
                error = max(float((a.double() - e).norm() / e.norm()) for a, e in pairs)
                label = f"attention by {name} {(batch, tokens, width, heads)} {str(dtype).removeprefix('torch.')}"
                results.append({"check": label, "error": error, "bound": bound})
    return results


def check_synchronisation(device: torch.device) -> list[dict[str, Any]]:
    """A step must not make the host wait for the device."""
    step = training_step(small(PRESETS["b2"][1].model), OBJECTIVES["guided"], 16, device, torch.bfloat16)
    step()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        waits = 0
    except RuntimeError as error:
        print(error)
        waits = 1
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return [{"check": "host waits in a step", "error": float(waits), "bound": 0.0}]


# ----------------------------------------------------------------------------
# Speed.


def time_cases(machine: Machine, deadline: float, rehearse: bool) -> tuple[list[Row], dict[str, str]]:
    """Rows of the cases that a step's speed depends on, and why others are missing.

    Kernels and steps of XL/2 come first, and what is left when the time is up is left out. Compiling takes minutes, so
    compiled peers are timed on guided steps of 32 alone; `pytest benchmarks/` times all.
    """
    rows: list[Row] = []
    missing: dict[str, str] = {}
    clock = make_clock(machine.device)
    for case in sorted(chosen(machine), key=lambda case: "xl2" not in case.name):
        for name, make in case.implementations.items():
            label = f"{case.suite}: {case.name}: {name}"
            if "compiled" in name and not (case.name.startswith("guided, ") and case.name.endswith(" of 32")):
                continue
            if time.monotonic() > deadline - COMPILE_SECONDS * ("compiled" in name):
                missing[label] = "no time left"
                continue
            try:
                seconds = 0.01 if rehearse else 0.3 if case.suite == "kernels" else 2.0
                rows.append(case.row(name, measure(make(), clock, seconds, warmup=1 if rehearse else 3)))
            except Exception as error:  # one that does not run here must not end the report of the others
                missing[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            finally:
                if machine.gpu:
                    torch.cuda.empty_cache()
    return rows, missing


def chosen(machine: Machine) -> Iterator[Case]:
    """What can be timed without packages beside torch, triton and numpy."""
    yield from cases.kernels(machine)
    yield from cases.steps(machine)
    yield from cases.optimizer(machine)
    yield from cases.sampler(machine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="everything in miniature, on a CPU")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("error: torch finds no GPU; `python -m benchmarks.gpu --rehearse` runs on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.rehearse else "cuda")
    deadline = time.monotonic() + MINUTES * 60
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(device, Path(folder))
        report: dict[str, Any] = {"environment": environment(device)}
        print(report["environment"], flush=True)

        def keep() -> None:
            if out := os.environ.get("OUT"):
                Path(out, "gpu.json").write_text(json.dumps(report, indent=1) + "\n")

        report["checks"] = [
            *check_golden(device),
            *check_ops(device, args.rehearse),
            *check_optimizer(device),
            *check_attention(device, args.rehearse),
            *check_synchronisation(device),
        ]
        failed = [row for row in report["checks"] if not row["error"] <= row["bound"]]
        for row in report["checks"]:
            verdict = "FAILED" if row in failed else "ok"
            print(f"{row['check']:44} {row['error']:9.2e} of {row['bound']:7.1e}  {verdict}", flush=True)
        keep()
        report["ceilings"] = ceilings(device, machine.dtype)
        ranks = World(0, 1, device if args.rehearse else torch.device("cuda", 0))
        report["splits"] = {
            f"{machine.name(preset)} of {batch}": guided_split(preset, batch, ranks)
            for preset, batch in ((("b2", 16),) if args.rehearse else (("xl2", 32), ("xl2", 256), ("b2", 32)))
        }
        keep()
        small_shape = {"shapes": [(16, 5, 1)], "batches": (2,), "seconds": 0.01}
        report["attention"] = list(attention.time_attention(device, **(small_shape if args.rehearse else {})))
        if out := os.environ.get("OUT"):
            attention.write(report["attention"], device, Path(out, attention.TIMES.name))
        keep()
        rows, report["missing"] = time_cases(machine, deadline, args.rehearse)
        report["rows"] = [asdict(row) for row in rows]
        keep()

    print(render(report))
    for label, why in report["missing"].items():
        print(f"missing: {label}: {why}")
    print(f"{len(report['checks'])} checks, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
