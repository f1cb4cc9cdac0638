"""The cost of a run's step without running it: memory, communication, FLOPs.

It follows from shapes alone, so the real step runs on the meta device, whose tensors have no values.
`tests/test_plan.py` compares it with real tensors and with the collectives of real steps.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mfengine.data.format import Dataset
from mfengine.engine.config import TrainConfig
from mfengine.engine.distributed import num_shards, parameter_groups, prepare_model
from mfengine.engine.flops import META, meta_network, step_flops
from mfengine.engine.optim import adamw_ema
from mfengine.methods import OBJECTIVES, ObjectiveConfig
from mfengine.networks import NetworkConfig
from mfengine.ops import use_attention, use_backend
from mfengine.ranks import World
from mfengine.torch_private import TorchDispatchMode, storage_key, tree_leaves

NORM = 8  # bytes of the gradients' squared norm, which the optimizer sums over shards
SINGLE = 4  # bytes of a float32: weights, gradients, averages and the optimizer's two moments

Phase = Literal["guidance", "forward", "backward", "optimizer"]  # guidance: every forward without a graph


class Collective(NamedTuple):
    """A collective operation between devices; each rank takes part."""

    phase: Phase
    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    ranks: int  # size of its group
    bytes: int  # of the whole tensor, before the reduction or after the gathering

    @property
    def sent(self) -> float:
        """Bytes that each rank sends around a ring."""
        return self.bytes * (self.ranks - 1) / self.ranks * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Plan:
    """The cost of one step of a run on each rank, and of its checkpoints."""

    config: TrainConfig
    world: World
    dtype: torch.dtype  # of matrix products
    parameters: int
    memory: dict[str, int]
    """bytes per rank at the peak of a step, by content, without the overheads of allocator and NCCL"""
    communication: tuple[Collective, ...]
    """collectives of one step; hosts also exchange a few bytes"""

    @cached_property
    def flops(self) -> float:
        """FLOPs of one step over all ranks."""
        config = self.config
        return config.batch_size * step_flops(config.model, config.method, config.local_batch(self.world.size))

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint: weights, two moments, averages."""
        return SINGLE * (3 + len(self.config.optim.ema_decays)) * self.parameters

    def lines(self, dataset: Dataset | None) -> list[str]:
        """The plan as text; `dataset` is None if there is none yet."""
        config, ranks = self.config, self.world.size
        length = f"{config.epochs:g} epochs; the size of the data set will give the steps"
        if dataset is not None:
            steps = config.total_steps(dataset.count)
            epochs = steps * config.batch_size / dataset.count
            length = f"{steps:,} steps of {config.batch_size} samples: {epochs:.4g} epochs of {dataset.count:,}"
        elif config.steps is not None:
            length = f"{config.steps:,} steps of {config.batch_size} samples"
        passes = f" in {config.accumulation} passes" if config.accumulation > 1 else ""
        rows = [
            ("run", str(config.folder)),
            ("parameters", f"{self.parameters / 1e6:.1f} M"),
            (
                "ranks",
                f"{ranks} x {self.world.device.type}, {config.batch_size // ranks} rows each{passes}, "
                f"in {str(self.dtype).removeprefix('torch.')}",
            ),
            ("length", length),
            ("arithmetic", f"{self.flops / 1e12:.4g} TFLOP per step, {self.flops / ranks / 1e12:.4g} on each rank"),
            ("memory", f"{_gb(sum(self.memory.values()))} per rank at the peak of a step"),
            *(("", f"{_gb(n)} {what}") for what, n in self.memory.items() if n),
            ("communication", "none" if ranks == 1 else f"{_gb(self._sent)} sent by each rank per step, on rings"),
            *(("", line) for line in self._collectives()),
            ("checkpoint", f"{_gb(self.checkpoint)}; with {config.keep} kept and one being written "
             f"{_gb((config.keep + 1) * self.checkpoint)}"),
        ]  # fmt: skip
        width = max(len(name) for name, _ in rows)
        return [f"{name:{width}}  {value}" for name, value in rows]

    @property
    def _sent(self) -> float:
        return sum(c.sent for c in self.communication)

    def _collectives(self) -> Iterator[str]:
        alike: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for c in self.communication:
            alike[c.kind, c.ranks].append(c.bytes)
        for (kind, ranks), sizes in alike.items():
            yield f"{len(sizes)} x {kind} over {ranks} ranks, {_gb(sum(sizes))}"

    def warnings(self, device: torch.device) -> list[str]:
        """One line if the run does not fit into the memory of the present device; it says how to save memory."""
        needed, available = sum(self.memory.values()), device_memory(device)
        if available is None or needed <= available:
            return []
        return [
            f"warning: the plan needs {_gb(needed)} per rank, but the device has {_gb(available)}: save memory with "
            f"more --accumulation, --recompute or more ranks"
        ]


