"""`python -m benchmarks.gpu`: is everything right on this GPU, and how fast is it?

One script for an hour with a GPU: golden cases, ops against float64, host synchronisations, ceilings of the machine,
training steps. A short table comes last; with OUT set, everything goes to $OUT/gpu.json. Needs torch and numpy only.
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


def check_ops(device: torch.device, rehearse: bool) -> list[dict[str, Any]]:
    """Output, tangent and gradient of each op against float64."""
    bounds = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
    batch, tokens, width = (3, 17, 24) if rehearse else (6, 257, 1152)
    stream, rows = (batch, tokens, width), (batch, width)
    heads = 1 if rehearse else 16
    cases: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
        "attention": (lambda qkv: ops.attention_packed(qkv, heads), [(batch, tokens, 3 * width)]),
        "adaln_modulate": (ops.adaln_modulate, [stream, rows, rows]),
        "gated_residual": (ops.gated_residual, [stream, stream, rows]),
        "gelu": (ops.gelu, [stream]),
        "silu": (ops.silu, [rows]),
    }
    results = []
    for name, (op, shapes) in cases.items():
        for dtype, bound in bounds.items():
            torch.manual_seed(0)
            primals = [torch.randn(s, device=device).to(dtype) for s in shapes]
            tangents = [torch.randn(s, device=device).to(dtype)[batch // 2 :] for s in shapes]
            weight = torch.randn(op(*primals).shape, device=device)

            def run(dtype: torch.dtype, op: Any = op, p: Any = primals, t: Any = tangents, w: Any = weight) -> Any:
                leaves = [x.to(dtype).requires_grad_() for x in p]
                dual = op(*(Dual(x, dx.to(dtype)) for x, dx in zip(leaves, t, strict=True)))
                gradients = torch.autograd.grad((dual.primal * w.to(dtype)).sum(), leaves)
                return [dual.primal.detach(), dual.tangent, *gradients]

            errors = [
                float((a.double() - e).norm() / e.norm()) for a, e in zip(run(dtype), run(torch.float64), strict=True)
            ]
            label = str(dtype).removeprefix("torch.")
            results.append({"check": f"{name} {label}", "error": max(errors), "bound": bound})
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
    report["steps"] = time_steps(device, clock, report["ceilings"]["bf16_tflop_per_s"], args.rehearse)
    if out := os.environ.get("OUT"):
        Path(out, "gpu.json").write_text(json.dumps(report, indent=1) + "\n")

    for row in report["checks"]:
        verdict = "FAILED" if row in failed else "ok"
        print(f"{row['check']:34} {row['error']:9.2e} of {row['bound']:7.1e}  {verdict}")
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
