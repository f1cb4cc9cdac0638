"""Operators that PyTorch dispatches in a training step: FLOPs, bytes, output tiles. Exact, without a GPU.

The real step of the real network runs on meta tensors, which have shapes and no values, through the operators that
would run on a GPU. A dispatch mode records each of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfengine.engine.config import OptimConfig
from mfengine.engine.distributed import prepare_model
from mfengine.engine.flops import META, meta_network
from mfengine.engine.optim import adamw_ema
from mfengine.engine.plan import Phase, parameter_groups
from mfengine.kernels import multi_tensor
from mfengine.methods import OBJECTIVES, ObjectiveConfig
from mfengine.networks import NetworkConfig
from mfengine.ops import fixed_weights, use_backend
from mfengine.ops.flops import flop_registry
from mfengine.ranks import World

TILE = 128  # rows and columns of the output tile of one program of a matrix product

IDLE = {"detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "promote_types", "_unsafe_view"}
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")
OVERWRITES = {"copy_", "_foreach_copy_", "fill_", "zero_"}  # they do not read the tensor that they write
COPIES = {
    "_to_copy", "arange", "cat", "clone", "copy_", "embedding", "fill_", "_foreach_copy_", "index", "index_put_",
    "ones", "ones_like", "scalar_tensor", "stack", "zero_", "zeros", "zeros_like",
}  # fmt: skip
REDUCTIONS = {"amax", "amin", "embedding_dense_backward", "_foreach_norm", "linalg_vector_norm", "mean", "sum"}
FUSED = {"attention": "attention", "adaln": "adaLN", "gelu": "GELU"}  # part of an operator's name -> its kind


class Operator(NamedTuple):
    """A dispatched operator; equal ones are counted together."""

    phase: Phase
    kind: str
    """product, attention, adaLN, GELU, pointwise, copy, reduction or view; for another fused op, its name"""
    name: str  # aten::mm
    shapes: str
    """bf16[8,4] bf16[4,2] -> bf16[8,2]"""
    dtype: str
    """of its last argument, because a product's first may be a bias"""
    flops: int  # of matrix products, including what a fused kernel computes twice
    read: int  # bytes, each tensor counted once
    written: int  # bytes, each tensor counted once
    tiles: int
    """output tiles of a matrix product, each `TILE` x `TILE`; 0 for others"""
    launches: int
    """1 if it launches work on the device"""


def total(operators: Counter[Operator], *fields: str, phase: Phase | None = None) -> int:
    """Sum of some fields over all operators, or those of a phase."""
    return sum(
        n * getattr(operator, field)
        for operator, n in operators.items()
        if phase in (None, operator.phase)
        for field in fields
    )


