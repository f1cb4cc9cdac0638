"""`python -m benchmarks.roofline xl2 --rows 32 --gpu h200`: the least time of a training step, operator by operator.

Counted, exactly: every operator that the real step dispatches, with its FLOPs, bytes and output tiles
(`benchmarks/operators.py`). Modelled: the least time that each takes at ceilings of the GPU, and what the host takes to
issue them. No time here is measured. The output is Markdown; `--json FILE` writes every operator.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

from benchmarks.measure import table
from benchmarks.operators import TILE, Operator, step_operators, total
from mfengine.configs import choose
from mfengine.engine.config import OptimConfig
from mfengine.engine.plan import Phase
from mfengine.engine.presets import PRESETS
from mfengine.engine.rates import DATA_SHEETS, DataSheet, data_sheet
from mfengine.errors import InputError
from mfengine.methods import ObjectiveConfig
from mfengine.networks import NetworkConfig

PHASES: tuple[Phase, ...] = get_args(Phase)
LARGEST = 10  # rows of the table of operators


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about a GPU and its host, in addition to the data sheet."""

    matrix_share: float = 0.8
    """share of the data sheet's rate that products reach: H100 and H200, 790 TFLOP/s on large random matrices"""
    memory_share: float = 0.9
    """share of the data sheet's memory bandwidth that kernels reach: large copies, 3.0 TB/s (H100), 4.3 TB/s (H200)"""
    kernel_us: float = 2.5
    """least device time of a kernel, in us"""
    host_operator_us: float = 5.0
    """host time per dispatched operator in us, including the surrounding Python code and autograd"""
    host_launch_us: float = 10.0
    """additional host time per operator that launches a kernel, in us"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")


def gpu_data_sheet(name: str) -> DataSheet:
    """The data sheet of a GPU by its name; InputError if the name is unknown."""
    if (sheet := data_sheet(name)) is None:
        raise InputError(f"unknown GPU {name}; known are {', '.join('-'.join(w).lower() for w in DATA_SHEETS)}")
    return sheet


class Cost(NamedTuple):
    """The least time of one call of an operator."""

    seconds: float
    bound: str
    """the ceiling that bounds it: product, memory or launch; empty for a view"""
    waves: float
    """waves of output tiles over the multiprocessors; 0 unless the operator is a matrix product"""


@dataclass(frozen=True)
class Roofline:
    """The least time of one step on one GPU."""

    sheet: DataSheet
    assumed: Assumptions
    rows: int
    operators: Counter[Operator]
    primal: Counter[Operator]
    """operators of the forward without tangents"""
    measured_host: float | None = None
    """measured host time of a step in seconds, if known"""

    def cost(self, operator: Operator) -> Cost:
        """The least time of one call. The last wave of a matrix product takes as long as a full one."""
        if not operator.launches:
            return Cost(0.0, "", 0.0)
        peak = self.sheet.single_tflops if operator.dtype in ("f32", "f64") else self.sheet.tflops
        waves = operator.tiles / self.sheet.multiprocessors
        lost = math.ceil(waves) / waves if waves else 1.0
        seconds = {
            "product": operator.flops * lost / (peak * 1e12 * self.assumed.matrix_share),
            "memory": (operator.read + operator.written) / (self.sheet.gb_per_s * 1e9 * self.assumed.memory_share),
            "launch": self.assumed.kernel_us / 1e6,
        }
        bound = max(seconds, key=lambda name: seconds[name])
        return Cost(seconds[bound], bound, waves)

    @cached_property
    def kinds(self) -> dict[str, dict[str, float]]:
        """Device seconds by pass and kind; the tangent is the time of the forward beyond one without tangents."""
        found: dict[str, defaultdict[str, float]] = {
            name: defaultdict(float) for name in ("guidance", "primal", "tangent", "backward", "optimizer")
        }
        for operator, n in self.operators.items():
            found["tangent" if operator.phase == "forward" else operator.phase][operator.kind] += (
                n * self.cost(operator).seconds
            )
        for operator, n in self.primal.items():
            seconds = n * self.cost(operator).seconds
            found["primal"][operator.kind] += seconds
            found["tangent"][operator.kind] -= seconds
        return {name: dict(seconds) for name, seconds in found.items()}

    @cached_property
    def bounds(self) -> dict[str, float]:
        """Device seconds by cause; the last waves of products are separate from their FLOPs."""
        found = dict.fromkeys(("product", "last wave", "memory", "launch"), 0.0)
        for operator, n in self.operators.items():
            seconds, bound, waves = self.cost(operator)
            lost = seconds * (1 - waves / math.ceil(waves)) if bound == "product" and waves else 0.0
            found["last wave"] += n * lost
            if bound:
                found[bound] += n * (seconds - lost)
        return found

    @cached_property
    def device(self) -> dict[Phase, float]:
        """Device seconds by phase."""
        found = dict.fromkeys(PHASES, 0.0)
        for operator, n in self.operators.items():
            found[operator.phase] += n * self.cost(operator).seconds
        return found

    @cached_property
    def dispatched(self) -> dict[Phase, int]:
        """Dispatched operators by phase, including views."""
        return {name: sum(n for o, n in self.operators.items() if o.phase == name) for name in PHASES}

    @cached_property
    def launches(self) -> dict[Phase, int]:
        """Operators that launch kernels, by phase."""
        return {name: total(self.operators, "launches", phase=name) for name in PHASES}

    @cached_property
    def host(self) -> dict[Phase, float]:
        """Host seconds by phase; a measured sum is divided in the proportions of the model."""
        per_operator, per_launch = self.assumed.host_operator_us / 1e6, self.assumed.host_launch_us / 1e6
        found = {name: per_operator * self.dispatched[name] + per_launch * self.launches[name] for name in PHASES}
        scale = 1.0 if self.measured_host is None else self.measured_host / sum(found.values())
        return {name: scale * seconds for name, seconds in found.items()}

    @property
    def seconds(self) -> float:
        """Time of the step: each phase takes the longer of device and host."""
        return sum(max(self.device[name], self.host[name]) for name in PHASES)

    @property
    def samples_per_s(self) -> float:
        return self.rows / self.seconds

    @property
    def flops(self) -> int:
        return total(self.operators, "flops")

    @property
    def bytes(self) -> int:
        return total(self.operators, "read", "written")


def roofline(
    model: NetworkConfig,
    method: ObjectiveConfig,
    rows: int,
    gpu: str,
    assumed: Assumptions | None = None,
    optim: OptimConfig | None = None,
    *,
    gathered: bool = False,
    measured_host: float | None = None,
) -> Roofline:
    """The least time of a training step.

    Args:
        model, method, rows, optim, gathered: the step, as for `step_operators`.
        gpu: a name as for `data_sheet`.
        assumed: assumptions; None means the defaults.
        measured_host: measured host time of the step in seconds, which replaces the modelled one.

    Raises:
        InputError: the GPU is unknown, or the objective cannot divide this number of rows.
    """
    sheet = gpu_data_sheet(gpu)
    try:
        method.check_batch(rows)
    except ValueError as error:
        raise InputError(str(error)) from None
    operators, primal = step_operators(model, method, rows, optim or OptimConfig(), gathered=gathered)
    return Roofline(sheet, assumed or Assumptions(), rows, operators, primal, measured_host)


def predicted_seconds(model: NetworkConfig, method: ObjectiveConfig, rows: int, gpu: str) -> float:
    """Seconds of a training step on a GPU; 0 if its data sheet is unknown."""
    return roofline(model, method, rows, gpu).seconds if data_sheet(gpu) else 0.0


# ----------------------------------------------------------------------------
# The command.


def report(found: Roofline) -> dict[str, Any]:
    """A roofline as plain values, times in seconds, operators with the longest first."""
    operators = [
        {**operator._asdict(), "count": n, **cost._asdict(), "total": n * cost.seconds}
        for operator, n in found.operators.items()
        for cost in [found.cost(operator)]
    ]
    return {
        "note": "operators, FLOPs and bytes are counted; every time is modelled",
        "data_sheet": found.sheet._asdict(),
        "assumptions": asdict(found.assumed),
        "rows": found.rows,
        "seconds": found.seconds,
        "samples_per_s": found.samples_per_s,
        "device": found.device,
        "host": found.host,
        "dispatched": found.dispatched,
        "launches": found.launches,
        "kinds": found.kinds,
        "bounds": found.bounds,
        "flops": found.flops,
        "bytes": found.bytes,
        "operators": sorted(operators, key=lambda row: -row["total"]),
    }


def markdown(found: Roofline, name: str, gpu: str) -> str:
    """Passes and kinds, the largest operators, and the times of device and host."""
    device, host = sum(found.device.values()), sum(found.host.values())
    passes = list(found.kinds)
    kinds = Counter({k: sum(s.get(k, 0.0) for s in found.kinds.values()) for s in found.kinds.values() for k in s})
    lines = [
        [kind, *(f"{1e3 * found.kinds[p].get(kind, 0.0):.2f}" for p in passes), f"{1e3 * s:.2f}", f"{s / device:.0%}"]
        for kind, s in kinds.most_common()
        if kind != "view"
    ]
    sums = [f"{1e3 * sum(found.kinds[p].values()):.2f}" for p in passes]
    lines.append(["device, ms", *sums, f"{1e3 * device:.2f}", "100%"])
    rate = found.flops / found.seconds / 1e12
    return "\n\n".join(
        [
            f"## {name}, {found.rows} rows on one {gpu.upper()}: {found.samples_per_s:,.0f} samples/s (modelled)",
            f"Device {1e3 * device:.1f} ms, host {1e3 * host:.1f} ms "
            f"({'modelled' if found.measured_host is None else 'given'}). Each pass takes the longer of the two.\nThe "
            f"step takes {1e3 * found.seconds:.1f} ms: {found.flops / 1e12:.2f} TFLOP at {rate:.0f} TFLOP/s, "
            f"{rate / found.sheet.tflops:.0%} of the data sheet's rate, and {found.bytes / 1e9:.1f} GB.",
            table(["ms by kind and pass", *passes, "all", "share"], lines),
            _by_phase(found),
            "Device time by cause: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in found.bounds.items()) + ".",
            f"The {LARGEST} largest operators:",
            _largest(found, device),
        ]
    )


def _by_phase(found: Roofline) -> str:
    lines = [
        [
            name, f"{found.dispatched[name]:,}", f"{found.launches[name]:,}",
            f"{1e3 * found.device[name]:.2f}", f"{1e3 * found.host[name]:.2f}",
            "host" if found.host[name] > found.device[name] else "device",
        ]
        for name in PHASES
    ]  # fmt: skip
    return table(["pass", "operators", "launches", "device, ms", "host, ms", "longer"], lines)


def _largest(found: Roofline, device: float) -> str:
    costs = {operator: found.cost(operator) for operator in found.operators}
    largest = sorted(costs, key=lambda operator: -found.operators[operator] * costs[operator].seconds)[:LARGEST]
    lines = []
    for operator in largest:
        n, cost = found.operators[operator], costs[operator]
        lines.append(
            [
                operator.phase, operator.kind, f"`{operator.name} {operator.shapes}`", f"{n}",
                f"{operator.flops / 1e9:,.1f}", f"{(operator.read + operator.written) / 1e6:,.1f}",
                f"{cost.waves:.2f}" if cost.waves else "",
                f"{cost.waves / math.ceil(cost.waves):.0%}" if cost.waves else "",
                cost.bound, f"{1e6 * cost.seconds:,.1f}", f"{1e3 * n * cost.seconds:.2f}",
                f"{n * cost.seconds / device:.1%}",
            ]
        )  # fmt: skip
    header = [
        "pass", "kind", "operator", "calls", "GFLOP", "MB", "waves", "filled", "bound by", "us", "all, ms", "of device",
    ]  # fmt: skip
    return table(header, lines)


def assumptions(found: Roofline, gpu: str) -> str:
    """The assumptions behind the times, as a Markdown list."""
    sheet, assumed = found.sheet, found.assumed
    return "\n".join(
        [
            f"- {gpu.upper()} data sheet: {sheet.tflops:,.1f} TFLOP/s in bfloat16 products, "
            f"{sheet.single_tflops:g} in float32, {sheet.gb_per_s:,.0f} GB/s, {sheet.multiprocessors} multiprocessors.",
            f"- Products reach {assumed.matrix_share:.0%} of these rates, memory {assumed.memory_share:.0%}.",
            f"- A matrix product takes whole waves of {TILE} x {TILE} tiles over the multiprocessors.",
            "- Attention's FLOPs run at the rate of products, including those that its backward recomputes.",
            "- An operator reads and writes each tensor once, in device memory: nothing stays in a cache.",
            f"- Each operator except a view is one kernel of at least {assumed.kernel_us:g} us on the device.",
            f"- The host takes {assumed.host_operator_us:g} us for each operator, and {assumed.host_launch_us:g} us "
            "more if the operator launches a kernel.",
            "- *Primal* is a forward without tangents. *Tangent* is the rest of the forward, with target and loss.",
        ]
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(argv: Sequence[str]) -> None:
    parser = _Parser(
        prog="benchmarks.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help=f"preset to model: {', '.join(PRESETS)}")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[32], help="rows per GPU and step; several values give several tables"
    )
    parser.add_argument("--gpu", default="h200", help="GPU whose data sheet to use, such as h100-pcie")
    parser.add_argument(
        "--host-ms", type=float, help="measured host time of a step in ms, which replaces the modelled one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all operators and sums to FILE")
    args = parser.parse_args(argv)
    config = PRESETS[choose("preset", args.preset, PRESETS)][1]
    if min(args.rows) < 1 or (args.host_ms is not None and not args.host_ms > 0):
        raise InputError("--rows and --host-ms must be positive")
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"cannot write {args.json}: the folder {args.json.parent} does not exist")
    host = None if args.host_ms is None else args.host_ms / 1e3
    found = [
        roofline(config.model, config.method, rows, args.gpu, optim=config.optim, measured_host=host)
        for rows in args.rows
    ]
    print(f"# Roofline of a training step\n\n    python -m benchmarks.roofline {shlex.join(argv)}\n")
    print(assumptions(found[0], args.gpu))
    for one in found:
        print(f"\n{markdown(one, args.preset, args.gpu)}")
    if args.json:
        args.json.write_text(json.dumps([report(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    from mfengine.cli import run  # needs tyro, which the GPU script does without

    run(main)
