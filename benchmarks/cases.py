"""The benchmark cases. Each is one piece of work, with its implementations and a lower bound of its cost.

The first implementation of a case is ours; the others are its baselines.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.baselines.port import Port, PortDiT, jvp_flash_attention, math_sdpa, modulate, plain_attention, sdpa
from benchmarks.measure import Row, device_name, summarise
from benchmarks.roofline import predicted_seconds
from benchmarks.workload import (
    IMPLEMENTATIONS,
    IMPROVED,
    OBJECTIVES,
    Call,
    make_model,
    of_blocks,
    small,
    tiny,
    torch_pair,
    training_step,
)
from mfengine import ops, sample
from mfengine.data.format import Dataset, LatentSpace
from mfengine.data.loader import Loader
from mfengine.data.writer import ArraySamples, write_dataset
from mfengine.engine.flops import sample_flops, step_flops
from mfengine.engine.presets import PRESETS
from mfengine.kernels import multi_tensor
from mfengine.networks.layers import TransformerConfig
from mfengine.ops import OPS, Dual
from mfengine.ops.attention import ATTENTION
from mfengine.ops.backend import Backend
from mfengine.ops.rope import angles
from mfengine.ops.table import SHAPES, New, Shape
from mfengine.optim import AdamWEMA
from mfengine.ranks import World

OURS = "mfengine"


@dataclass(frozen=True)
class Case:
    """A piece of work."""

    suite: str
    name: str
    implementations: dict[str, Callable[[], Call]]  # name -> function that makes the inputs and returns the timed call
    samples: int  # per call
    flops: Callable[[], float] = float  # least FLOPs of a call; counting takes a second
    bytes: float = 0.0  # least bytes that a call moves to and from memory
    hide_host: bool = False  # time only the device, see `make_clock`
    predicted: Callable[[], float] = float  # seconds of our call in the roofline model; counting takes seconds

    def row(self, implementation: str, rounds: list[float]) -> Row:
        """A table row from the seconds of several rounds."""
        timed = summarise(rounds)
        predicted = self.predicted() if implementation == OURS else 0.0
        return Row(
            self.suite,
            self.name,
            implementation,
            samples=self.samples,
            flops=self.flops(),
            bytes=self.bytes,
            predicted=predicted,
            **timed,
        )


@dataclass(frozen=True)
class Machine:
    """Where cases run, which determines their size."""

    device: torch.device
    folder: Path  # an empty folder for data and checkpoints
    rehearse: bool = False  # everything in miniature, without a GPU

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of matrix products."""
        return torch.bfloat16 if self.gpu else torch.float32

    @property
    def backend(self) -> Backend:
        """Backend of the ops: our kernels on a GPU."""
        return "triton" if self.gpu else "torch"

    @property
    def roofline(self) -> str:
        """The GPU whose roofline predicts a step; a rehearsal runs the prediction, too."""
        return "h200" if self.rehearse else device_name(self.device)

    def model(self, preset: str) -> Any:
        config = PRESETS[preset][1].model
        return config if self.gpu else tiny(config) if self.rehearse else small(config)

    def name(self, preset: str) -> str:
        """The name of `model(preset)` in the tables."""
        return preset if self.gpu else "tiny" if self.rehearse else "small"

    def state(self) -> Any:
        """A network with weights too large for any cache."""
        config = PRESETS["xl2" if self.gpu else "b2"][1].model
        return config if self.gpu else tiny(config) if self.rehearse else of_blocks(config, 2)


def fitting_batch(machine: Machine, preset: str) -> int:
    """The largest batch, at most 256, whose guided step fits into the memory that is free now.

    It counts 22 bytes per parameter (weight, gradient, two moments, average, bfloat16 copy) and 41 that each layer
    keeps per channel of a token (`benchmarks.counts`); a tenth is left for the rest.
    """
    config = machine.model(preset)
    count = sum(p.numel() for p in make_model(config, torch.device("meta")).parameters())
    row = 41 * config.depth * config.num_tokens * config.hidden_size
    free, _ = torch.cuda.mem_get_info(machine.device)
    return next((b for b in (256, 224, 192, 160, 128, 96, 64) if 22 * count + b * row < 0.9 * free), 32)