class Recorder(TorchDispatchMode):
    """Records the operators dispatched inside, and those for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[Operator] = Counter()
        self.phase: Phase = "guidance"
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        used, made = _tensors((args, kwargs)), _tensors(result)
        # Times and row numbers are on the host and have values, because they decide which rows are guided.
        on_device = any(x.is_meta for x in used)
        if on_device and (func._schema.name in WAITS or any(not x.is_meta for x in made)):
            self.waits += 1
        launched = launches(func) and (on_device or any(x.is_meta for x in made))
        flops = 0
        if launched and func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        read, written = traffic(func, args, kwargs, result) if launched else (0, 0)
        kind = _kind(func, flops) if launched else "view"
        operator = Operator(
            phase=self.phase,
            kind=kind,
            name=func._schema.name,
            shapes=f"{_describe((*args, *kwargs.values()))} -> {_describe(result)}",
            dtype=_short(given[0].dtype) if (given := _tensors(args)) else "",
            flops=flops,
            read=read,
            written=written,
            tiles=output_tiles(made[0]) if kind == "product" else 0,
            launches=int(launched),
        )
        self.operators[operator] += 1
        return result


def launches(func: Any) -> bool:
    """Whether an operator launches work on the device: not a view, an allocation or bookkeeping."""
    space, _, name = func._schema.name.partition("::")
    returns = func._schema.returns
    view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return space in ("aten", "mfengine", "fsdp", "c10d") and name not in IDLE and not view


def traffic(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
    """Least bytes that an operator reads and writes: each tensor once, an expanded one without its repetitions."""
    name, read, written = func._schema.name.partition("::")[2], 0, 0
    for i, argument in enumerate(func._schema.arguments):
        size = _bytes(args[i] if i < len(args) else kwargs.get(argument.name))
        # Fused AdamW and SGD take gradients as writable, but write them only to scale them.
        left = argument.name == "grads" and kwargs.get("grad_scale") is None
        writes = argument.alias_info is not None and argument.alias_info.is_write and not left
        written += size if writes else 0
        read += 0 if writes and (argument.is_out or name in OVERWRITES) else size
    if any(r.alias_info is None for r in func._schema.returns):
        written += _bytes(result)
    return read, written


def output_tiles(x: Tensor) -> int:
    """`TILE` x `TILE` tiles of matrices (..., M, N)."""
    *batch, rows, columns = x.shape
    return math.prod(batch) * -(-rows // TILE) * -(-columns // TILE)


def _kind(func: Any, flops: int) -> str:
    space, _, name = func._schema.name.partition("::")
    if fused := next((kind for part, kind in FUSED.items() if part in name), None):
        return fused
    if space == "mfengine":
        return str(name.removesuffix("_backward").removesuffix("_dual"))
    if flops:
        return "product"
    if name in COPIES:
        return "copy"
    return "reduction" if name in REDUCTIONS else "pointwise"


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(tree: Any) -> int:
    return sum(
        x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
        for x in _tensors(tree)
    )


def _describe(tree: Any) -> str:
    tensors = _tensors(tree)
    if len(tensors) > 12:
        return f"{len(tensors)} tensors, {sum(x.numel() for x in tensors):,} elements"
    alike = ((shape, len(list(some))) for shape, some in groupby(map(_shape, tensors)))
    return " ".join(f"{n} * {shape}" if n > 1 else shape for shape, n in alike)


def _shape(x: Tensor) -> str:
    return f"{_short(x.dtype)}[{','.join(map(str, x.shape))}]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f").replace("int", "i")


# ----------------------------------------------------------------------------
# A step.


class _CudaLibrary:
    """A stand-in for the CUDA library, which the dispatcher does not see: records the optimizer's calls."""

    device = META.type

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def why_not(self) -> None:
        return None

    def sum_of_squares(self, grads: list[Tensor]) -> Tensor:
        self._note("sum_of_squares", "reduction", grads, _bytes(grads), 0)
        return torch.zeros((), dtype=torch.float64, device=META)

    def adamw_ema(self, rows: list[multi_tensor.Row], **_: Any) -> None:
        written = _bytes(
            [(r.param, r.averages, r.copy, *([r.exp_avg, r.exp_avg_sq] if r.grad is not None else [])) for r in rows]
        )
        read = sum(map(multi_tensor.bytes_moved, rows)) - written
        self._note("adamw_ema", "pointwise", [r.param for r in rows], read, written)

    def _note(self, name: str, kind: str, tensors: list[Tensor], read: int, written: int) -> None:
        shapes, dtype = _describe(tensors), _short(tensors[0].dtype)
        operator = Operator("optimizer", kind, f"mfengine::{name}", shapes, dtype, 0, read, written, 0, 1)
        self._recorder.operators[operator] += 1


@cache
def step_operators(
    model: NetworkConfig,
    method: ObjectiveConfig,
    rows: int,
    optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    *,
    gathered: bool = False,
) -> tuple[Counter[Operator], Counter[Operator]]:
    """The operators of one rank's optimizer step: loss, backward, AdamW and averages, in bfloat16 with fused kernels.

    The optimizer is the CUDA library's. Draws come from seed 0.

    Args:
        model, method, optim: what is trained, and how.
        rows: rows of the rank.
        gathered: whether parameters come in the dtype of FSDP2's gathering; otherwise the optimizer writes copies.

    Returns:
        The operators of the step, and those of its forward without tangents, which runs separately.
    """
    recorder, primal = Recorder(), Counter[Operator]()
    with use_backend("triton"), patch.object(multi_tensor, "library", lambda: _CudaLibrary(recorder)):
        network = prepare_model(meta_network(model, torch.bfloat16), World(0, 1, META))
        objective, optimizer = OBJECTIVES.build(method), adamw_ema(network, optim, whole=not gathered)
        shape = (rows, *model.latent_shape)
        draws = objective.draw(shape, torch.Generator().manual_seed(0), META)
        latents, labels = torch.empty(shape, device=META), torch.empty(rows, dtype=torch.int64, device=META)

        def enter_pass(*_: Any) -> None:
            recorder.phase = "forward" if torch.is_grad_enabled() else "guidance"

        def run_primal(_: Any, args: Any, kwargs: dict[str, Any], __: Any) -> None:
            if not torch.is_grad_enabled():
                return
            operators, recorder.operators = recorder.operators, primal
            with torch.no_grad():
                network(*args, **{name: x for name, x in kwargs.items() if name != "tangents"})
            recorder.operators, recorder.phase = operators, "forward"

        network.register_forward_pre_hook(enter_pass)
        network.register_forward_hook(run_primal, with_kwargs=True)
        whole = {p: p.data for p in network.parameters()}
        if gathered:
            for unit, parameters in parameter_groups(network):
                for p in parameters:
                    p.data = p.data.to(unit.dtype)
        weights = fixed_weights(optimizer.copies)
        with recorder:
            with weights:
                loss, _ = objective.loss(network, latents, labels, draws)
            recorder.phase = "backward"
            loss.backward()
        for p, data in whole.items():
            p.data = data
            p.grad = torch.empty_like(data, dtype=p.grad_dtype)
        recorder.phase = "optimizer"
        with recorder:
            optimizer.step()
    return recorder.operators, primal
