"""`python -m benchmarks.scaling`: modelled step time of XL/2, or another preset, on 1 to 1,024 GPUs.

The work is counted: this process takes the place of rank 0 in a fake process group of N ranks, and runs the real
layout, loss, backward, reduction and optimizer on tensors that have shapes and no values. Every collective is recorded
as it reaches PyTorch's dispatcher. The time is modelled, from the counts and from `Hardware`, whose rates are
assumptions. `docs/scaling.md` says what is in the model, and what is not.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.cases import OURS
from benchmarks.counts import launches
from benchmarks.measure import Row
from benchmarks.workload import small
from mfengine import DiT, MeanFlow
from mfengine.cli import parse, run
from mfengine.configs import to_json
from mfengine.engine.config import TrainConfig
from mfengine.engine.distributed import prepare_model, reduce_gradients
from mfengine.engine.optim import adamw_ema
from mfengine.engine.presets import PRESETS
from mfengine.errors import InputError
from mfengine.ops import use_backend
from mfengine.ranks import World

IMAGES = 1_281_167  # ImageNet's training set
WEAK_BATCH = 32  # rows per GPU where the global batch grows with the GPUs
STRONG, WEAK = "global batch 256", "local batch 32"
COUNTED_BATCH = 2048  # rows over which FLOPs are averaged: how many are guided varies with the draws

Strategy = Literal["full", "gathered once", "hybrid"]
STRATEGIES: dict[Strategy, str] = {
    "full": "sharded over all ranks, parameters freed after each forward (--reshard)",
    "gathered once": "sharded over all ranks, gathered once per step (the default)",
    "hybrid": "sharded in a node, replicated over nodes, gathered once per step (--replicas NODES)",
}


@dataclass(frozen=True)
class Hardware:
    """Assumed, not measured: an H200 in nodes of eight. Rates by data sheet, latencies by NCCL's own tuning tables."""

    matrix_tflops: float = 989.0
    """TFLOP/s of dense bfloat16 matrix products (H200 data sheet)"""
    matrix_share: float = 0.5
    """share of it that the counted FLOPs of a step reach; --measured replaces it"""
    memory_gb: float = 141.0
    """GB of device memory (H200 data sheet)"""
    memory_gb_per_s: float = 4800.0
    """GB/s of device memory (H200 data sheet)"""
    gpus_per_node: int = 8
    """GPUs that NVLink joins"""
    nvlink_gb_per_s: float = 450.0
    """GB/s of NVLink per GPU, each way (H200 data sheet: 900 both ways)"""
    network_gb_per_s: float = 50.0
    """GB/s of the network per GPU, each way: one port of 400 Gb/s for each"""
    bandwidth_share: float = 0.8
    """share of the rates of memory, NVLink and network that is reached"""
    collective_us: float = 14.0
    """us that any collective takes (NCCL's src/graph/tuning.cc, LL128)"""
    nvlink_hop_us: float = 1.9
    """us per hop of a ring in a node (the same)"""
    network_hop_us: float = 4.0
    """us per hop of a ring between nodes (the same)"""
    launch_us: float = 10.0
    """us of the host per operation that it launches, views and module hooks included, without --compile"""
    host_hop_us: float = 50.0
    """us per hop of the ring by which the hosts exchange loss and signals (gloo, TCP)"""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if not getattr(self, f.name) > 0:
                raise ValueError(f"{f.name} must be positive, not {getattr(self, f.name)}")


# ----------------------------------------------------------------------------
# Counting.


class Collective(NamedTuple):
    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    ranks: int  # of its group
    nodes: int  # that they lie on
    bytes: int  # of the whole tensor: gathered, to be reduced and scattered, or to be reduced

    @property
    def sent(self) -> float:
        """Bytes that each rank sends round a ring."""
        return self.bytes * (self.ranks - 1) / self.ranks * (2 if self.kind == "all-reduce" else 1)

    @property
    def sent_between_nodes(self) -> float:
        """Of those, through its network port: a ring leaves each node once, and the ranks of a node share that."""
        return self.sent * self.nodes / self.ranks if self.nodes > 1 else 0.0