def _gb(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size / 100:
            return f"{n / size:.2f} {unit}"
    return f"{n:g} bytes"


def make_plan(config: TrainConfig, world: World) -> Plan:
    """Plan a run.

    Args:
        config: the run.
        world: the ranks that will train; they need not exist.

    Raises:
        InputError: the batch or the model cannot be divided that way, or the optimizer's settings are invalid.
    """
    local = config.local_batch(world.size)
    shards = num_shards(world.size, config.replicas)
    dtype = config.compute_dtype(world.device)
    model = meta_network(config.model, dtype)
    adamw_ema(model, dataclasses.replace(config.optim, backend="auto"))  # rejects the settings that a device would
    parameters = sum(p.numel() for p in model.parameters())
    groups = parameter_groups(model)
    padded = [sum(_padded(p, shards) for p in parameters) for _, parameters in groups]  # elements of each group
    gathered = [n * unit.dtype.itemsize for n, (unit, _) in zip(padded, groups, strict=True)]
    shard = SINGLE * sum(padded) // shards
    copied = dtype == torch.bfloat16 and not world.sharded and not config.compile  # as in `adamw_ema`
    memory = {
        "weights": shard,
        "gradients": sum(gathered) if copied and config.accumulation == 1 else shard,
        "optimizer state": 2 * shard,
        "averages": len(config.optim.ema_decays) * shard,
    }
    if copied:
        memory["bfloat16 copies"] = dtype.itemsize * parameters
    if world.sharded:
        # Memory that is freed after each use counts twice: one part in use, one gathered or reduced ahead.
        memory["gathered parameters"] = 2 * max(gathered) if config.reshard else sum(gathered)
        memory["gradients in reduction"] = 2 * SINGLE * max(padded)
        if config.accumulation > 1:  # whole gradients, until the last pass reduces them
            memory["accumulated gradients"] = SINGLE * parameters
    fused = config.ops == "triton" or (config.ops == "auto" and world.device.type == "cuda")
    memory["activations"], passes = meta_pass(
        config.model,
        config.method,
        local,
        dtype,
        fused=fused,
        recompute=config.recompute,
        gathered=world.sharded or copied,
    )
    collectives: list[Collective] = []
    if world.size > 1:
        for n, whole, phases in zip(padded, gathered, passes, strict=True):
            # Gathered for each use in each accumulation pass, or once for all of them.
            uses = list(phases.elements()) * config.accumulation if config.reshard else list(phases)[:1]
            collectives += (Collective(phase, "all-gather", shards, whole) for phase in uses)
            collectives.append(Collective("backward", "reduce-scatter", shards, SINGLE * n))
            if config.replicas > 1:
                collectives.append(Collective("backward", "all-reduce", config.replicas, SINGLE * n // shards))
        collectives.append(Collective("optimizer", "all-reduce", shards, NORM))
    return Plan(config, world, dtype, parameters, memory, tuple(collectives))


def _padded(p: Tensor, shards: int) -> int:
    """Elements of a parameter whose rows are dealt evenly; those on the last ranks may be padding."""
    rows = p.shape[0]
    return -(-rows // shards) * shards * (p.numel() // rows)


# ----------------------------------------------------------------------------
# The pass on meta tensors.


class LiveBytes(TorchDispatchMode):
    """Bytes of all live storages made inside the context, now and at the peak.

    Args:
        apart: tensors that do not count.
    """

    def __init__(self, apart: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        for x in apart:
            self._watch(x, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._watch(x, x.untyped_storage().nbytes())
        return result

    def _watch(self, x: Tensor, count: int) -> None:
        key = storage_key(x)
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= count

        self._seen[key] = weakref.ref(x.untyped_storage(), gone)
        self.now += count
        self.peak = max(self.peak, self.now)


@cache
def meta_pass(
    model: NetworkConfig,
    method: ObjectiveConfig,
    batch: int,
    dtype: torch.dtype,
    *,
    fused: bool,
    recompute: bool = False,
    gathered: bool = False,
) -> tuple[int, list[Counter[Phase]]]:
    """The trainer's pass over one rank's `batch` rows: loss and backward, without `--compile`.

    Args:
        model, method, batch, dtype: network, objective, rows, and the dtype of matrix products.
        fused: whether fused ops compute.
        recompute: activation checkpointing.
        gathered: whether parameters come in the dtype of gathering or copying; otherwise they are cast at each use.

    Returns:
        The peak of all tensors except parameters and their gradients, in bytes. Then, for each group of parameters in
        the order of first use, how often each phase uses it.
    """
    network = prepare_model(meta_network(model, dtype), World(0, 1, META), recompute=recompute)
    objective, shape = OBJECTIVES.build(method), (batch, *model.latent_shape)
    uses: list[Counter[Phase]] = []
    for unit, parameters in parameter_groups(network):
        uses.append(Counter())
        unit.module.register_forward_pre_hook(_note_use(uses[-1]))
        for p in parameters:
            p.data = p.data.to(unit.dtype) if gathered else p.data
            p.grad = torch.empty_like(p)
    draws = objective.draw(shape, torch.Generator().manual_seed(0), META)
    latents, labels = torch.empty(shape, device=META), torch.empty(batch, dtype=torch.int64, device=META)
    apart = [x for p in network.parameters() for x in (p, p.grad) if x is not None]
    with use_backend("triton" if fused else "torch"), use_attention("auto"), LiveBytes(apart) as live:
        loss, metrics = objective.loss(network, latents, labels, draws)
        loss.backward()
        del loss, metrics
    return live.peak, uses


def _note_use(uses: Counter[Phase]) -> Any:
    def hook(*_: Any) -> None:
        if torch.is_grad_enabled():
            uses["forward"] += 1
            uses["backward"] = 1
        else:
            uses["guidance"] += 1

    return hook


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory
