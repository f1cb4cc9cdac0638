"""`python -m benchmarks.attention`: how fast each implementation of attention is on this device.

Where no tangent is needed, and in the backward, the fastest one runs: `mfengine/ops/choice.py` reads the times that
this writes to mfengine/ops/attention_times.json, beside those of other devices.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import rotating
from benchmarks.measure import environment, make_clock, measure, summarise
from benchmarks.report import attention_table
from mfengine import ops
from mfengine.engine.presets import PRESETS
from mfengine.ops.choice import TIMES, WORK, Implementation, Work, device_name, why_not

Shape = tuple[int, int, int]  # head dim, tokens, heads
Row = dict[str, Any]  # work, dtype, dim, tokens, heads, batch; times: {implementation: seconds, fastest, slowest}

TURNS = 3  # of all implementations one after the other, so that a disturbance meets each of them


def preset_shapes() -> list[Shape]:
    """One for each head dim and number of tokens."""
    models = [config.model for _, config in PRESETS.values()]
    heads = {(model.hidden_size // model.num_heads, model.num_tokens): model.num_heads for model in models}
    return [(*key, number) for key, number in sorted(heads.items())]


def time_attention(
    device: torch.device, shapes: list[Shape] | None = None, batches: tuple[int, ...] = (), seconds: float = 0.3
) -> Iterator[Row]:
    """Times of all kinds of work, for each shape, dtype and batch.

    Args:
        device: where.
        shapes: those of the presets if None.
        batches: 32 and 256 on a GPU, 4 and 32 on a CPU, if none are given.
        seconds: how long to time one implementation of one row.
    """
    gpu = device.type == "cuda"
    clock = make_clock(device)
    for dim, tokens, heads in shapes or preset_shapes():
        for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.float32,):
            for batch in batches or ((32, 256) if gpu else (4, 32)):
                for work, names in WORK.items():
                    rounds: dict[str, list[float]] = {}
                    for name in names * TURNS:
                        if why_not(name, work, device, dtype, dim) or _no_dual(work, device, dtype, dim):
                            continue
                        try:
                            call = make_call(work, name, device, dtype, (batch, tokens, 3 * heads * dim), heads)
                            rounds.setdefault(name, []).extend(measure(call, clock, seconds / TURNS))
                        except Exception as error:  # one that does not run here must not end the others
                            print(f"{work} of {dim} x {tokens} by {name}: {type(error).__name__}: {error}", flush=True)
                    times = {name: summarise(found) for name, found in rounds.items()}
                    if times:
                        shape = {"dim": dim, "tokens": tokens, "heads": heads, "batch": batch}
                        yield {"work": work, "dtype": str(dtype).removeprefix("torch."), **shape, "times": times}


def _no_dual(work: Work, device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether there are no fused duals, beside which this work is done."""
    return work in ("instant", "backward") and why_not("triton", work, device, dtype, dim) is not None


def make_call(
    work: Work, name: Implementation, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], heads: int
) -> Callable[[], Any]:
    """What is timed: attention over a packed product, as the network has it; a quarter of the rows are dual."""
    batch, tokens, width = shape
    packed = torch.ops.mfengine

    def inputs() -> tuple[torch.Tensor, ...]:
        qkv = torch.randn(shape, device=device).to(dtype)
        if work == "training":
            return qkv.requires_grad_(), torch.randn(batch, tokens, width // 3, device=device).to(dtype)
        if work == "instant":
            return qkv, torch.randn(max(1, batch // 4), tokens, width, device=device).to(dtype)
        if work == "backward":
            o, lse = packed.attention_packed(qkv, heads)
            return qkv, o, lse, torch.randn_like(o)
        return (qkv,)

    following = rotating(inputs)

    def call() -> None:
        qkv, *others = following()
        if work == "instant":
            packed.attention_packed_dual(qkv, *others, heads, name, "triton")
        elif work == "backward":
            packed.attention_packed_backward(qkv, *others, heads, name)
        else:
            with ops.use_attention(name):
                o = ops.attention_packed(qkv, heads)
            if work == "training":
                torch.autograd.grad(o, qkv, *others)

    return call


def write(rows: list[Row], device: torch.device, file: Path) -> None:
    """Write the times of a device to `file`, beside those of the others that mfengine has."""
    versions = environment(device)
    if any("flash-attn" in row["times"] for row in rows):
        versions["flash-attn"] = import_module("flash_attn").__version__
    devices = json.loads(TIMES.read_text()) | {device_name(device): {"environment": versions, "rows": rows}}
    lines = []
    for name, entry in sorted(devices.items()):
        found = ",\n".join("  " + json.dumps(row, default=str) for row in map(_rounded, entry["rows"]))
        lines.append(
            f'{json.dumps(name)}: {{"environment": {json.dumps(entry["environment"])}, "rows": [\n{found}\n]}}'
        )
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.rename(file)


def _rounded(row: Row) -> Row:
    """With four digits, which is more than a clock tells."""
    times = {
        name: {key: value if isinstance(value, int) else float(f"{value:.4g}") for key, value in found.items()}
        for name, found in row["times"].items()
    }
    return {**row, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TIMES, metavar="FILE", help="write there, not into mfengine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = list(time_attention(device))
    write(rows, device, args.out)
    print(f"{device_name(device)}\n\n{attention_table(rows)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
