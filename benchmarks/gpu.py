"""`python -m benchmarks.gpu`: is everything right on this GPU, and how fast is it?

One script for an hour with a GPU: golden cases, ops against float64 (poisoned memory, fresh inputs, repeated), host
synchronisations, ceilings of the machine, kernels beside plain PyTorch, training steps. A short table comes last; with
OUT set, everything goes to $OUT/gpu.json. Needs torch, triton and numpy only.
`--rehearse` runs all of it in miniature on a CPU, so that no time with a GPU is spent on debugging the script.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import OBJECTIVES, forward_flops, small, training_step
from mfengine import ops
from mfengine.engine.config import PRESETS
from mfengine.ops import Dual

ROOT = Path(__file__).parent.parent


class Clock:
    """Times by CUDA events, or by the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def measure(self, f: Callable[[], Any], seconds: float, warmup: int = 3) -> list[float]:
        """Seconds of each run of f, for about so long in all."""
        for _ in range(warmup):
            f()
        times: list[float] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until or len(times) < 3:
            times.append(self._once(f))
        return times

    def _once(self, f: Callable[[], Any]) -> float:
        if not self.gpu:
            start = time.perf_counter()
            f()
            return time.perf_counter() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        f()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3


def environment(device: torch.device) -> dict[str, Any]:
    commit = None
    if shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        commit = head.stdout.strip() or None
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton") if find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": commit,
    }


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


Case = tuple[Callable[..., Any], list[tuple[int, ...]]]  # an op, and the shapes of its arguments


def op_cases(batch: int, tokens: int, width: int, heads: int) -> dict[str, Case]:
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
    for bit, so that a race shows.
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
        for name, (op, shapes) in op_cases(*shape).items():
            for dtype, bound in bounds.items():
                primals = [torch.randn(s, device=device).to(dtype) for s in shapes]
                tangents = [torch.randn(s, device=device).to(dtype)[1:] for s in shapes]
                with ops.use_backend("torch"):
                    exact = run_op(op, [x.double() for x in primals], [x.double() for x in tangents])
                runs = []
                for _ in range(3):
                    poison = torch.full((2**20 if rehearse else 2**26,), float("nan"), device=device)
                    del poison
                    runs.append(run_op(op, primals, tangents))
                errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(runs[0], exact, strict=True)]
                same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
                label = f"{name} {shape} {str(dtype).removeprefix('torch.')}"
                error = max(errors) if same else float("nan")
                results.append({"check": label, "error": error, "bound": bound, "repeats": same})
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


def ceilings(device: torch.device, clock: Clock, rehearse: bool) -> dict[str, float]:
    """What this machine reaches: copying memory, and a large bf16 matrix product."""
    size = 2**22 if rehearse else 2**30
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    copy = statistics.median(clock.measure(lambda: b.copy_(a), 0.1 if rehearse else 1.0))
    n = 256 if rehearse else 8192
    x, y = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    product = statistics.median(clock.measure(lambda: x @ y, 0.1 if rehearse else 2.0))
    return {"copy_gb_per_s": 2 * size / copy / 1e9, "bf16_tflop_per_s": 2 * n**3 / product / 1e12}


