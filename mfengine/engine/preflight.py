"""What a run will take, without running it: memory, communication, arithmetic; and whether it could start.

Memory and collectives follow from shapes alone, so the network is made on the meta device, whose tensors have no
values. `tests/test_plan.py` compares them with real tensors and with the collectives of real steps.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfengine.data.format import Dataset
from mfengine.data.loader import Loader
from mfengine.engine.checkpoint import load_initial_weights, read_description
from mfengine.engine.config import TrainConfig
from mfengine.engine.distributed import num_shards, prepare_model
from mfengine.engine.flops import step_flops
from mfengine.engine.optim import adamw_ema
from mfengine.engine.trainer import absent, check_run, check_run_folder, compute_dtype
from mfengine.errors import InputError
from mfengine.methods import MeanFlow
from mfengine.networks import DiT
from mfengine.ops import use_backend
from mfengine.ranks import World

META = torch.device("meta")
NORM = 8  # bytes of the gradients' squared norm, as the optimizer sums it over shards
SINGLE = 4  # bytes of a float32: weights, gradients, averages and the optimizer's two moments


class Collectives(NamedTuple):
    """All collectives of one kind, over so many ranks, that a rank takes part in during one step."""

    kind: str
    number: int
    ranks: int  # of their groups
    bytes: int  # of the whole tensors: gathered, reduced and scattered, or reduced

    @property
    def sent(self) -> float:
        """Bytes that each rank sends round a ring."""
        return self.bytes * (self.ranks - 1) / self.ranks * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Plan:
    """What one step of a run takes on each rank, and what its checkpoints do."""

    config: TrainConfig
    world: World
    dtype: torch.dtype  # of matrix products
    parameters: int
    memory: dict[str, int]
    """bytes per rank at the peak of a step, by what they hold; the allocator's and NCCL's own are not in it"""
    communication: tuple[Collectives, ...]
    """between devices; the hosts exchange some bytes beside it"""

    @property
    def flops(self) -> float:
        """Of one step over all ranks."""
        return step_flops(self.config.model, self.config.method) * self.config.batch_size

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint: weights, two moments, averages."""
        return SINGLE * (3 + len(self.config.optim.ema_decays)) * self.parameters

    def lines(self, dataset: Dataset | None) -> list[str]:
        """The plan in words; `dataset` None where there is none yet."""
        config, ranks = self.config, self.world.size
        length = f"{config.epochs:g} epochs; the data set's size gives the steps"
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
            ("communication", "none" if ranks == 1 else f"{_gb(self._sent)} sent by each rank per step, round rings"),
            *(("", f"{c.number} x {c.kind} over {c.ranks} ranks, {_gb(c.bytes)}") for c in self.communication),
            ("checkpoint", f"{_gb(self.checkpoint)}; with {config.keep} kept and one being written "
             f"{_gb((config.keep + 1) * self.checkpoint)}"),
        ]  # fmt: skip
        width = max(len(name) for name, _ in rows)
        return [f"{name:{width}}  {value}" for name, value in rows]

    @property
    def _sent(self) -> float:
        return sum(c.sent for c in self.communication)