@dataclass
class Phase:
    flops: int = 0
    launches: int = 0
    collectives: Counter[Collective] = field(default_factory=Counter)

    @property
    def each(self) -> list[Collective]:
        return list(self.collectives.elements())


@dataclass
class Step:
    """What one rank does in one step. Phases: guidance, forward, backward, optimizer; host, between the hosts."""

    ranks: int
    strategy: Strategy
    shards: int  # into which each parameter is divided
    parameters: int
    phases: dict[str, Phase]

    def of_kind(self, kind: str) -> list[Collective]:
        """The collectives of one kind between devices."""
        return [c for name, phase in self.phases.items() if name != "host" for c in phase.each if c.kind == kind]


KINDS = ("all-gather", "reduce-scatter", "all-reduce")
OPERATORS: dict[str, Any] = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
}


class Recorder(TorchDispatchMode):
    """Counts FLOPs, launches and collectives by phase, as they pass PyTorch's dispatcher."""

    def __init__(self, gpus_per_node: int) -> None:
        super().__init__()
        self.gpus_per_node = gpus_per_node
        self.phases: defaultdict[str, Phase] = defaultdict(Phase)
        self.phase = "guidance"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes back as operations on this rank's part
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # Times and row numbers live on the host and have values: which rows are guided depends on them.
        real = bool(tensors) and not any(isinstance(x, FakeTensor) for x in tensors)
        with unset_fake_temporarily() if real else nullcontext():
            out = func(*args, **kwargs)
        phase, name = self.phases[self.phase], func._schema.name
        if func.namespace == "c10d":
            phase.collectives[self._collective(name, args)] += 1
        if func._overloadpacket in flop_registry:
            phase.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        phase.launches += not real and launches(func)
        return out

    def _collective(self, name: str, args: Any) -> Collective:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        ranks = dist.get_process_group_ranks(group)
        sizes = [sum(x.nbytes for x in tree_leaves(a) if isinstance(x, Tensor)) for a in args]
        return Collective(OPERATORS[name], len(ranks), len({r // self.gpus_per_node for r in ranks}), max(sizes))


def layout(strategy: Strategy, ranks: int, gpus_per_node: int) -> dict[str, Any]:
    """The arguments of `prepare_model`."""
    replicas = max(1, ranks // gpus_per_node) if strategy == "hybrid" else 1
    return {"replicas": replicas, "reshard": strategy == "full"}


def count_step(
    config: TrainConfig,
    here: World,
    strategy: Strategy,
    batch: int,
    gpus_per_node: int,
    tensors: AbstractContextManager[Any],
) -> Step:
    """Run one real step of rank `here.rank` and count what it does.

    Args:
        config: the run: model, method and optimizer.
        here: the ranks, whose process group is running if they are several.
        strategy: how the model is laid out over them.
        batch: rows of this rank.
        gpus_per_node: ranks of one node, numbered consecutively.
        tensors: entered where tensors are made; a FakeTensorMode makes them without values.
    """
    arrangement = layout(strategy, here.size, gpus_per_node)
    method = MeanFlow(config.method)
    shape = (batch, config.model.in_channels, config.model.input_size, config.model.input_size)
    draws = method.draw(shape, torch.Generator().manual_seed(0))
    labels = torch.zeros(batch, dtype=torch.int64)
    with tensors:
        model = DiT(config.model, torch.bfloat16)
    if here.size > 1:  # one rank would only be moved to its device, which tensors without values cannot be
        prepare_model(model, here, **arrangement)
    recorder = Recorder(gpus_per_node)

    def enter_pass(*_: Any) -> None:
        recorder.phase = "forward" if torch.is_grad_enabled() else "guidance"

    # Before FSDP's own hook, which gathers.
    model.register_forward_pre_hook(enter_pass, prepend=True)
    with tensors:
        optimizer = adamw_ema(model, config.optim)
        latents, noise = torch.zeros(shape), torch.zeros(shape)
        with recorder:
            loss, _ = method.loss(model, latents, labels, draws._replace(noise=noise))
            recorder.phase = "backward"
            reduce_gradients(model, True, arrangement["reshard"])
            loss.backward()
            recorder.phase = "optimizer"
            with patch("mfengine.optim._makes_wait", lambda device: True):  # as a GPU does
                optimizer.step()
            optimizer.zero_grad()
    with recorder:
        recorder.phase = "host"
        here.gather([0.0] * 5)  # as the trainer does: loss, v_loss, skipped, signal, time to save
    shards = here.size // arrangement["replicas"]
    return Step(here.size, strategy, shards, sum(p.numel() for p in model.parameters()), dict(recorder.phases))


@contextmanager
def fake_world(ranks: int) -> Iterator[World]:
    """Rank 0 among so many, in a process group that communicates nothing."""
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield World(0, ranks, torch.device("cpu"))
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def count_fake(config: TrainConfig, ranks: int, strategy: Strategy, gpus_per_node: int) -> Step:
    """Collectives and launches of one step on rank 0 of `ranks`: neither depends on the batch."""
    with fake_world(ranks) as here, use_backend("triton"):
        return count_step(config, here, strategy, 4, gpus_per_node, FakeTensorMode(allow_non_fake_inputs=True))


def count_flops(config: TrainConfig) -> dict[str, float]:
    """FLOPs of one sample's step, by phase. In plain PyTorch: the counter does not look into fused kernels."""
    with fake_world(1) as here, use_backend("torch"):
        step = count_step(config, here, "full", COUNTED_BATCH, 1, FakeTensorMode(allow_non_fake_inputs=True))
    return {name: phase.flops / COUNTED_BATCH for name, phase in step.phases.items()}


# ----------------------------------------------------------------------------
# The model of step time.


def collective_seconds(c: Collective, hw: Hardware) -> float:
    """A ring's latency and transfer; an all-reduce has the latency of a tree, which NCCL takes where a ring's is more.

    A ring's hops as NCCL counts them: (nodes - 1) between nodes, the others inside. All ports of a node carry a ring
    that spans nodes, each a part of it.
    """
    if c.ranks == 1:
        return 0.0
    if c.kind == "all-reduce":
        inside, between = 2 * (c.ranks / c.nodes - 1), 2 * math.log2(c.nodes)
    else:
        inside, between = c.ranks - c.nodes, c.nodes - 1
    latency = (hw.collective_us + inside * hw.nvlink_hop_us + between * hw.network_hop_us) / 1e6
    network = hw.network_gb_per_s * c.ranks / c.nodes
    rate = hw.nvlink_gb_per_s if c.nodes == 1 else min(hw.nvlink_gb_per_s, network)
    return latency + c.sent / (rate * 1e9 * hw.bandwidth_share)


def phase_seconds(busy: float, collectives: list[Collective], hw: Hardware) -> float:
    """Communication runs beside computation: what exceeds it shows, and so does the longest collective of each kind.

    That one stands for the ends of the pipeline: nothing is computed before the first gather of a block and nothing
    is left to compute after its last reduction. Collectives inside nodes and between them use different links.
    """
    links: defaultdict[bool, float] = defaultdict(float)
    ends: defaultdict[str, float] = defaultdict(float)
    for c in collectives:
        seconds = collective_seconds(c, hw)
        links[c.nodes > 1] += seconds
        ends[c.kind] = max(ends[c.kind], seconds)
    end = sum(ends.values())
    return end + max(busy, max(links.values(), default=0.0) - end)


class Point(NamedTuple):
    """A modelled configuration. Times in seconds per step, memory in bytes per GPU."""

    ranks: int
    strategy: Strategy
    batch: int  # rows per GPU
    compute: float  # FLOPs at the assumed rate
    launch: float  # the host's time to launch everything
    exposed: float  # what communication adds
    step: float
    memory: float

    @property
    def samples_per_s(self) -> float:
        return self.ranks * self.batch / self.step

    def days(self, epochs: float) -> float:
        return epochs * IMAGES / self.samples_per_s / 86400

    def gpu_hours(self, epochs: float) -> float:
        return self.days(epochs) * 24 * self.ranks


def model_point(config: TrainConfig, flops: dict[str, float], step: Step, batch: int, hw: Hardware) -> Point:
    """One step of `batch` rows per GPU; `flops` are those of a sample, by phase."""
    launch = {name: phase.launches * hw.launch_us / 1e6 for name, phase in step.phases.items()}
    compute = {name: n * batch / (hw.matrix_tflops * 1e12 * hw.matrix_share) for name, n in flops.items()}
    # AdamW reads parameter, gradient and two moments and writes three of them; an average is read with the
    # parameter and written: 28 and 12 bytes in float32.
    traffic = (32 + 8 * len(config.optim.ema_decays)) * step.parameters / step.shards
    seconds = busy = max(traffic / (hw.memory_gb_per_s * 1e9 * hw.bandwidth_share), launch["optimizer"])
    for name in ("guidance", "forward", "backward"):
        alone = max(compute[name], launch[name])
        together = phase_seconds(alone, step.phases[name].each, hw)
        if name == "backward":
            together = max(together, host_exchange_seconds(step, hw))
        busy, seconds = busy + alone, seconds + together
    return Point(
        ranks=step.ranks,
        strategy=step.strategy,
        batch=batch,
        compute=sum(compute.values()),
        launch=sum(launch.values()),
        exposed=seconds - busy,
        step=seconds,
        memory=memory_bytes(config, step, batch),
    )


def host_exchange_seconds(step: Step, hw: Hardware) -> float:
    """The hosts' all-gather, a ring in gloo. It starts after the forward, and the optimizer waits for it."""
    return sum((c.ranks - 1) * hw.host_hop_us / 1e6 for c in step.phases["host"].each)


def memory_bytes(config: TrainConfig, step: Step, batch: int) -> float:
    """State, gathered parameters, gradients in reduction, activations; without the allocator's and NCCL's own."""
    # Parameter, gradient, two moments and the averages, in float32.
    state = 4 * (4 + len(config.optim.ema_decays)) * step.parameters / step.shards
    gathers = [c.bytes for c in step.phases["guidance"].each]
    gathered = 2 * max(gathers, default=0) if step.strategy == "full" else sum(gathers)  # full: the next one too
    reducing = 2 * max((c.bytes for c in step.of_kind("reduce-scatter")), default=0)
    model = config.model
    activations = 40 * batch * model.num_tokens * model.hidden_size * model.depth  # docs/kernels.md
    return state + gathered + reducing + activations


# ----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class Arguments:
    """Modelled step time of training on N GPUs: counted work, assumed rates."""

    preset: Literal["b4", "b2", "m2", "l2", "xl2", "xl2-plus"] = "xl2"
    """what is trained"""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """numbers of GPUs; whole nodes above one node"""
    hardware: Hardware = field(default_factory=Hardware)
    measured: Path | None = None
    """gpu.json of `python -m benchmarks.gpu`: its guided step of this preset gives the rate of computation"""
    json: Path | None = None
    """write counts and modelled times here"""
    plot: Path | None = None
    """draw them here (.png)"""
    rehearse: bool = False
    """a small network instead"""

    def __post_init__(self) -> None:
        node = self.hardware.gpus_per_node
        for n in self.gpus:
            if n < 1 or (n > node and n % node):
                raise ValueError(f"gpus must be at least 1 and above {node} a multiple of it, not {n}")
        if not self.gpus:
            raise ValueError("gpus needs at least one number")


def measured_share(path: Path, preset: str, flops_per_sample: float, hw: Hardware) -> float:
    """Share of the matrix rate that a measured guided step of a preset reached, at its largest batch.

    Raises:
        InputError: the file has no such step.
    """
    try:
        rows = [Row(**row) for row in json.loads(path.read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path} as the report of benchmarks.gpu: {error!r}") from None
    rows = [row for row in rows if row.implementation == OURS and row.label.startswith(f"step: guided, {preset} ")]
    if not rows:
        raise InputError(f"{path} has no measured step 'guided, {preset}'; run python -m benchmarks.gpu on a GPU")
    best = max(rows, key=lambda row: row.samples)
    return best.samples / best.seconds * flops_per_sample / (hw.matrix_tflops * 1e12)


def strategies(ranks: int, hw: Hardware) -> list[Strategy]:
    """Those that differ on so many ranks: in one node hybrid is gathered once, one rank gathers nothing."""
    if ranks == 1:
        return ["gathered once"]
    return list(STRATEGIES) if ranks > hw.gpus_per_node else ["full", "gathered once"]


def scaling(args: Arguments) -> dict[str, Any]:
    """Counts and modelled points of the command line, as plain values."""
    config = PRESETS[args.preset][1]
    if args.rehearse:
        config = dataclasses.replace(config, model=small(config.model))
    flops = count_flops(config)
    hw = args.hardware
    if args.measured:
        hw = dataclasses.replace(hw, matrix_share=measured_share(args.measured, args.preset, sum(flops.values()), hw))
    counts, points = [], []
    infeasible: dict[int, str] = {}
    for ranks in args.gpus:
        batches = {WEAK: WEAK_BATCH}
        try:
            batches[STRONG] = config.local_batch(ranks)
        except InputError as error:
            infeasible[ranks] = str(error)
        for strategy in strategies(ranks, hw):
            step = count_fake(config, ranks, strategy, hw.gpus_per_node)
            counts.append(counted(step))
            for regime, batch in batches.items():
                point = model_point(config, flops, step, batch, hw)
                rates = {
                    "samples_per_s": point.samples_per_s,
                    "days": point.days(config.epochs),
                    "gpu_hours": point.gpu_hours(config.epochs),
                    "fits": point.memory <= hw.memory_gb * 1e9,
                }
                points.append({"regime": regime, **point._asdict(), **rates})
    return {
        "note": "collectives, launches and FLOPs are counted; every time is modelled",
        "hardware": to_json(hw),
        "flops_per_sample": flops,
        "epochs": config.epochs,
        "counts": counts,
        "points": points,
        "infeasible": {STRONG: infeasible},
    }


def counted(step: Step) -> dict[str, Any]:
    """One row of counts: collectives between devices, and the bytes that they make each rank send."""
    every = [c for kind in KINDS for c in step.of_kind(kind)]
    row: dict[str, Any] = {"ranks": step.ranks, "strategy": step.strategy, "parameters": step.parameters}
    for kind in KINDS:
        row[kind] = {"count": len(step.of_kind(kind)), "bytes": sum(c.bytes for c in step.of_kind(kind))}
    between = sum(c.sent_between_nodes for c in every)
    row["sent_in_node"] = sum(c.sent for c in every) - between
    row["sent_between_nodes"] = between
    row["launches"] = {name: phase.launches for name, phase in step.phases.items()}
    row["collectives"] = [
        {"phase": name, "count": count, **c._asdict()}
        for name, phase in step.phases.items()
        for c, count in phase.collectives.items()
    ]
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
            "| GPUs | strategy | rows per GPU | compute ms | launch ms | communication adds ms | step ms | samples/s | "
            "memory GB | days | GPU-hours |",
            "|" + " --- |" * 11,
        ]
        for p in report["points"]:
            if p["regime"] == regime:
                ms = " | ".join(f"{p[name] * 1e3:.1f}" for name in ("compute", "launch", "exposed", "step"))
                fits = "" if p["fits"] else ", too much"
                strategy = p["strategy"] if p["ranks"] > 1 else "-"
                lines.append(
                    f"| {p['ranks']} | {strategy} | {p['batch']} | {ms} | {p['samples_per_s']:,.0f} | "
                    f"{p['memory'] / 1e9:.0f}{fits} | {p['days']:.2f} | {p['gpu_hours']:,.0f} |"
                )
        lines += [f"\nInfeasible on {n} GPUs: {why}." for n, why in report["infeasible"].get(regime, {}).items()]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Samples per second and GPU where the batch grows with the GPUs; days where it does not."""
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
        begins = {"full": node[:1], "gathered once": [], "hybrid": node[-1:]}  # where layouts are still the same
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
    strong.set_title("256 rows in all")
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
            raise InputError(f"there is no folder {path.parent} to write {path.name} to")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise InputError("--plot needs matplotlib: pip install mfengine[bench]") from None
    report = scaling(args)
    print(tables(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        draw(report, args.plot)


if __name__ == "__main__":
    run(main)
