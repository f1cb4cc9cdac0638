"""`python -m benchmarks.scaling`: modelled step time of XL/2, or another preset, on 1 to 1,024 GPUs.

Memory and collectives are counted, by `mfengine.engine.plan`. The time of a step on a GPU and its host comes from the
roofline of `benchmarks.roofline`. The time that communication adds is modelled from `Hardware`, whose rates are
assumptions. `docs/scaling.md` says what the model includes and what it omits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.cases import OURS
from benchmarks.measure import Row
from benchmarks.roofline import PHASES, Assumptions, Roofline, gpu_data_sheet, roofline
from benchmarks.workload import small
from mfengine.cli import parse, run
from mfengine.configs import to_json
from mfengine.engine.config import TrainConfig
from mfengine.engine.plan import Collective, Plan, make_plan
from mfengine.engine.presets import PRESETS
from mfengine.errors import InputError
from mfengine.ranks import World

IMAGES = 1_281_167  # ImageNet's training set
WEAK_BATCH = 32  # rows per GPU in the regime where the global batch grows with the number of GPUs
STRONG, WEAK = "the preset's global batch", "local batch 32"
KINDS = ("all-gather", "reduce-scatter", "all-reduce")

Strategy = Literal["full", "gathered once", "hybrid"]
STRATEGIES: dict[Strategy, str] = {
    "full": "sharded over all ranks, parameters freed after each forward (--reshard)",
    "gathered once": "sharded over all ranks, gathered once per step (the default)",
    "hybrid": "sharded in a node, replicated over nodes, gathered once per step (--replicas NODES)",
}


@dataclass(frozen=True)
class Hardware(Assumptions):
    """Assumed, not measured: nodes of eight H200. Rates are from data sheets, latencies from NCCL's tuning tables."""

    roofline_share: float = 1.0
    """share of the roofline that a GPU's kernels reach; --measured replaces it"""
    gpus_per_node: int = 8
    """GPUs connected by NVLink"""
    nvlink_gb_per_s: float = 450.0
    """GB/s of NVLink per GPU, each way (H200 data sheet: 900 both ways)"""
    network_gb_per_s: float = 50.0
    """GB/s of the network per GPU, each way: one 400 Gb/s port per GPU"""
    bandwidth_share: float = 0.8
    """share of the rates of NVLink and network that is reached"""
    collective_us: float = 14.0
    """us of latency of any collective (NCCL's src/graph/tuning.cc, LL128)"""
    nvlink_hop_us: float = 1.9
    """us per hop of a ring inside a node (same source)"""
    network_hop_us: float = 4.0
    """us per hop of a ring between nodes (same source)"""
    collective_launches: float = 3.0
    """operators launched for each collective besides itself: copies into and out of its buffer"""
    host_hop_us: float = 50.0
    """us per hop of the ring on which hosts exchange loss and signals (gloo, TCP)"""


# ----------------------------------------------------------------------------
# Counting.