def _gb(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size / 100:
            return f"{n / size:.2f} {unit}"
    return f"{n:g} bytes"


def make_plan(config: TrainConfig, world: World) -> Plan:
    """Plan a run.

    Args:
        config: the run.
        world: the ranks that are to train, which need not be there.

    Raises:
        InputError: the batch or the model cannot be divided so, or the optimizer cannot be set so.
    """
    local = config.local_batch(world.size)
    shards = num_shards(world.size, config.replicas)
    dtype = compute_dtype(config, world)
    with META:
        model = DiT(config.model, dtype)
    adamw_ema(model, dataclasses.replace(config.optim, backend="auto"))  # refuses what it would refuse on a device
    groups = _parameter_groups(model)
    parameters = sum(p.numel() for p in model.parameters())
    padded = [sum(_padded(p, shards) for p in group) for _, group in groups]  # elements, of each group
    gathered = [n * (dtype.itemsize if half else SINGLE) for n, (half, _) in zip(padded, groups, strict=True)]
    shard = SINGLE * sum(padded) // shards
    memory = {
        "weights": shard,
        "gradients": shard,
        "optimizer state": 2 * shard,
        "averages": len(config.optim.ema_decays) * shard,
    }
    if world.sharded:
        # What is freed after each use is there twice: in use, and gathered or reduced ahead.
        memory["gathered parameters"] = 2 * max(gathered) if config.reshard else sum(gathered)
        memory["gradients in reduction"] = 2 * SINGLE * max(padded)
        if config.accumulation > 1:  # whole, until the last pass reduces them
            memory["accumulated gradients"] = SINGLE * parameters
    memory["activations"] = activation_bytes(config, world, local)
    return Plan(config, world, dtype, parameters, memory, tuple(_collectives(config, world, shards, padded, gathered)))


# ----------------------------------------------------------------------------
# Communication.


def _parameter_groups(model: DiT) -> list[tuple[bool, list[nn.Parameter]]]:
    """What FSDP gathers and reduces together, as `prepare_model` divides it; whether in the compute dtype."""
    embedders = [model.t_embedder, model.h_embedder, model.y_embedder]
    groups = [(False, list(embedder.parameters())) for embedder in embedders]
    groups += [(True, list(block.parameters())) for block in model.blocks]
    taken = {id(p) for _, group in groups for p in group}
    return [*groups, (True, [p for p in model.parameters() if id(p) not in taken])]


def _padded(p: Tensor, shards: int) -> int:
    """Elements of a parameter whose rows are dealt evenly: those of the last ranks may be padding."""
    rows = p.shape[0]
    return -(-rows // shards) * shards * (p.numel() // rows)


def _collectives(
    config: TrainConfig, world: World, shards: int, padded: list[int], gathered: list[int]
) -> Iterator[Collectives]:
    if world.size == 1:
        return
    groups = len(padded)
    # Gathered for guidance, forward and backward of each accumulation pass, or once for all of them.
    times = (2 + config.method.guided) * config.accumulation if config.reshard else 1
    yield Collectives("all-gather", times * groups, shards, times * sum(gathered))
    yield Collectives("reduce-scatter", groups, shards, SINGLE * sum(padded))
    if config.replicas > 1:
        yield Collectives("all-reduce", groups, config.replicas, SINGLE * sum(padded) // shards)
    yield Collectives("all-reduce", 1, shards, NORM)


# ----------------------------------------------------------------------------
# Activations.


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside that are alive, now and at most.

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
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= count

        self._seen[key] = weakref.ref(storage, gone)
        self.now += count
        self.peak = max(self.peak, self.now)


def activation_bytes(config: TrainConfig, world: World, batch: int) -> int:
    """Peak of all tensors of one pass but parameters and their gradients, for `batch` rows on one rank.

    The pass is the trainer's: guidance, forward with tangents, backward; without `--compile`.
    """
    dtype = compute_dtype(config, world)
    fused = config.ops == "triton" or (config.ops == "auto" and world.device.type == "cuda")
    shape = (batch, config.model.in_channels, config.model.input_size, config.model.input_size)
    method = MeanFlow(config.method)
    draws = method.draw(shape, torch.Generator().manual_seed(config.seed))
    with ExitStack() as inside:
        inside.enter_context(use_backend("triton" if fused else "torch"))
        with META:
            model = prepare_model(DiT(config.model, dtype), World(0, 1, META), recompute=config.recompute)
            if world.sharded:  # gathered in the compute dtype, which one rank casts to as it goes
                for half, group in _parameter_groups(model):
                    for p in group:
                        p.data = p.data.to(dtype) if half else p.data
            latents, labels = torch.empty(shape), torch.empty(batch, dtype=torch.int64)
            noise = torch.empty(shape)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        apart = [x for p in model.parameters() for x in (p, p.grad) if x is not None]
        live = inside.enter_context(LiveBytes(apart))
        loss, figures = method.loss(model, latents, labels, draws._replace(noise=noise))
        loss.backward()
        del loss, figures
    return live.peak


# ----------------------------------------------------------------------------
# The dry run.


def dry_run(config: TrainConfig, here: World, ranks: int) -> None:
    """Print the plan of a run, and refuse what training would refuse. Nothing is written.

    The plan is of GPUs, unless the configuration says `--device cpu`: it may be made where there are none.

    Args:
        config: the run.
        here: the ranks that are there.
        ranks: how many are to train.

    Raises:
        InputError: the configuration, the data or the run folder is not usable; the plan is printed first where there
            is one.
    """
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    plan = make_plan(config, World(0, ranks, device, here.one_rank_mesh))
    dataset: Dataset | None = None
    refused: InputError | None = None
    try:
        dataset = here.on_main(lambda: Dataset.open(config.data))
    except InputError as error:
        refused = error
    if here.main:
        print(*plan.lines(dataset), sep="\n", flush=True)
    if refused is not None:
        raise refused
    assert dataset is not None
    check_run(config, dataset, plan.world)
    newest = here.on_main(lambda: check_run_folder(config, dataset))
    step = read_description(newest)["step"] if newest is not None else 0
    if config.init is not None and newest is None:
        with META:
            model = DiT(config.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # shapes are what counts
            load_initial_weights(model, config.init, config.init_reverse_time)
    part, parts = here.rank * config.accumulation, ranks * config.accumulation
    next(Loader(dataset, config.local_batch(ranks), part, parts, config.seed, torch.device("cpu")))
    if here.main:
        if absent(device):
            print("there is no GPU here: that kernels, attention and optimizer run on one was not tried")
        print(f"ready to {f'continue at step {step:,}' if newest is not None else 'start'}; nothing was written")
