"""What is timed: each case is one piece of work, with the implementations that do it and the least that it costs.

The first implementation of a case is ours, the others are its baselines.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.baselines.port import Port, PortDiT, jvp_flash_attention, modulate, plain_attention, sdpa
from benchmarks.measure import Row, summarise
from benchmarks.workload import IMPLEMENTATIONS, OBJECTIVES, Call, make_model, small, torch_pair, training_step
from mfengine import ModelConfig, ops, sample
from mfengine.data.format import Dataset, LatentSpace
from mfengine.data.loader import Loader
from mfengine.data.writer import ArraySamples, write_dataset
from mfengine.engine.flops import sample_flops, step_flops
from mfengine.engine.presets import PRESETS
from mfengine.kernels import multi_tensor
from mfengine.ops import Dual
from mfengine.optim import AdamWEMA
from mfengine.ranks import World

OURS = "mfengine"
Array = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Case:
    """A piece of work."""

    suite: str
    name: str
    implementations: dict[str, Callable[[], Call]]  # by name: makes the inputs, and returns what is timed
    samples: int  # of one call
    flops: float = 0.0  # of one call: the least that it needs
    bytes: float = 0.0  # of one call, moved to and from memory: the least that it needs
    hide_host: bool = False  # time the device alone, as `make_clock` does

    def row(self, implementation: str, rounds: list[float]) -> Row:
        """What the seconds of some rounds say."""
        timed = summarise(rounds)
        return Row(
            self.suite, self.name, implementation, samples=self.samples, flops=self.flops, bytes=self.bytes, **timed
        )


@dataclass(frozen=True)
class Machine:
    """Where cases run, and so how large they are."""

    device: torch.device
    folder: Path  # an empty one, for data and checkpoints

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return torch.bfloat16 if self.gpu else torch.float32

    def model(self, preset: str) -> ModelConfig:
        config = PRESETS[preset][1].model
        return config if self.gpu else small(config)

    def name(self, preset: str) -> str:
        """What `model(preset)` is called in the tables."""
        return preset if self.gpu else "small"

    def state(self) -> ModelConfig:
        """A network whose weights no cache holds."""
        config = PRESETS["xl2" if self.gpu else "b2"][1].model
        return config if self.gpu else replace(config, depth=2)


def cases(machine: Machine, peer: Callable[..., Call] | None = None) -> Iterator[Case]:
    """All cases for a machine.

    Args:
        machine: where they run.
        peer: somebody else's training step, timed beside ours: (model config, objective config, batch, device,
            dtype) -> a function that does one optimizer step.
    """
    for preset in ("xl2", "b2") if machine.gpu else ("xl2",):
        for batch in (32, 256) if machine.gpu else (32,):
            yield from kernels(machine, preset, batch)
    for preset in ("b2", "l2", "xl2") if machine.gpu else ("b2",):
        for batch in (32, 256) if machine.gpu else (16,):
            for objective in OBJECTIVES:
                yield step(machine, preset, batch, objective, peer)
    yield from optimizer(machine)
    yield from data(machine)
    yield from sampler(machine)
    yield from checkpoint(machine)


def rotating(make: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A function that gives several inputs in turn: more than the device's cache holds, so that none stays in it."""
    inputs = [make()]
    number = 4
    if device.type == "cuda":
        size = sum(x.numel() * x.element_size() for x in tree_leaves(inputs) if isinstance(x, Tensor))
        number = max(2, min(256, 1 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // max(1, size)))
    inputs += [make() for _ in range(number - 1)]
    following = itertools.cycle(inputs)
    return lambda: next(following)


# ----------------------------------------------------------------------------
# Kernels: output; output and tangent of every row; output and gradients.


@dataclass(frozen=True)
class FusedOp:
    """One of ours, the same written with PyTorch's own operators, and what goes in and out."""

    name: str
    ours: Callable[..., tuple[Any, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    arguments: list[Array]
    outputs: list[Array]
    constants: int = 0  # trailing arguments that have no tangent
    product: int = 0  # FLOPs of one product of the scores' size; an attention's forward takes two
    other_primal: dict[str, Callable[..., Any]] = field(default_factory=dict)  # further baselines
    other_dual: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What a forward reads and writes."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.arguments + self.outputs)


def fused_ops(config: ModelConfig, batch: int, dtype: torch.dtype) -> list[FusedOp]:
    """The ops as the network uses them: a float32 residual stream, everything else in `dtype`."""
    tokens, width, heads = config.num_tokens, config.hidden_size, config.num_heads
    stream: Array = ((batch, tokens, width), torch.float32)
    branch: Array = ((batch, tokens, width), dtype)
    row: Array = ((batch, width), dtype)
    head: Array = ((batch, heads, tokens, width // heads), dtype)
    hidden: Array = ((batch, tokens, 4 * width), dtype)

    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale).to(scale.dtype)

    def residual_adaln(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x + gate[:, None] * y
        return x, adaln(x, shift, scale)

    return [
        FusedOp(
            "attention", lambda *qkv: (ops.attention(*qkv),), lambda *qkv: (plain_attention(*qkv),), [head] * 3, [head],
            product=2 * batch * tokens**2 * width,
            other_primal={"SDPA": lambda *qkv: (sdpa(*qkv),)},
            other_dual={"jvp_flash_attention": lambda *qkv: (jvp_flash_attention(*qkv),)}
            if find_spec("jvp_flash_attention")
            else {},
        ),
        FusedOp(
            "adaln", lambda *x: (ops.adaln_modulate(*x),), lambda *x: (adaln(*x),),
            [stream, row, row], [branch],
        ),
        FusedOp(
            "residual adaln", ops.gated_residual_adaln, residual_adaln,
            [stream, branch, row, row, row], [stream, branch],
        ),
        FusedOp(
            "bias gelu", lambda x, bias: (ops.gelu(x, bias),),
            lambda x, bias: (F.gelu(x + bias, approximate="tanh"),), [hidden, ((4 * width,), dtype)], [hidden],
            constants=1,
        ),
    ]  # fmt: skip


def kernels(machine: Machine, preset: str, batch: int) -> Iterator[Case]:
    for op in fused_ops(machine.model(preset), batch, machine.dtype):
        for mode, products, passes, make in (
            ("dual", 6, 2, dual_call),
            ("primal", 2, 1, primal_call),
            ("forward + backward", 7, 3, backward_call),
        ):
            other = op.other_dual if mode == "dual" else op.other_primal
            plain = "torch.func.jvp" if mode == "dual" else "plain"
            yield Case(
                "kernels",
                f"{op.name}, {mode}, {machine.name(preset)} of {batch}",
                {OURS: partial(make, machine, op, op.ours, explicit=True)}
                | {name: partial(make, machine, op, f) for name, f in ({plain: op.plain} | other).items()},
                samples=batch,
                flops=products * op.product,
                bytes=passes * op.bytes,
                hide_host=True,
            )


def primal_call(machine: Machine, op: FusedOp, f: Callable[..., Any], explicit: bool = False) -> Call:
    following = rotating(lambda: arrays(machine, op.arguments), machine.device)

    def call() -> None:
        with torch.no_grad():
            f(*following())

    return call


def dual_call(machine: Machine, op: FusedOp, f: Callable[..., Any], explicit: bool = False) -> Call:
    """Output and tangent: from our explicit duals, or by `torch.func.jvp`."""
    active = len(op.arguments) - op.constants
    following = rotating(
        lambda: (arrays(machine, op.arguments), arrays(machine, op.arguments[:active])), machine.device
    )

    def call() -> None:
        primals, tangents = following()
        constants = primals[active:]
        with torch.no_grad():
            if explicit:
                f(*map(Dual, primals[:active], tangents), *constants)
            else:
                torch.func.jvp(lambda *x: f(*x, *constants), tuple(primals[:active]), tuple(tangents))

    return call


def backward_call(machine: Machine, op: FusedOp, f: Callable[..., Any], explicit: bool = False) -> Call:
    following = rotating(lambda: (arrays(machine, op.arguments), arrays(machine, op.outputs)), machine.device)

    def call() -> None:
        primals, gradients = following()
        leaves = [x.detach().requires_grad_() for x in primals]
        torch.autograd.grad(f(*leaves), leaves, gradients)

    return call


def arrays(machine: Machine, kinds: list[Array]) -> list[Tensor]:
    return [torch.randn(shape, device=machine.device).to(dtype) for shape, dtype in kinds]


# ----------------------------------------------------------------------------
# Training steps: loss, backward, AdamW and EMA.


def step(machine: Machine, preset: str, batch: int, objective: str, peer: Callable[..., Call] | None = None) -> Case:
    """Our step and its peers on the same random latents, with the same draws."""
    config, method = machine.model(preset), OBJECTIVES[objective]
    arguments = (config, method, batch, machine.device, machine.dtype)
    implementations: dict[str, Callable[[], Call]] = {
        implementation: partial(training_step, *arguments, implementation=implementation)
        for implementation in IMPLEMENTATIONS
        if usable(implementation, machine)
    }
    if peer is not None:
        implementations["peer"] = partial(peer, *arguments)
    return Case(
        "step",
        f"{objective}, {machine.name(preset)} of {batch}",
        implementations,
        batch,
        batch * step_flops(config, method, batch),
    )


def usable(implementation: str, machine: Machine) -> bool:
    """Compiling takes minutes on a CPU, and the published kernel needs a GPU."""
    if "jvp_flash_attention" in implementation:
        return machine.gpu and find_spec("jvp_flash_attention") is not None
    return machine.gpu or "compiled" not in implementation


# ----------------------------------------------------------------------------
# The rest of training and sampling.


@dataclass(frozen=True)
class Update:
    """What a step of the optimizer does beside AdamW and one EMA."""

    label: str
    clip_norm: float | None = None
    copy: bool = False  # the parameters in bfloat16
    checked: bool = True  # left out where a gradient is not finite, which the pair never does

    @property
    def bytes(self) -> int:
        """Per parameter, that ours moves: the gradient for its norm, then one pass over everything."""
        one = torch.empty(1, device="meta")
        row = multi_tensor.Row(one, one, one, one, one, [one], one.bfloat16() if self.copy else None, 0)
        read = one.element_size() if self.checked or self.clip_norm is not None else 0
        return read + multi_tensor.bytes_moved(row)


UPDATES = (
    Update(""),
    Update(", unchecked", checked=False),
    Update(", clipped", clip_norm=1.0),
    Update(", bf16 copy", copy=True),
)


def optimizer(machine: Machine) -> Iterator[Case]:
    """A step of AdamW with one EMA over float32 parameters, and PyTorch's pair of fused AdamW and foreach EMA."""
    shapes = [p.shape for p in make_model(machine.state(), torch.device("meta")).parameters()]
    count = sum(s.numel() for s in shapes)

    def parameters(update: Update) -> tuple[list[Tensor], list[Tensor] | None]:
        model: list[Tensor] = [nn.Parameter(torch.zeros(s, device=machine.device)) for s in shapes]
        for p in model:
            p.grad = torch.ones_like(p)
        return model, [torch.empty_like(p, dtype=torch.bfloat16) for p in model] if update.copy else None

    def ours(update: Update, backend: Any) -> Call:
        model, copies = parameters(update)
        return AdamWEMA(
            model, clip_norm=update.clip_norm, skip_nonfinite=update.checked, copies=copies, backend=backend
        ).step

    def pair(update: Update) -> Call:
        model, copies = parameters(update)
        return torch_pair(model, update.clip_norm, copies)

    for update in UPDATES:
        implementations = {OURS: partial(ours, update, "auto"), "fused AdamW, foreach EMA": partial(pair, update)}
        if machine.gpu:
            implementations["mfengine, torch"] = partial(ours, update, "torch")
        if find_spec("amp_C"):
            implementations["mfengine, apex"] = partial(ours, update, "apex")
        name = f"{count / 1e6:.1f} M parameters{update.label}"
        yield Case("optimizer", name, implementations, 0, bytes=update.bytes * count)


def data(machine: Machine) -> Iterator[Case]:
    """Batches of moments, 2 x 4 x 32 x 32 in float16, by DALI from shards and by a DataLoader from one file each."""
    batch, batches, count, space = 256, 16, 8192, LatentSpace((4, 32, 32), num_classes=1000)
    moments = np.random.default_rng(0).standard_normal((count, 1, 2, *space.shape), np.float32)
    source = ArraySamples("random", space, moments, np.arange(count) % space.num_classes)

    def dali() -> Call:
        folder = machine.folder / "shards"
        dataset = Dataset.open(folder) if folder.exists() else write_dataset(folder, source, shard_samples=count // 2)
        return partial(read, Loader(dataset, batch, 0, 1, 0, machine.device))

    def files() -> Call:
        folder = machine.folder / "files"
        if not folder.exists():
            folder.mkdir()
            for i, array in enumerate(moments):
                np.savez(folder / f"{i:06d}.npz", moments=array.astype(np.float16), label=source.labels[i])
        loader = torch.utils.data.DataLoader(
            _Files(folder), batch, shuffle=True, num_workers=os.cpu_count() or 1, persistent_workers=True,
            drop_last=True, pin_memory=machine.gpu,
        )  # fmt: skip

        def endless() -> Iterator[Any]:
            while True:
                yield from loader

        return partial(read, endless())

    def read(loader: Any) -> None:
        for _ in range(batches):  # more than either reads ahead
            next(loader)

    samples = batch * batches
    size = samples * 2 * 2 * math.prod(space.shape)
    yield Case("data", f"moments of 8 x 32 x 32, {samples}", {OURS: dali, "DataLoader": files}, samples, bytes=2 * size)


class _Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """One file per sample, as MeanFlow ports read them."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with np.load(self._paths[i]) as file:
            return torch.from_numpy(file["moments"][0]), int(file["label"])


def sampler(machine: Machine) -> Iterator[Case]:
    """One-step samples: our network, and the port's with SDPA."""
    config, batch = machine.model("xl2"), 64 if machine.gpu else 16
    shape = (batch, config.in_channels, config.input_size, config.input_size)

    def inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(shape, device=machine.device), torch.zeros(batch, dtype=torch.long, device=machine.device)

    def ours() -> Call:
        model, following = make_model(config, machine.device, machine.dtype), rotating(inputs, machine.device)
        return lambda: sample(model, *following())

    def port() -> Call:
        network, following = PortDiT(config).to(machine.device), rotating(inputs, machine.device)
        velocity = Port(OBJECTIVES["unguided"], machine.dtype, attention=sdpa)
        one = torch.ones(batch, device=machine.device)

        @torch.no_grad()
        def call() -> Tensor:
            z, y = following()
            with velocity.autocast(z):
                return z - network(z, one, one, y, sdpa)

        return call

    flops = batch * sample_flops(config, OBJECTIVES["unguided"])
    yield Case("sampler", f"one step, {machine.name('xl2')} of {batch}", {OURS: ours, "port SDPA": port}, batch, flops)


def checkpoint(machine: Machine) -> Iterator[Case]:
    """Weights, two moments and one average to disk, whole when the call returns; by us and by `torch.save`."""
    config = machine.state()

    def state() -> dict[str, Any]:
        model = make_model(config, machine.device)
        names = [name for name, _ in model.named_parameters()]
        parts = ("model", "exp_avg", "exp_avg_sq", "ema")
        return {
            part: {name: p.detach().clone() for name, p in zip(names, model.parameters(), strict=True)}
            for part in parts
        }

    def ours() -> Call:
        from mfengine.engine.checkpoint import Checkpointer  # needs packages that the GPU script does without

        world = World(0, 1, machine.device)
        writer = Checkpointer(machine.folder / "run", world, keep=1, asynchronous=machine.gpu)
        kept, step = state(), itertools.count()

        def call() -> None:
            writer.save(next(step), kept, {})
            writer.wait()

        return call

    def plain() -> Call:
        kept = state()

        def call() -> None:
            with (machine.folder / "plain.pt").open("wb") as file:
                torch.save(kept, file)
                file.flush()
                os.fsync(file.fileno())

        return call

    size = 16 * sum(p.numel() for p in make_model(config, torch.device("meta")).parameters())
    yield Case("checkpoint", f"{size / 1e6:.0f} MB", {OURS: ours, "torch.save": plain}, 0)