def nodes(c: Collective, hw: Hardware) -> int:
    """Number of nodes with ranks of a collective. Copies of a shard, which reduce their gradients, are one per node."""
    if c.kind == "all-reduce" and c.phase == "backward":
        return c.ranks
    return -(-c.ranks // hw.gpus_per_node)


def sent_between_nodes(c: Collective, hw: Hardware) -> float:
    """Bytes that each rank sends through its network port: a ring leaves each node once, shared by the node's ranks."""
    return c.sent * nodes(c, hw) / c.ranks if nodes(c, hw) > 1 else 0.0


def plan(config: TrainConfig, ranks: int, strategy: Strategy, batch: int, hw: Hardware) -> Plan:
    """The plan of a run with `batch` rows per GPU."""
    replicas = max(1, ranks // hw.gpus_per_node) if strategy == "hybrid" else 1
    layout = {"replicas": replicas, "reshard": strategy == "full", "batch_size": ranks * batch}
    return make_plan(dataclasses.replace(config, **layout), World(0, ranks, torch.device("cuda")))


# ----------------------------------------------------------------------------
# The model of step time.


def collective_seconds(c: Collective, hw: Hardware) -> float:
    """A ring's latency and transfer; an all-reduce has the latency of a tree if that is less, as NCCL chooses.

    Hops of a ring are counted as in NCCL: (nodes - 1) between nodes, the others inside. All ports of a node share a
    ring that spans nodes.
    """
    if c.ranks == 1:
        return 0.0
    n = nodes(c, hw)
    if c.kind == "all-reduce":
        inside, between = 2 * (c.ranks / n - 1), 2 * math.log2(n)
    else:
        inside, between = c.ranks - n, n - 1
    latency = (hw.collective_us + inside * hw.nvlink_hop_us + between * hw.network_hop_us) / 1e6
    network = hw.network_gb_per_s * c.ranks / n
    rate = hw.nvlink_gb_per_s if n == 1 else min(hw.nvlink_gb_per_s, network)
    return latency + c.sent / (rate * 1e9 * hw.bandwidth_share)


def phase_seconds(busy: float, collectives: list[Collective], hw: Hardware) -> float:
    """Exposed communication: the part longer than the computation beside it, plus the longest collective of each kind.

    The latter stands for the ends of the pipeline: nothing is computed before the first gather of a block, and nothing
    is left to compute after its last reduction. Collectives inside nodes and between them use different links.
    """
    links: defaultdict[bool, float] = defaultdict(float)
    ends: defaultdict[str, float] = defaultdict(float)
    for c in collectives:
        seconds = collective_seconds(c, hw)
        links[nodes(c, hw) > 1] += seconds
        ends[c.kind] = max(ends[c.kind], seconds)
    end = sum(ends.values())
    return end + max(busy, max(links.values(), default=0.0) - end)


class Point(NamedTuple):
    """A modelled configuration. Times in seconds per step, memory in bytes per GPU."""

    ranks: int
    strategy: Strategy
    batch: int  # rows per GPU
    device: float  # time of the kernels
    host: float  # time to launch everything
    exposed: float  # time that communication adds
    step: float
    memory: float

    @property
    def samples_per_s(self) -> float:
        return self.ranks * self.batch / self.step

    def days(self, epochs: float) -> float:
        return epochs * IMAGES / self.samples_per_s / 86400

    def gpu_hours(self, epochs: float) -> float:
        return self.days(epochs) * 24 * self.ranks


def model_point(plan: Plan, strategy: Strategy, step: Roofline, hw: Hardware) -> Point:
    """One step of a plan; `step` is a rank's computation in it, including the update of all parameters."""
    config, ranks = plan.config, plan.world.size
    of_phase = {name: [c for c in plan.communication if c.phase == name] for name in PHASES}
    per_launch = (hw.host_operator_us + hw.host_launch_us) / 1e6
    host = {name: step.host[name] + hw.collective_launches * len(of_phase[name]) * per_launch for name in PHASES}
    device = {name: seconds / hw.roofline_share for name, seconds in step.device.items()}
    device["optimizer"] *= config.replicas / ranks  # only the rank's shard
    seconds = busy = max(device["optimizer"], host["optimizer"])
    for name in PHASES[:3]:
        alone = max(device[name], host[name])
        together = phase_seconds(alone, of_phase[name], hw)
        if name == "backward":  # the hosts' all-gather runs beside it, and the optimizer waits for that
            together = max(together, (ranks - 1) * hw.host_hop_us / 1e6)
        busy, seconds = busy + alone, seconds + together
    return Point(
        ranks=ranks,
        strategy=strategy,
        batch=step.rows,
        device=sum(device.values()),
        host=sum(host.values()),
        exposed=seconds - busy,
        step=seconds,
        memory=sum(plan.memory.values()),
    )


# ----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class Arguments:
    """Modelled step time of training on N GPUs: roofline of a GPU, counted communication, assumed rates."""

    preset: Literal[
        "b4", "b2", "m2", "l2", "xl2", "xl2-plus", "imf-b2", "imf-m2", "imf-l2", "imf-xl2"
    ] = "xl2"  # fmt: skip
    """preset to train"""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """numbers of GPUs; above one node, whole nodes"""
    gpu: str = "h200"
    """GPU by name, such as h100-pcie"""
    hardware: Hardware = field(default_factory=Hardware)
    measured: Path | None = None
    """gpu.json of `python -m benchmarks.gpu`; its guided step of this preset gives the share of the roofline"""
    json: Path | None = None
    """write counts and modelled times to this JSON file"""
    plot: Path | None = None
    """draw counts and modelled times to this .png file"""
    rehearse: bool = False
    """use a small network instead"""

    def __post_init__(self) -> None:
        node = self.hardware.gpus_per_node
        for n in self.gpus:
            if n < 1 or (n > node and n % node):
                raise ValueError(f"gpus must be at least 1, and above {node} a multiple of {node}, not {n}")
        if not self.gpus:
            raise ValueError("gpus needs at least one number")


def measured_share(path: Path, preset: str, config: TrainConfig, gpu: str, hw: Hardware) -> float:
    """Share of the device's roofline reached by a measured guided step of a preset, at its largest batch.

    Raises:
        InputError: the file has no such step.
    """
    try:
        rows = [Row(**row) for row in json.loads(path.read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path} as a report of benchmarks.gpu: {error!r}") from None
    rows = [row for row in rows if row.implementation == OURS and row.label.startswith(f"step: guided, {preset} ")]
    if not rows:
        raise InputError(f"{path} has no measured step 'guided, {preset}'; run python -m benchmarks.gpu on a GPU")
    best = max(rows, key=lambda row: row.samples)
    found = roofline(config.model, config.method, best.samples, gpu, hw, config.optim)
    return sum(found.device.values()) / best.seconds


def strategies(ranks: int, hw: Hardware) -> list[Strategy]:
    """The strategies that differ on this many ranks. In one node, hybrid is gathered once; one rank gathers nothing."""
    if ranks == 1:
        return ["gathered once"]
    return list(STRATEGIES) if ranks > hw.gpus_per_node else ["full", "gathered once"]


def scaling(args: Arguments) -> dict[str, Any]:
    """Counts and modelled points for the command line, as plain values."""
    config = PRESETS[args.preset][1]
    if args.rehearse:
        config = dataclasses.replace(config, model=small(config.model))
    hw = args.hardware
    memory = 1e9 * gpu_data_sheet(args.gpu).memory_gb
    if args.measured:
        hw = dataclasses.replace(hw, roofline_share=measured_share(args.measured, args.preset, config, args.gpu, hw))
    counts, points = [], []
    infeasible: dict[int, str] = {}
    for ranks in args.gpus:
        batches = {WEAK: WEAK_BATCH}
        try:
            batches[STRONG] = config.local_batch(ranks)
        except InputError as error:
            infeasible[ranks] = str(error)
        for strategy in strategies(ranks, hw):
            for regime, batch in batches.items():
                planned = plan(config, ranks, strategy, batch, hw)
                step = roofline(config.model, config.method, batch, args.gpu, hw, config.optim, gathered=ranks > 1)
                point = model_point(planned, strategy, step, hw)
                rates = {
                    "samples_per_s": point.samples_per_s,
                    "days": point.days(config.epochs),
                    "gpu_hours": point.gpu_hours(config.epochs),
                    "fits": point.memory <= memory,
                }
                points.append({"regime": regime, **point._asdict(), **rates})
            counts.append(counted(planned, strategy, hw))
    return {
        "note": "collectives are counted; every time is modelled",
        "hardware": to_json(hw),
        "gpu": args.gpu,
        "epochs": config.epochs,
        "counts": counts,
        "points": points,
        "infeasible": {STRONG: infeasible},
    }


def counted(plan: Plan, strategy: Strategy, hw: Hardware) -> dict[str, Any]:
    """One row of counts: collectives between devices, and the bytes that each rank sends for them."""
    row: dict[str, Any] = {"ranks": plan.world.size, "strategy": strategy, "parameters": plan.parameters}
    for kind in KINDS:
        sizes = [c.bytes for c in plan.communication if c.kind == kind]
        row[kind] = {"count": len(sizes), "bytes": sum(sizes)}
    row["sent_between_nodes"] = sum(sent_between_nodes(c, hw) for c in plan.communication)
    row["sent_in_node"] = sum(c.sent for c in plan.communication) - row["sent_between_nodes"]
    row["collectives"] = [{"count": n, **c._asdict()} for c, n in Counter(plan.communication).items()]
    return row


def tables(report: dict[str, Any]) -> str:
    """Counts and modelled points in Markdown."""
    lines = [
        "Counted, per rank and step: number and GB of the whole tensors; GB that each GPU sends.",
        "",
        "| ranks | strategy | all-gather | reduce-scatter | all-reduce | sent in the node | sent between nodes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["counts"]:
        kinds = [row[kind] for kind in KINDS]
        cells = [f"{k['count']}, {k['bytes'] / 1e9:.2f}" if k["count"] else "-" for k in kinds]
        sent = [f"{row[where] / 1e9:.2f}" for where in ("sent_in_node", "sent_between_nodes")]
        if row["ranks"] > 1:
            lines.append(f"| {row['ranks']} | {' | '.join([row['strategy'], *cells, *sent])} |")
    for regime in (STRONG, WEAK):
        lines += [
            "",
            f"Modelled, not measured: {regime}, {report['epochs']:g} epochs.",
            "",
            "| GPUs | strategy | rows per GPU | device ms | host ms | communication adds ms | step ms | samples/s | "
            "memory GB | days | GPU-hours |",
            "|" + " --- |" * 11,
        ]
        for p in report["points"]:
            if p["regime"] == regime:
                ms = " | ".join(f"{p[name] * 1e3:.1f}" for name in ("device", "host", "exposed", "step"))
                fits = "" if p["fits"] else ", too much"
                strategy = p["strategy"] if p["ranks"] > 1 else "-"
                lines.append(
                    f"| {p['ranks']} | {strategy} | {p['batch']} | {ms} | {p['samples_per_s']:,.0f} | "
                    f"{p['memory'] / 1e9:.0f}{fits} | {p['days']:.2f} | {p['gpu_hours']:,.0f} |"
                )
        lines += [f"\nInfeasible on {n} GPUs: {why}." for n, why in report["infeasible"].get(regime, {}).items()]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Samples per second and GPU if the batch grows with the GPUs; days if it does not."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    weak, strong = figure.subplots(1, 2)
    gpus_per_node = report["hardware"]["gpus_per_node"]
    styles = {"full": ("#b5402f", "s"), "gathered once": ("#2f6db5", "o"), "hybrid": ("#2f8f5b", "^")}
    for axes, regime, value in (
        (weak, WEAK, lambda p: p["samples_per_s"] / p["ranks"]),
        (strong, STRONG, lambda p: p["days"]),
    ):
        shown = [p for p in report["points"] if p["regime"] == regime and p["fits"]]
        node = [p for p in shown if p["strategy"] == "gathered once" and p["ranks"] <= gpus_per_node]
        begins = {"full": node[:1], "gathered once": [], "hybrid": node[-1:]}  # points that layouts share
        for strategy, (colour, marker) in styles.items():
            points = begins[strategy] + [p for p in shown if p["strategy"] == strategy]
            x, y = [p["ranks"] for p in points], [value(p) for p in points]
            axes.plot(x, y, color=colour, marker=marker, markersize=5, label=strategy)
        axes.set_xscale("log", base=2)
        ticks = sorted({p["ranks"] for p in report["points"] if p["regime"] == regime})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.tick_params(axis="x", labelsize=9)
        axes.minorticks_off()
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
    weak.set_title("32 rows per GPU")
    weak.set_ylabel("samples/s per GPU (modelled)")
    weak.set_ylim(bottom=0)
    weak.legend()
    strong.set_title("the preset's global batch")
    strong.set_ylabel(f"days for {report['epochs']:g} epochs (modelled)")
    strong.set_yscale("log", base=2)
    strong.yaxis.set_major_formatter("{x:g}")
    ones = [p for p in report["points"] if p["regime"] == STRONG and p["ranks"] == 1]
    if ones:
        x = sorted({p["ranks"] for p in report["points"] if p["regime"] == STRONG})
        strong.plot(x, [ones[0]["days"] / n for n in x], color="grey", linestyle=":", label="perfect scaling")
        strong.legend()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "python -m benchmarks.scaling")
    for path in (args.json, args.plot):
        if path and not path.parent.is_dir():
            raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise InputError("--plot needs matplotlib: pip install 'mfengine[bench]'") from None
    report = scaling(args)
    print(tables(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        draw(report, args.plot)


if __name__ == "__main__":
    run(main)