def cases(machine: Machine, peer: Callable[..., Call] | None = None) -> Iterator[Case]:
    """All cases for a machine.

    Args:
        machine: where they run.
        peer: another training step, timed beside ours: (model config, objective config, batch, device, dtype) -> a
            function that does one optimizer step.
    """
    for preset in ("xl2", "b2") if machine.gpu else ("xl2",):
        for batch in (32, 256) if machine.gpu else (32,):
            yield from kernels(machine, preset, batch)
            if machine.gpu:  # elsewhere, ours is plain PyTorch, too
                yield from attention(machine, preset, batch)
    for preset in ("b2", "l2", "xl2") if machine.gpu else ("b2",):
        for batch in (32, 256) if machine.gpu else (16,):
            for objective in OBJECTIVES:
                yield step(machine, preset, batch, objective, peer)
    yield from optimizer(machine)
    yield from data(machine)
    yield from sampler(machine)
    yield from checkpoint(machine)


def rotating(make: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A function that cycles through several inputs that are together larger than the device's cache."""
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


def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale).to(scale.dtype)


def residual_adaln(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x = x + gate[:, None] * y
    return x, adaln(x, shift, scale)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps=1e-6)


def residual_rms_norm(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x + gate * y
    return x, F.rms_norm(x, weight.shape, weight.to(x.dtype), eps=1e-6).to(y.dtype)


def swiglu(x: Tensor) -> Tensor:
    g, w = x.chunk(2, -1)
    return F.silu(g) * w


@cache
def turns(tokens: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return angles(tokens, dim, device).to(dtype).unbind(-1)


def rotary_attention(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, -1, q_weight.shape[0])).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
    cos, sin = turns(q.shape[2], q.shape[3], q.device, q.dtype)

    def rotate(x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    o = plain_attention(rotate(rms_norm(q, q_weight)), rotate(rms_norm(k, k_weight)), v)
    return o.transpose(1, 2).flatten(2)


# Implementations with PyTorch's own operators. An op missing here is timed against its plain reference.
PLAIN: dict[str, Callable[..., Any]] = {
    "attention": plain_attention,
    "adaln_modulate": adaln,
    "gated_residual_adaln": residual_adaln,
    "gelu": bias_gelu,
    "rms_norm": rms_norm,
    "gated_residual_rms_norm": residual_rms_norm,
    "rotary_attention": rotary_attention,
    "swiglu": swiglu,
}
OTHERS: dict[str, dict[str, Callable[..., Any]]] = {"attention": {"SDPA": sdpa}}
OTHERS_WITH_JVP: dict[str, dict[str, Callable[..., Any]]] = {}
if find_spec("jvp_flash_attention"):
    OTHERS_WITH_JVP["attention"] = {"jvp_flash_attention": jvp_flash_attention}


def op_shape(config: TransformerConfig, batch: int) -> Shape:
    return Shape(batch, config.num_tokens, config.num_heads, config.hidden_size // config.num_heads)


def fused_ops() -> list[str]:
    """Names of the ops that have kernels."""
    meta = random_on(torch.device("meta"), torch.float32)
    return [name for name, make in OPS.items() if make(SHAPES["odd"], meta).op]


def random_on(device: torch.device, dtype: torch.dtype) -> New:
    """Standard normal tensors, drawn on the device."""

    def new(*size: int, wide: bool = False) -> Tensor:
        return torch.randn(size, device=device).to(torch.float32 if wide else dtype)

    return new


def kernels(machine: Machine, preset: str, batch: int) -> Iterator[Case]:
    """Cases for every op with kernels, except packed attention, which has the kernels of attention."""
    shape = op_shape(machine.model(preset), batch)
    for name in fused_ops():
        if name == "attention_packed":
            continue
        example = OPS[name](shape, random_on(torch.device("meta"), machine.dtype))
        (forward, tangent, backward), (read, read_dual, read_backward) = example.flops, example.bytes
        for mode, flops, size, make in (
            ("dual", forward + tangent, read_dual, dual_call),
            ("primal", forward, read, primal_call),
            ("forward + backward", forward + backward, read + read_backward, backward_call),
        ):
            plain, others = ("torch.func.jvp", OTHERS_WITH_JVP) if mode == "dual" else ("plain", OTHERS)
            peers = {plain: PLAIN.get(name)} | others.get(name, {})
            if machine.gpu and name == "attention" and mode != "dual":  # then ours is SDPA by default
                peers["mfengine, Triton"] = by_triton(example.function)
            yield Case(
                "kernels",
                f"{name}, {mode}, {machine.name(preset)} of {batch}",
                {OURS: partial(make, machine, name, shape, example.function, explicit=True)}
                | {
                    peer: partial(make, machine, name, shape, f or reference(example.function))
                    for peer, f in peers.items()
                },
                samples=batch,
                flops=partial(float, flops),
                bytes=size,
                hide_host=True,
            )


def reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """An op on plain PyTorch."""

    def call(*arguments: Tensor) -> Any:
        with ops.use_backend("torch"):
            return function(*arguments)

    return call


def by_triton(function: Callable[..., Any]) -> Callable[..., Any]:
    """Attention with our kernels."""

    def call(*arguments: Tensor) -> Any:
        with ops.use_attention("triton"):
            return function(*arguments)

    return call


def rotating_arguments(machine: Machine, name: str, shape: Shape) -> Callable[[], tuple[tuple[Tensor, ...], ...]]:
    """Arguments of an op: several sets of tensors, in turn."""
    make = partial(OPS[name], shape, random_on(machine.device, machine.dtype))
    return rotating(lambda: (make().arguments, make().arguments), machine.device)


def primal_call(machine: Machine, name: str, shape: Shape, f: Callable[..., Any], explicit: bool = False) -> Call:
    following = rotating_arguments(machine, name, shape)

    def call() -> None:
        arguments, _ = following()
        with torch.no_grad():
            f(*arguments)

    return call


def dual_call(machine: Machine, name: str, shape: Shape, f: Callable[..., Any], explicit: bool = False) -> Call:
    """Output and tangent for tangents of all arguments but parameters: with our duals, or with `torch.func.jvp`."""
    following = rotating_arguments(machine, name, shape)
    example = OPS[name](shape, random_on(torch.device("meta"), machine.dtype))
    active = len(example.arguments) - example.parameters

    def call() -> None:
        arguments, tangents = following()
        primals, parameters = arguments[:active], arguments[active:]
        with torch.no_grad():
            if explicit:
                f(*map(Dual, primals, tangents[:active]), *parameters)
            else:
                torch.func.jvp(lambda *x: f(*x, *parameters), primals, tangents[:active])

    return call


def backward_call(machine: Machine, name: str, shape: Shape, f: Callable[..., Any], explicit: bool = False) -> Call:
    following = rotating_arguments(machine, name, shape)
    gradients = [torch.randn_like(o) for o in outputs_of(f(*following()[0]))]

    def call() -> None:
        leaves = [x.detach().requires_grad_() for x in following()[0]]
        torch.autograd.grad(outputs_of(f(*leaves)), leaves, gradients)

    return call


def outputs_of(result: Any) -> tuple[Any, ...]:
    """The outputs of an op, which returns one or a tuple, as a tuple."""
    return result if isinstance(result, tuple) and not isinstance(result, Dual) else (result,)


# ----------------------------------------------------------------------------
# Attention for other objectives and models: causal, with a mask, with grouped queries, and with a backward through the
# tangent.


def attention(machine: Machine, preset: str, batch: int) -> Iterator[Case]:
    """Output and tangent, and the gradients of both, which `jvp_flash_attention` cannot compute."""
    shape, able = op_shape(machine.model(preset), batch), find_spec("jvp_flash_attention") is not None
    for variant, options, groups in (
        ("", {}, shape.heads),
        (" causal", {"is_causal": True}, shape.heads),
        (" masked", {"masked": True}, shape.heads),
        (" of grouped queries", {}, max(1, shape.heads // 4)),
    ):
        q = o = (batch, shape.heads, shape.tokens, shape.dim)
        k = v = (batch, groups, shape.tokens, shape.dim)
        arguments = (None, "is_causal" in options, None)
        dual = sum(ATTENTION.flops(q, k, v, *arguments)[:2])
        size = 2 * machine.dtype.itemsize * sum(map(math.prod, (q, k, v, o)))  # primals and tangents
        backward = ATTENTION.backward_dual_flops(q, k, v, q, k, v, *arguments)
        for through, flops in ((False, dual), (True, dual + backward)):
            if variant or through:  # the plain case is in `kernels`
                peers = {OURS: ops.attention, "math SDPA": math_sdpa}
                if able and not through and groups == shape.heads:
                    peers["jvp_flash_attention"] = jvp_flash_attention
                mode = "through the tangent" if through else "dual"
                yield Case(
                    "attention",
                    f"attention{variant}, {mode}, {machine.name(preset)} of {batch}",
                    {
                        name: partial(attention_call, machine, (q, k, v), f, through, **options)
                        for name, f in peers.items()
                    },
                    samples=batch,
                    flops=partial(float, flops),
                    bytes=4 * size if through else size,  # the backward rereads it with gradients, and writes as much
                    hide_host=True,
                )


def attention_call(
    machine: Machine,
    shapes: tuple[Any, ...],
    f: Callable[..., Any],
    through: bool,
    is_causal: bool = False,
    masked: bool = False,
) -> Call:
    """Output and tangent, with explicit duals if f is ours, else with `torch.func.jvp`. If `through`, also the
    gradients of primals and tangents from gradients of both. The mask hides the last eighth of the keys.
    """
    keys = shapes[1][2]
    mask = torch.arange(keys, device=machine.device) < keys - keys // 8 if masked else None
    call = partial(f, is_causal=is_causal, mask=mask)

    def make() -> tuple[Tensor, ...]:
        new = random_on(machine.device, machine.dtype)
        return tuple(new(*shape).requires_grad_(through) for shape in (*shapes, *shapes))

    following = rotating(make, machine.device)
    gradients = [torch.randn_like(following()[0]) for _ in range(2)]

    def run() -> tuple[Tensor, ...]:
        inputs = following()
        with torch.set_grad_enabled(through), ops.differentiable_tangents(through):
            if f is ops.attention:
                outputs = tuple(call(*map(Dual, inputs[:3], inputs[3:])))
            else:
                outputs = torch.func.jvp(call, inputs[:3], inputs[3:])
            return (*outputs, *torch.autograd.grad(outputs, inputs, gradients)) if through else outputs

    return run


# ----------------------------------------------------------------------------
# Training steps: loss, backward, AdamW and EMA.


def step(machine: Machine, preset: str, batch: int, objective: str, peer: Callable[..., Call] | None = None) -> Case:
    """Our step and its peers on the same random latents with the same draws. Improved MeanFlow has no peers."""
    config, method = machine.model(preset), (OBJECTIVES | IMPROVED)[objective]
    arguments = (config, method, batch, machine.device, machine.dtype)
    implementations: dict[str, Callable[[], Call]] = {
        implementation: partial(training_step, *arguments, implementation=implementation)
        for implementation in IMPLEMENTATIONS
        if usable(implementation, machine) and (objective in OBJECTIVES or implementation == OURS)
    }
    if peer is not None:
        implementations["peer"] = partial(peer, *arguments)
    return Case(
        "step",
        f"{objective}, {machine.name(preset)} of {batch}",
        implementations,
        batch,
        lambda: batch * step_flops(config, method, batch),
        predicted=lambda: predicted_seconds(config, method, batch, machine.roofline),
    )


def usable(implementation: str, machine: Machine) -> bool:
    """False if it would compile on a CPU, which takes minutes, or needs a GPU that is missing."""
    if "jvp_flash_attention" in implementation:
        return machine.gpu and find_spec("jvp_flash_attention") is not None
    return machine.gpu or "compiled" not in implementation


# ----------------------------------------------------------------------------
# Other parts of training and sampling.


@dataclass(frozen=True)
class Update:
    """The work of an optimizer step besides AdamW and one EMA."""

    label: str
    clip_norm: float | None = None
    copy: bool = False  # bfloat16 copies of the parameters
    checked: bool = True  # skip steps with gradients that are not finite; the pair never does

    @property
    def bytes(self) -> int:
        """Bytes per parameter that ours moves: the gradient for its norm, then one pass over everything."""
        one = torch.empty(1, device="meta")
        row = multi_tensor.Row(one, one, one, one, one, [one], one.bfloat16() if self.copy else None)
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
    """Batches of moments, 2 x 4 x 32 x 32 in float16: DALI reads shards, a DataLoader reads one file per sample."""
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
        for _ in range(batches):  # more than either prefetches
            next(loader)

    samples = batch * batches
    size = samples * 2 * 2 * math.prod(space.shape)
    yield Case("data", f"moments of 8 x 32 x 32, {samples}", {OURS: dali, "DataLoader": files}, samples, bytes=2 * size)


class _Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """One file per sample, the format of MeanFlow ports."""

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

    name = f"one step, {machine.name('xl2')} of {batch}"
    implementations = {OURS: ours, "port SDPA": port}
    yield Case("sampler", name, implementations, batch, lambda: batch * sample_flops(config, OBJECTIVES["unguided"]))


def checkpoint(machine: Machine) -> Iterator[Case]:
    """Weights, two moments and one average, written to disk before the call returns: ours, and `torch.save`."""
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
        from mfengine.engine.checkpoint import Checkpointer  # here: it needs packages that `make gpu` lacks

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