def time_ops(device: torch.device, clock: Clock, rehearse: bool) -> list[dict[str, Any]]:
    """Each op of XL/2 in bfloat16, fused and plain: forward, dual for a quarter of the rows, and forward + backward."""
    batch, tokens, width, heads = (2, 16, 48, 2) if rehearse else (64, 256, 1152, 16)
    rows = []
    for name, (op, shapes) in op_cases(batch, tokens, width, heads).items():
        inputs = [
            [torch.randn(s, device=device).to(torch.bfloat16).requires_grad_() for s in shapes] for _ in range(4)
        ]  # in turn, so that none of them stays in the cache
        turn = 0

        def rotate(inputs: Any = inputs) -> Any:
            nonlocal turn
            turn += 1
            return inputs[turn % len(inputs)]

        def forward(op: Any = op, rotate: Any = rotate) -> None:
            with torch.no_grad():
                op(*rotate())

        def dual(op: Any = op, rotate: Any = rotate) -> None:
            with torch.no_grad():
                op(*(Dual(x, x[-(batch // 4) or -1 :]) for x in rotate()))

        def both(op: Any = op, rotate: Any = rotate) -> None:
            leaves = rotate()
            torch.autograd.grad(sum(o.sum() for o in op(*leaves)), leaves)

        for mode, f in (("forward", forward), ("dual", dual), ("forward + backward", both)):
            row: dict[str, Any] = {"op": f"{name}, {mode}"}
            for backend in ("torch",) if rehearse else ("triton", "torch"):
                with ops.use_backend(backend):
                    row[backend] = statistics.median(clock.measure(f, 0.05 if rehearse else 0.4))
            rows.append(row)
    return rows


def time_dual_attention(device: torch.device, clock: Clock, rehearse: bool) -> list[dict[str, Any]]:
    """Output and tangent of attention in bfloat16: ours, `torch.func.jvp` over plain PyTorch, and jvp_flash_attention.

    256 tokens, 16 heads, every sample with a tangent. The peer has no head dim 72; at 64 and 128 all three do the same.
    """
    batch, heads, tokens = (1, 2, 16) if rehearse else (64, 16, 256)
    peer = None
    if find_spec("jvp_flash_attention") and not rehearse:
        from jvp_flash_attention.jvp_attention import JVPAttn

        peer = JVPAttn.fwd_dual
    rows = []
    for dim in (16,) if rehearse else (64, 72, 128):
        inputs = [
            [torch.randn(batch, heads, tokens, dim, device=device, dtype=torch.bfloat16) for _ in range(6)]
            for _ in range(4)
        ]
        turn = 0

        def rotate(inputs: Any = inputs) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            nonlocal turn
            turn += 1
            arrays = inputs[turn % len(inputs)]
            return tuple(arrays[:3]), tuple(arrays[3:])

        def explicit(rotate: Any = rotate) -> None:
            primals, tangents = rotate()
            ops.attention(*(Dual(p, t) for p, t in zip(primals, tangents, strict=True)))

        def transform(f: Any, rotate: Any = rotate) -> None:
            torch.func.jvp(f, *rotate())

        row: dict[str, Any] = {"dim": dim, "flops": 12 * batch * heads * tokens**2 * dim}
        seconds = 0.05 if rehearse else 0.4
        with torch.no_grad():
            row["ours"] = statistics.median(clock.measure(explicit, seconds))
            with ops.use_backend("torch"):
                row["func.jvp"] = statistics.median(clock.measure(lambda: transform(ops.attention), seconds))
            if peer and dim != 72:
                try:
                    row["jvp_flash_attention"] = statistics.median(clock.measure(lambda: transform(peer), seconds))
                except Exception as error:  # somebody else's code must not end the report
                    row["peer_error"] = str(error).splitlines()[0]
        rows.append(row)
    return rows


def time_steps(device: torch.device, clock: Clock, peak: float, rehearse: bool) -> list[dict[str, Any]]:
    """Training steps of b2 and xl2 at two local batches."""
    rows = []
    for preset in ("b2", "xl2"):
        config = small(PRESETS[preset][1].model) if rehearse else PRESETS[preset][1].model
        for batch in (4,) if rehearse else (32, 128):
            for name, objective in OBJECTIVES.items():
                row: dict[str, Any] = {"step": f"{preset} {name}", "batch": batch}
                rows.append(row)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                try:
                    step = training_step(config, objective, batch, device, torch.bfloat16)
                    times = clock.measure(step, 0.1 if rehearse else 8.0)
                except torch.OutOfMemoryError:
                    row["error"] = "out of memory"
                    continue
                median = statistics.median(times)
                row |= {
                    "seconds": median,
                    "spread": [min(times), max(times)],
                    "runs": len(times),
                    "samples_per_s": batch / median,
                    # Plain flow matching's three forwards' worth, whatever else the step does: comparable work.
                    "share_of_matrix_rate": 3 * forward_flops(config) * batch / median / 1e12 / peak,
                }
                if device.type == "cuda":
                    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                del step
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="everything in miniature, on a CPU")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("error: torch finds no GPU; `python -m benchmarks.gpu --rehearse` runs on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.rehearse else "cuda")
    clock = Clock(device)
    report: dict[str, Any] = {"environment": environment(device)}
    print(report["environment"], flush=True)

    report["checks"] = [*check_golden(device), *check_ops(device, args.rehearse), *check_synchronisation(device)]
    failed = [row for row in report["checks"] if not row["error"] <= row["bound"]]
    report["ceilings"] = ceilings(device, clock, args.rehearse)
    print(report["ceilings"], flush=True)
    report["ops"] = time_ops(device, clock, args.rehearse)
    report["dual_attention"] = time_dual_attention(device, clock, args.rehearse)
    report["steps"] = time_steps(device, clock, report["ceilings"]["bf16_tflop_per_s"], args.rehearse)
    if out := os.environ.get("OUT"):
        Path(out, "gpu.json").write_text(json.dumps(report, indent=1) + "\n")

    for row in report["checks"]:
        verdict = "FAILED" if row in failed else "ok"
        print(f"{row['check']:44} {row['error']:9.2e} of {row['bound']:7.1e}  {verdict}")
    print(f"\n{'op of XL/2, batch 64':36} {'fused ms':>9} {'plain ms':>9}")
    for row in report["ops"]:
        print(f"{row['op']:36} {row.get('triton', float('nan')) * 1e3:9.3f} {row['torch'] * 1e3:9.3f}")
    columns = ("ours", "func.jvp", "jvp_flash_attention")
    print(f"\n{'dual attention, head dim':24} {'TFLOP/s':>8}" + "".join(f" {name:>16} ms" for name in columns))
    for row in report["dual_attention"]:
        times = "".join(f" {row.get(name, float('nan')) * 1e3:19.3f}" for name in columns)
        print(f"{row['dim']:24} {row['flops'] / row['ours'] / 1e12:8.1f}{times}")
    print(f"\n{'step':22} {'batch':>5} {'ms':>9} {'samples/s':>10} {'of matrix rate':>14}")
    for row in report["steps"]:
        if "error" in row:
            print(f"{row['step']:22} {row['batch']:5} {row['error']}")
        else:
            print(
                f"{row['step']:22} {row['batch']:5} {row['seconds'] * 1e3:9.2f} {row['samples_per_s']:10.1f} "
                f"{row['share_of_matrix_rate']:14.1%}"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
